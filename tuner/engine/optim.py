"""The optimizer, and the learning rate as a function of the samples seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from tuner.contract.config import OptimizerConfig, OptimizerName, RunConfig, ScheduleConfig, ScheduleKind
from tuner.contract.errors import WorkloadError
from tuner.engine.failure import Unsupported

_Group = dict[str, Any]


def build_optimizer(workload: Any, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The workload's own optimizer, or one parameter group per group of the workload, each with its `lr_scale`.

    Raises WorkloadError for bad groups and for an optimizer the loop cannot use, Unsupported where `fused` is ignored.
    """
    if makes_optimizer(workload):
        return _own_optimizer(workload.optimizer(model, config), config)
    if config.name is OptimizerName.OWN:
        raise WorkloadError(
            "optimizer: name is `own`, but the workload has no method `optimizer(model, config)`; write one, or name "
            "adam, adamw or sgd"
        )
    groups = _groups(workload, model)
    for group in groups:
        group["lr"] = config.lr * group["lr_scale"]
    if config.name is OptimizerName.SGD:
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=config.fused
        )
    kind = torch.optim.Adam if config.name is OptimizerName.ADAM else torch.optim.AdamW
    return kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True if config.fused else None,
    )


def makes_optimizer(workload: Any) -> bool:
    return callable(getattr(workload, "optimizer", None))


def _own_optimizer(made: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    if not isinstance(made, torch.optim.Optimizer):
        raise WorkloadError(f"optimizer: it returned a {type(made).__name__}; return a torch.optim.Optimizer")
    name = type(made).__name__
    closure = signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise WorkloadError(
            f"optimizer: {name}.step needs a closure that computes the loss again; choose one whose step() needs none"
        )
    for number, group in enumerate(made.param_groups):
        lr = group.get("lr")
        if not isinstance(lr, int | float | Tensor):
            raise WorkloadError(f"optimizer: group {number} of {name} has no lr (got {lr!r}); give it one")
        group.setdefault("lr_scale", float(lr) / config.lr)
    if config.fused and not all(group.get("fused") for group in made.param_groups):
        raise Unsupported(
            f"fused: the workload's own optimizer ({name}) is not fused; leave the knob out, or pass config.fused on"
        )
    return made


def _groups(workload: Any, model: nn.Module) -> list[_Group]:
    if not hasattr(workload, "param_groups"):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr_scale": 1.0}]
    listed: Sequence[Mapping[str, Any]] = workload.param_groups(model)
    groups: list[_Group] = []
    for group in listed:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            groups.append({"lr_scale": 1.0, **group, "params": params})
    if not groups:
        raise WorkloadError("param_groups: no parameter of the model is trained (all have requires_grad=False)")
    return groups


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The one lr knob: every group gets its own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def lr_factor(schedule: ScheduleConfig, horizon_samples: int, samples: float) -> float:
    """Share of the base lr after `samples` samples: linear warm-up, then constant, linear, or half a cosine down to
    `final_factor` at the horizon, and `final_factor` beyond it."""
    if samples < schedule.warmup_samples:
        return samples / schedule.warmup_samples
    if schedule.kind is ScheduleKind.CONSTANT:
        return 1.0
    span = max(1, horizon_samples - schedule.warmup_samples)
    done = min(1.0, (samples - schedule.warmup_samples) / span)
    shape = 1.0 - done if schedule.kind is ScheduleKind.LINEAR else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.final_factor + (1.0 - schedule.final_factor) * shape


def lr_schedule(workload: Any, config: RunConfig) -> Callable[[float], float]:
    """Samples seen -> factor on the base lr: the workload's own `schedule`, or the configuration's.

    Raises WorkloadError where both are given, and when the factor is no number from 0.
    """
    own = getattr(workload, "schedule", None)
    said, horizon = config.schedule, config.horizon_samples
    if not callable(own):
        return lambda samples: lr_factor(said, horizon, samples)
    if said != ScheduleConfig():
        raise WorkloadError(
            f"schedule: the workload has a `schedule` of its own, and the configuration says {said.kind.value} with "
            f"{said.warmup_samples} samples of warm-up; leave out one of them"
        )

    def factor(samples: float) -> float:
        found = float(own(samples, horizon))
        if not 0 <= found < math.inf:
            raise WorkloadError(f"schedule: a factor from 0 is needed, got {found:g} after {samples:g} samples")
        return found

    return factor


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give restored state tensors their parameter's memory layout: fused and foreach kernels are slow without."""
    for parameter in trained_parameters(optimizer):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def with_settings_of(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A saved optimizer state under the present settings: torch would silently bring back the old weight decay.

    Optimizers besides torch's own may keep a part of their state among the settings; theirs are the saved ones.
    Raises ValueError when the groups differ in number or size.
    """
    if len(state["param_groups"]) != len(optimizer.param_groups):
        raise ValueError("the optimizer has another number of parameter groups")
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    if not type(optimizer).__module__.startswith("torch.optim."):
        kept = [{**present, **saved, "lr_scale": present["lr_scale"]} for saved, present in pairs]
        return {**state, "param_groups": kept}
    groups = [{**saved, **present, "params": saved["params"]} for saved, present in pairs]
    return {**state, "param_groups": groups}

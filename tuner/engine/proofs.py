"""Probes that prove something about a workload: equal gradients however a batch is cut, and memory without running."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tuner.contract.config import CompileMode, LoaderConfig, Precision, RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply
from tuner.engine.bench import Answer, Bench, failed
from tuner.engine.compiling import checkpoint_blocks
from tuner.engine.failure import Diverged, Unsupported, classify, one_line
from tuner.engine.limits import memory_cap
from tuner.engine.live_bytes import LiveBytes
from tuner.engine.loader import Group, ResidentSource, count_weights, first_batches
from tuner.engine.optim import build_optimizer
from tuner.engine.precision import Arithmetic
from tuner.engine.step import GradientMaker
from tuner.engine.trainer import Trainer, set_threads

WARM_STEPS = 3
"""Updates before gradients are compared: at the start zero-initialised outputs hide most of a gradient."""


def equivalence(bench: Bench) -> None:
    """Gradient of the same samples cut as in the first and as in the second point. Both get the same answer."""
    first, second = bench.request.points[:2] if len(bench.request.points) == 2 else (None, None)
    bench.phases.enter("build")
    try:
        if first is None or second is None or first.effective_batch_size != second.effective_batch_size:
            raise ConfigError("equivalence: two points of the same effective batch size are needed")
        set_threads(first.threads)
        with memory_cap(bench.request.limits.memory_bytes, bench.device):
            reply = PointReply(outcome=Outcome.OK, values={"relative_l2": relative_l2(bench, first, second)})
    except Exception as error:
        reply = failed(0, error, bench.device)
    for index in range(len(bench.request.points)):
        bench.emit(reply.model_copy(update={"index": index}))
    bench.phases.enter("teardown")


def relative_l2(bench: Bench, first: RunConfig, second: RunConfig) -> float:
    """|g1 - g2| / |g1| over all parameters, fp32, dropout off, the same samples, seeds and weights of the model."""
    trainer = _plain_trainer(bench, first, 0)
    _without_dropout(trainer.model)
    bench.phases.enter("warmup")
    for _ in range(WARM_STEPS):
        trainer.step()
    bench.phases.enter("measure")
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    found = []
    for config in (first, second):
        other = _plain_trainer(bench, config, WARM_STEPS * first.effective_batch_size)
        other.model.load_state_dict(state)
        _without_dropout(other.model)
        found.append(other.gradients())
        other.close()
    trainer.close()
    return _distance(*found)


def _plain_trainer(bench: Bench, config: RunConfig, start: int) -> Trainer:
    """fp32, eager, no averaging, and batches fetched in this process from stream position `start` on."""
    plain = config.model_copy(
        update={
            "precision": Precision.FP32,
            "compile": CompileMode.EAGER,
            "ema": None,
            "loader": LoaderConfig(num_workers=0),
        }
    )
    workload, groups = bench.workload(config), []
    for number in range(WARM_STEPS if start == 0 else 1):
        position = start + number * config.effective_batch_size
        batches = first_batches(
            workload, plain, config.accumulation_steps, dataset=bench.dataset(config), start=position
        )
        groups.append(Group(batches, count_weights(workload, batches)))
    return Trainer(workload, plain, device=bench.device, source=ResidentSource(groups))


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):  # attention layers keep the bare rate
            setattr(module, "dropout", 0.0)  # noqa: B010


def _distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    names = first.keys() | second.keys()
    zero = torch.zeros(())
    apart = sum(float((first.get(n, zero) - second.get(n, zero)).double().square().sum()) for n in names)
    size = sum(float(g.double().square().sum()) for g in first.values())
    if not math.isfinite(apart) or not math.isfinite(size):
        raise Diverged("the gradients are not finite")
    return math.sqrt(apart / size) if size else 0.0


def trace(bench: Bench) -> None:
    """Peak bytes of each point, predicted on fake tensors: nothing is allocated, nothing is computed."""
    bench.each_point(lambda config: _trace(bench, config))


def _trace(bench: Bench, config: RunConfig) -> Answer:
    workload = bench.workload(config)
    batches = first_batches(workload, config, 1, dataset=bench.dataset(config))
    weights = count_weights(workload, batches)
    bench.phases.enter("measure")
    try:
        return None, {"predicted_peak_bytes": float(traced_peak(workload, config, batches[0], weights))}
    except Exception as error:
        outcome, _ = classify(error)
        if outcome.is_oom:
            raise
        raise Unsupported(f"this workload cannot be traced on fake tensors: {one_line(error)}") from error


def traced_peak(workload: Any, config: RunConfig, batch: dict[str, Tensor], weights: dict[str, float]) -> int:
    """Peak bytes of live tensors in two optimizer steps of two micro-batches at most, on a fake CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cpu = torch.device("cpu")
    precision = config.precision if config.precision is Precision.BF16 else Precision.FP32
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        torch.manual_seed(config.seed)
        model: nn.Module = workload.model()
        model.train()
        optimizer = build_optimizer(workload, model, config.optimizer)
        if config.gradient_checkpointing:
            checkpoint_blocks(workload, model)
        maker = GradientMaker(workload, model, Arithmetic(precision, cpu), channels_last=False)
        maker.trusting = True
        moved: dict[str, Tensor] = {name: fake.from_tensor(value) for name, value in batch.items()}
        group = Group([moved], weights)
        count = LiveBytes()
        count.hold([*model.parameters(), *model.buffers(), *moved.values()])
        with count:
            for _ in range(2):
                for _ in range(min(2, config.accumulation_steps)):
                    maker(group)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return count.peak + (_bytes(model) if config.ema is not None else 0)


def _bytes(model: nn.Module) -> int:
    """What the averaged copy of the weights takes: frozen parameters are shared with it."""
    own = [p for p in model.parameters() if p.requires_grad] + list(model.buffers())
    return sum(value.numel() * value.element_size() for value in own)

"""Probes that prove something about a workload: equal gradients however a batch is cut, and memory without running."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
from tuner.engine.heap import heap_peak
from tuner.engine.limits import memory_cap
from tuner.engine.live_bytes import LiveBytes
from tuner.engine.loader import Group, ResidentSource, TensorBatch, count_weights, first_batches
from tuner.engine.optim import build_optimizer, trained_parameters
from tuner.engine.precision import Arithmetic
from tuner.engine.step import GradientMaker, update
from tuner.engine.trainer import Trainer, set_threads

WARM_STEPS = 3
"""Updates before gradients are compared: at the start zero-initialised outputs hide most of a gradient."""
TRACED_BATCHES = 8
"""At most so many micro-batches are held by a trace, as by a compute probe."""


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
    count = min(config.accumulation_steps, TRACED_BATCHES)
    batches = first_batches(workload, config, count, dataset=bench.dataset(config))
    bench.phases.enter("measure")
    try:
        found = traced_peaks(workload, config, batches, bench.device)
    except Exception as error:
        outcome, _ = classify(error)
        if outcome.is_oom:
            raise
        raise Unsupported(f"this workload cannot be traced on fake tensors: {one_line(error)}") from error
    return None, found


def traced_peaks(
    workload: Any, config: RunConfig, batches: Sequence[TensorBatch], device: torch.device
) -> dict[str, float]:
    """`predicted_peak_bytes`: peak of live tensors; `predicted_heap_bytes`: what glibc's heap needs for them (see
    `heap`), which counts on a host alone.

    Of an optimizer step that finds the optimizer's state already made, so from the second on: at most two
    micro-batches (the second meets the gradients of the first), the largest of `batches` last; all of `batches` are
    held throughout. It runs on a fake CPU whatever `device` is, in the optimizer's form there.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    count, weights = LiveBytes(), count_weights(workload, batches)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        torch.manual_seed(config.seed)
        job = _FakeJob(workload, config, device)
        moved: list[TensorBatch] = [{name: fake.from_tensor(value) for name, value in b.items()} for b in batches]
        group = Group(sorted(moved, key=_batch_bytes)[-2:], weights)
        job.make_state()
        held = [*job.held(), *(value for batch in moved for value in batch.values())]
        count.hold(held)
        made = len(count.events)
        with count:
            job.step(group)
    before, events = count.events[:made], count.events[made:]
    heap = heap_peak([size for number, size in before if number > 0], events)
    return {"predicted_peak_bytes": float(count.peak), "predicted_heap_bytes": float(heap)}


class _FakeJob:
    """Model, optimizer and average as the trainer would make them, on tensors without memory."""

    def __init__(self, workload: Any, config: RunConfig, device: torch.device) -> None:
        cpu = torch.device("cpu")
        half = config.precision in (Precision.BF16, Precision.FP16)
        self._arithmetic = Arithmetic(Precision.BF16 if half else Precision.FP32, cpu)
        self._config = config
        self.model: nn.Module = workload.model().train()
        self._optimizer = build_optimizer(workload, self.model, config.optimizer)
        if device.type == "cuda" and not config.optimizer.fused:  # torch's choice there: temporaries of all weights
            for settings in self._optimizer.param_groups:
                if "foreach" in settings:
                    settings["foreach"] = True
        if config.gradient_checkpointing:
            checkpoint_blocks(workload, self.model)
        self._maker = GradientMaker(workload, self.model, self._arithmetic, channels_last=False)
        self._maker.trusting = True

    def make_state(self) -> None:
        """The optimizer's state: made by its first step, which costs less memory than those that follow."""
        for parameter in trained_parameters(self._optimizer):
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def held(self) -> Iterator[Tensor]:
        """Everything that lives as long as the run does."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        if self._config.ema is not None:  # its copy; frozen parameters are shared with it
            yield from (torch.empty_like(p) for p in self._averaged())
        for state in self._optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def _averaged(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad] + list(self.model.buffers())

    def step(self, group: Group) -> None:
        """The average is updated in place and needs nothing more."""
        self._maker(group)
        parameters = trained_parameters(self._optimizer)
        update(self._optimizer, parameters, self._arithmetic, self._config.max_grad_norm)
        self._optimizer.zero_grad(set_to_none=True)


def _batch_bytes(batch: TensorBatch) -> int:
    return sum(value.untyped_storage().nbytes() for value in batch.values())

"""The trace probe: the peak memory of a configuration, foretold without running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner.contract.config import Precision, RunConfig
from tuner.engine.bench import Answer, Bench
from tuner.engine.compiling import checkpoint_blocks
from tuner.engine.failure import Unsupported, classify, one_line
from tuner.engine.heap import heap_peak
from tuner.engine.live_bytes import LiveBytes
from tuner.engine.loader import Group, TensorBatch, count_weights, first_batches
from tuner.engine.optim import build_optimizer, trained_parameters
from tuner.engine.precision import Arithmetic
from tuner.engine.step import GradientMaker, update

TRACED_BATCHES = 8
"""At most so many micro-batches are held by a trace, as by a compute probe."""


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

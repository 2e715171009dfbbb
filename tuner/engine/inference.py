"""The INFERENCE probe: latency of one sample and throughput of batches, without gradients.

Timed is what a caller waits for: the batch's way to the device and the prediction. Where the workload has no `predict`,
the forward pass of its `loss` stands in for it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Measurement
from tuner.contract.probe import NoticeEvent, ProgressEvent
from tuner.engine import compiling
from tuner.engine.bench import Answer, Bench
from tuner.engine.failure import classify, release
from tuner.engine.loader import TensorBatch, first_batches, to_device
from tuner.engine.precision import Arithmetic

BATCH_SIZES = (1, 4, 16, 64)
WARM_CALLS = 3
LEAST_CALLS, MOST_CALLS = 10, 2000
DIFFERENT_BATCHES = 8
"""So many different batches of a size take turns, so that no single input decides."""


def inference(bench: Bench) -> None:
    """Raises nothing: a point that fails is a reply. `values`: latency_b1_p50_s, latency_b1_p95_s, samples_per_s_bN for
    each batch size N that fits, largest_batch, peak_bytes. `measurement`: the calls of batch 1."""
    bench.each_point(lambda config: _inference(bench, config))


def _inference(bench: Bench, config: RunConfig) -> Answer:
    compiling.refuse_illegal(config, bench.device)
    memory = bench.peak_memory()
    arithmetic = Arithmetic(config.precision, bench.device)
    try:
        predictor = Predictor(bench, config, arithmetic)
        calls = _by_size(bench, predictor)
    finally:
        arithmetic.close()
    peak = memory.read()
    values = {
        "latency_b1_p50_s": float(np.quantile(calls[1], 0.5)),
        "latency_b1_p95_s": float(np.quantile(calls[1], 0.95)),
        **{f"samples_per_s_b{size}": size * len(times) / sum(times) for size, times in calls.items()},
        "largest_batch": float(max(calls)),
        "peak_bytes": float(peak.gate_bytes),
    }
    measurement = Measurement(
        samples_per_step=1,
        step_s=tuple(calls[1]),
        memory=peak,
        phases_s=bench.phases.seconds(),
        parameters=sum(parameter.numel() for parameter in predictor.model.parameters()),
    )
    return measurement, values


class Predictor:
    """The model of a point, ready to predict, as production computes: same precision, layout and compile mode."""

    def __init__(self, bench: Bench, config: RunConfig, arithmetic: Arithmetic) -> None:
        self._bench = bench
        self._config = config
        self._arithmetic = arithmetic
        self._workload = bench.workload(config)
        torch.manual_seed(config.seed)
        self.model: nn.Module = self._workload.model().to(bench.device).eval().requires_grad_(False)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        compiling.compile_model(self.model, config.compile)
        self._call: Callable[[nn.Module, TensorBatch], Any] = getattr(self._workload, "predict", self._workload.loss)
        self._marks_steps = bench.device.type == "cuda" and config.compile in compiling.GRAPH_MODES

    def batches(self, size: int) -> list[TensorBatch]:
        """Batches of `size` training samples, on the host."""
        cut = self._config.model_copy(update={"micro_batch_size": size, "accumulation_steps": 1, "world_size": 1})
        count = DIFFERENT_BATCHES if size < max(BATCH_SIZES) else 2
        return first_batches(self._workload, cut, count, dataset=self._bench.dataset(self._config))

    def seconds(self, batch: TensorBatch) -> float:
        """One prediction, from the host's batch to the finished result on the device."""
        began = time.perf_counter()
        with torch.no_grad(), self._arithmetic.autocast():
            if self._marks_steps:
                torch.compiler.cudagraph_mark_step_begin()
            self._call(self.model, to_device(batch, self._bench.device, channels_last=self._config.channels_last))
        if self._bench.device.type == "cuda":
            torch.cuda.synchronize(self._bench.device)
        return time.perf_counter() - began


def _by_size(bench: Bench, predictor: Predictor) -> dict[int, list[float]]:
    """Batch size -> seconds of its calls. The first size that does not fit ends the list, and is told; that a single
    sample does not fit is raised."""
    found: dict[int, list[float]] = {}
    for size in BATCH_SIZES:
        bench.emit(ProgressEvent(done=size, total=max(BATCH_SIZES), text=f"inference, batch {size}"))
        try:
            found[size] = _timed(bench, predictor, predictor.batches(size))
        except Exception as error:
            outcome, message = classify(error)
            if size == BATCH_SIZES[0] or not outcome.is_oom:
                raise
            release(error)
            text = f"inference: batch {size} does not fit ({outcome.value}: {message}); larger ones are left out"
            bench.emit(NoticeEvent(level="warning", text=text))
            break
    return found


def _timed(bench: Bench, predictor: Predictor, batches: Sequence[TensorBatch]) -> list[float]:
    """Seconds of each call for `measure_s` shared among the sizes; calls that warm up are not among them."""
    turns = itertools.cycle(batches)
    bench.phases.enter("warmup")
    for _ in range(WARM_CALLS):
        predictor.seconds(next(turns))
    bench.phases.enter("measure")
    budget_s = bench.request.limits.measure_s / len(BATCH_SIZES)
    times: list[float] = []
    while len(times) < MOST_CALLS and (len(times) < LEAST_CALLS or sum(times) < budget_s):
        times.append(predictor.seconds(next(turns)))
    return times

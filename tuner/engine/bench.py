"""What the probes share: a workload on a device, its dataset made once, points measured and torn down one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tuner.contract.base import Scalar
from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.measurement import Measurement, Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeRequest
from tuner.engine.compiling import forget_compiled
from tuner.engine.device import environment
from tuner.engine.distributed import this_rank
from tuner.engine.failure import Disturbed, classify, details, release
from tuner.engine.hooks import Emit, Phases
from tuner.engine.limits import memory_cap
from tuner.engine.memory import PeakMemory, resident_bytes, tidy
from tuner.engine.pulse import HOW_IT_SLEPT
from tuner.engine.trainer import set_threads

Answer = tuple[Measurement | None, dict[str, float]]
TIMED = frozenset({ProbeKind.LOADER, ProbeKind.COMPUTE, ProbeKind.END_TO_END, ProbeKind.INFERENCE, ProbeKind.PROFILE})
"""Kinds of probe that answer how long something takes."""


class Bench:
    """One request at work. A dataset is kept between points of the same options; models are not."""

    def __init__(
        self,
        request: ProbeRequest,
        make: Callable[[Mapping[str, Scalar]], Any],
        device: torch.device,
        emit: Emit,
        slept: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """slept: seconds since it was last asked in which this process did not run at all."""
        self.request = request
        self.device = device
        self.emit = emit
        self.phases = Phases(emit)
        self.base_bytes = resident_bytes()
        self._make = make
        self._slept = slept
        self._key = ""
        self._workload: Any = None
        self._dataset: Any = None

    def workload(self, config: RunConfig) -> Any:
        """The workload a point asks for by its own options; a point without options takes the request's.

        Only the last one is kept, and its dataset: what another point held must not count into this one's memory.
        """
        options = config.options or self.request.options
        key = json.dumps(options, sort_keys=True)
        if key != self._key:
            self._workload = self._dataset = None
            self._workload, self._key = self._make(options), key
        return self._workload

    def dataset(self, config: RunConfig) -> Any:
        workload = self.workload(config)
        if self._dataset is None:
            self._dataset = workload.dataset("train")
        return self._dataset

    def peak_memory(self) -> PeakMemory:
        """The peak from now on, above what the imports cost."""
        return PeakMemory(self.device, self.base_bytes)

    def each_point(self, measure: Callable[[RunConfig], Answer]) -> None:
        """Answer every point as soon as it is known. A point that fails costs the others nothing."""
        for index, config in enumerate(self.request.points):
            self.phases = Phases(self.emit)
            self.emit(self.answer(index, config, measure))
            self.phases.enter("teardown")
            if config.compile is not CompileMode.EAGER:
                forget_compiled()
            tidy()

    def answer(self, index: int, config: RunConfig, measure: Callable[[RunConfig], Answer]) -> PointReply:
        """Run `measure` under the request's memory cap; whatever it raises becomes the outcome."""
        self.phases.enter("build")
        self._slept()
        set_threads(config.threads, config.world_size)
        try:
            with memory_cap(self.request.limits.memory_bytes, self.device):
                measurement, values = measure(config)
            self._refuse_slept(config)
            return PointReply(
                index=index,
                outcome=Outcome.OK,
                measurement=measurement,
                values=values,
                environment=environment(self.device),
            )
        except Exception as error:
            return failed(index, error, self.device)

    def _refuse_slept(self, config: RunConfig) -> None:
        """Raises Disturbed on all ranks where one of them was held up in what was to be timed."""
        if self.request.kind not in TIMED:
            return
        if slept_s := max(this_rank(config).gather(self._slept())):
            raise Disturbed(
                f"the process did not run for {slept_s:.0f} s of its measurement ({HOW_IT_SLEPT}), so it is none"
            )


def failed(index: int, error: Exception, device: torch.device) -> PointReply:
    """The reply to a point that raised; the memory the exception holds is let go."""
    outcome, message = classify(error)
    detail = details(error)
    release(error)
    return PointReply(index=index, outcome=outcome, message=message, detail=detail, environment=environment(device))

"""Step times, waits and losses of a run, kept raw; a long run is thinned only when it is reported."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tuner.contract.measurement import Measurement, MemoryPeak, Telemetry
from tuner.contract.statistics import warmup_cut
from tuner.engine.clock import StepClock
from tuner.engine.step import TOTAL, StepResult

ENTRIES = 4000
"""A measurement has at most about this many entries; above it, each is the mean of a few consecutive steps."""


MIN_ROUNDS = 6
"""With fewer rounds of the loader's workers nobody can tell a slow start from the rest."""
LEAST_STEADY = 0.25
"""Where breaks follow each other so closely that fewer steps than this share are not fed ahead, all count."""


class Stretch(NamedTuple):
    """Some steps of a run, added up."""

    steps: int
    seconds: float
    wait_s: float


class StepRecord:
    """Fed after every step. Losses are tensors until `drain`, so that the device is not waited for every step."""

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._pending: list[StepResult] = []
        self.step_s: array[float] = array("d")
        self.wait_s: array[float] = array("d")
        self.ahead = array("b")
        """1 for each step that was fed from what the loader's workers made during a break."""
        self.slept: set[int] = set()
        """Numbers of the steps in which the process did not run for a while: they are no measurement."""
        self.losses: dict[str, array[float]] = {}
        self.left_out = array("b")
        """1 for each step whose update was left out, as far as the losses were read."""

    def add(self, result: StepResult, *, slept: bool = False) -> None:
        if slept:
            self.slept.add(len(self.wait_s))
        self._pending.append(result)
        self.wait_s.append(result.wait_s)
        self.ahead.append(result.ahead)
        self.step_s.extend(self._clock.take(wait=False))

    @property
    def pending(self) -> int:
        return len(self._pending)

    def drain(self) -> None:
        """Read everything up to now; waits for the device."""
        self.step_s.extend(self._clock.take(wait=True))
        if not self._pending:
            return
        for name, values in _read_losses(self._pending).items():
            self.losses.setdefault(name, array("d")).extend(values)
        self.left_out.extend(_read_flags([result.left_out for result in self._pending]))
        self._pending.clear()

    def bad_since(self, step: int) -> list[bool]:
        """Of each step from number `step` on: was its total loss not finite, or its update left out? Call `drain`."""
        totals = self.losses.get(TOTAL, array("d"))[step:]
        return [bool(out) or not math.isfinite(total) for total, out in zip(totals, self.left_out[step:], strict=True)]

    def bad_at_end(self) -> int:
        """How many of the last steps in a row were so."""
        totals, count = self.losses.get(TOTAL, array("d")), 0
        while count < len(totals) and (self.left_out[-1 - count] or not math.isfinite(totals[-1 - count])):
            count += 1
        return count

    @property
    def ends_sound(self) -> bool:
        """Is the last loss finite, or was nothing updated by it?"""
        totals = self.losses.get(TOTAL, array("d"))
        return not totals or math.isfinite(totals[-1]) or bool(self.left_out[-1])

    def stretch(self, since: int, until: int | None = None) -> Stretch:
        """The steps from number `since` on whose times are known, without those slept through; those fed ahead only
        where there are no others."""
        numbers = range(since, len(self.step_s) if until is None else until)
        steps = [step for step in numbers if step not in self.slept]
        steady = [step for step in steps if not self.ahead[step]] or steps
        return Stretch(
            len(steady),
            math.fsum(self.step_s[step] for step in steady),
            math.fsum(self.wait_s[step] for step in steady),
        )

    def _steady(self, cut: int) -> list[int]:
        """The steps that count: all up to `cut` (the warm-up), then those neither slept through nor fed ahead. Where
        too few are left, those fed ahead count too."""
        steps = [step for step in range(len(self.step_s)) if step < cut or step not in self.slept]
        steady = [step for step in steps if step < cut or not self.ahead[step]]
        return steady if len(steady) - cut >= LEAST_STEADY * (len(steps) - cut) else steps

    def measurement(
        self,
        samples_per_step: int,
        memory: MemoryPeak,
        *,
        least_warmup: int = 1,
        most_warmup: int | None = None,
        round_steps: int = 1,
        telemetry: Telemetry | None = None,
        reference_s: Sequence[float] = (),
        phases_s: dict[str, float] | None = None,
        parameters: int | None = None,
        flops_per_sample: float | None = None,
    ) -> Measurement:
        """Warm-up judged and everything thinned to `ENTRIES`. Call `drain` first."""
        cut = judge_warmup(self.step_s, least_warmup, round_steps)
        if most_warmup is not None:  # a slow stretch of production is production, not warm-up
            cut = min(cut, max(least_warmup, most_warmup))
        counted = self._steady(cut)
        every = max(1, math.ceil(len(counted) / ENTRIES))

        def kept(values: Sequence[float]) -> tuple[float, ...]:
            return thin([values[step] for step in counted if step < len(values)], cut, every)

        return Measurement(
            samples_per_step=samples_per_step,
            step_s=kept(self.step_s),
            data_wait_s=kept(self.wait_s),
            losses={name: kept(values) for name, values in self.losses.items()},
            warmup_steps=math.ceil(cut / every),
            round_steps=math.ceil(round_steps / every),
            memory=memory,
            phases_s=phases_s or {},
            reference_s=tuple(reference_s),
            telemetry=telemetry,
            parameters=parameters,
            flops_per_sample=flops_per_sample,
        )


def judge_warmup(step_s: Sequence[float], least: int, round_steps: int = 1) -> int:
    """Steps that are not steady state; at least one step is left, and whole rounds of `round_steps` if there is one.

    What has not settled by half of a run is no warm-up but a host that drifts: throwing most of the run away would
    pick a lucky stretch, so then only the first quarter goes.
    """
    count = len(step_s)
    cut = warmup_cut(step_s, minimum=min(least, max(0, count - 6)), round_steps=round_steps)
    if cut is None or cut > max(least, count // 2):
        too_few = count < least + MIN_ROUNDS * round_steps
        cut = max(min(least, count - 2), 0 if too_few and round_steps > 1 else count // 4)
    cut = max(0, min(cut, count - 1))
    if round_steps > 1 and count - cut >= round_steps:
        cut = count - (count - cut) // round_steps * round_steps
    return cut


def thin(values: Sequence[float], cut: int, every: int) -> tuple[float, ...]:
    """Means of `every` consecutive values, the warm-up (before `cut`) apart from the rest.

    An incomplete group at the end of the steady part is left out, so that every entry there weighs the same.
    """
    if every == 1:
        return tuple(values)
    warm = [_mean(values[i : min(i + every, cut)]) for i in range(0, cut, every)]
    last = cut + (len(values) - cut) // every * every
    return (*warm, *(_mean(values[i : i + every]) for i in range(cut, last, every)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _read_flags(flags: Sequence[bool | Tensor]) -> list[int]:
    """In one transfer for all of them."""
    on_device = [flag for flag in flags if isinstance(flag, Tensor)]
    read = iter(torch.stack(on_device).tolist() if on_device else ())
    return [int(next(read) if isinstance(flag, Tensor) else flag) for flag in flags]


def _read_losses(results: Sequence[StepResult]) -> dict[str, list[float]]:
    """Loss term -> one float per step, in one transfer for all of them. A term that is absent in a step is NaN."""
    names = list(dict.fromkeys(name for result in results for name in result.losses))
    if not names:
        return {}
    device = next(iter(results[-1].losses.values())).device
    if device.type == "cpu":  # nothing to wait for: one by one is cheaper than a table
        return {name: [float(result.losses.get(name, math.nan)) for result in results] for name in names}
    hole = torch.full((), math.nan, device=device)
    rows = [torch.stack([result.losses.get(name, hole).float() for name in names]) for result in results]
    table = torch.stack(rows).t().tolist()
    return dict(zip(names, table, strict=True))

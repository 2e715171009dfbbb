"""Mean power from an energy counter that moves in jumps."""

from __future__ import annotations

import pytest

from tuner.engine.telemetry import EnergyMeter


class Counter:
    """150 W, told every 0.3 s; looked at every 0.1 s."""

    def __init__(self, known: bool = True) -> None:
        self.now = 10.0
        self._known = known

    def joules(self) -> float | None:
        return 150.0 * 0.3 * int(self.now / 0.3) if self._known else None

    def watched(self, seconds: float) -> float | None:
        meter = EnergyMeter(self.joules, lambda: self.now)
        for _ in range(round(seconds / 0.1) + 1):
            meter.look()
            self.now += 0.1
        return meter.power_w


def test_power_is_joules_over_seconds_between_moves_of_the_counter() -> None:
    assert Counter().watched(3.0) == pytest.approx(150.0, rel=0.05)


def test_a_short_look_tells_nothing() -> None:
    assert Counter().watched(0.5) is None


def test_a_gpu_without_a_counter_tells_nothing() -> None:
    assert Counter(known=False).watched(3.0) is None

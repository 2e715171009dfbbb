"""What counts as a promise kept: inside the promised interval or faster, with the host's own drift taken out."""

from __future__ import annotations

import pytest

from tuner.contract.measurement import Interval
from tuner.contract.promise_check import PeakVerdict, PromiseCheck, Verdict, check_promise
from tuner.contract.tuned import Promise

PROMISE = Promise(
    samples_per_s=Interval(value=100.0, low=90.0, high=112.0),
    peak_bytes=1000,
    peak_low_bytes=950,
    peak_high_bytes=1050,
    hours=1.0,
    gain=Interval(value=1.3, low=1.2, high=1.4),
    reference_s=(0.010, 0.010, 0.010),
)
AS_THEN = (0.010,)


@pytest.mark.parametrize(
    ("reached", "verdict"),
    [
        (89.9, Verdict.BELOW),
        (90.0, Verdict.KEPT),
        (103.7, Verdict.KEPT),
        (112.0, Verdict.KEPT),
        (117.8, Verdict.ABOVE),
    ],
)
def test_the_promised_interval_decides(reached: float, verdict: Verdict) -> None:
    found = check_promise(PROMISE, reached, AS_THEN, 1000)
    assert found.verdict is verdict
    assert found.deviation == pytest.approx(reached / 100 - 1)
    assert found.deviation_beyond_drift == pytest.approx(reached / 100 - 1)


def test_a_slower_host_is_no_broken_promise_and_a_faster_one_keeps_none() -> None:
    slow = check_promise(PROMISE, 80.0, (0.0125,), 1000)
    assert slow.host_drift == pytest.approx(0.8)
    assert slow.verdict is Verdict.KEPT
    assert slow.deviation == pytest.approx(-0.2)
    assert slow.deviation_beyond_drift == pytest.approx(0.0)
    assert check_promise(PROMISE, 100.0, (0.008,), 1000).verdict is Verdict.BELOW


def test_without_reference_work_the_raw_figure_is_judged() -> None:
    found = check_promise(PROMISE, 80.0, (), 1000)
    assert (found.host_drift, found.deviation_beyond_drift, found.verdict) == (None, None, Verdict.BELOW)


@pytest.mark.parametrize(("peak", "verdict"), [(700, "within"), (1050, "within"), (1051, "above")])
def test_the_promised_peak_is_kept_up_to_its_error_bar(peak: int, verdict: str) -> None:
    found = check_promise(PROMISE, None, (), peak)
    assert (found.verdict, found.peak_verdict) == (None, PeakVerdict(verdict))
    assert found.peak_deviation == pytest.approx(peak / 1000 - 1)


def test_where_nothing_was_promised_nothing_is_judged() -> None:
    assert check_promise(None, 100.0, AS_THEN, 1000) == PromiseCheck()

"""The guides' advice: each symptom is seen, an ordinary noisy curve is left in peace, and nothing is told twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.contract.config import LossBands
from tuner.contract.probe import Event, NoticeEvent
from tuner.engine.advice import Adviser, Course, Symptom, loss_advice, overfitting

BANDS = LossBands(normal_low=0.001, normal_high=0.1, warn_low=1e-4, warn_high=1.0)
HORIZON = 100_000


def course(total: Sequence[float], *, share: float = 1.0, bands: LossBands | None = BANDS, earlier: str = "") -> Course:
    samples = [round(share * HORIZON * (i + 1) / len(total)) for i in range(len(total))]
    return Course(samples, total, HORIZON, 1e-4, bands, earlier)


def every_word(total: Sequence[float], share: float = 1.0) -> set[Symptom]:
    """All symptoms seen while the lines come in one by one."""
    whole = course(total, share=share)
    lines = range(1, len(total) + 1)
    seen = [loss_advice(Course(whole.samples[:n], total[:n], HORIZON, 1e-4, BANDS)) for n in lines]
    return {symptom for found in seen for symptom in found}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.0, 0.15), start=st.floats(0.2, 0.9), speed=st.floats(8, 15))
def test_a_normal_falling_curve_is_left_in_peace(seed: int, noise: float, start: float, speed: float) -> None:
    drawn = np.random.default_rng(seed).normal(size=150)
    total = [(start * math.exp(-i / speed) + 0.02) * math.exp(noise * drawn[i]) for i in range(150)]
    assert every_word(total) == set()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.0, 0.2))
def test_a_flat_noisy_curve_within_its_band_is_left_in_peace(seed: int, noise: float) -> None:
    drawn = np.random.default_rng(seed).normal(size=200)
    assert every_word([0.05 * math.exp(noise * drawn[i]) for i in range(200)]) == set()


@settings(max_examples=30, deadline=None)
@given(swing=st.floats(0.45, 0.9), period=st.sampled_from([2, 3]), seed=st.integers(0, 1000))
def test_swings_from_line_to_line_are_told(swing: float, period: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).normal(size=40)
    total = [0.05 * (1 + swing * (1 if i % period else -1)) * math.exp(0.05 * drawn[i]) for i in range(40)]
    text = loss_advice(course(total))[Symptom.OSCILLATION]
    assert "1e-04 -> 8e-05" in text or "0.0001 -> 8e-05" in text
    assert "raise the effective batch" in text


def test_swings_of_a_loss_that_still_falls_are_no_symptom() -> None:
    total = [math.exp(-i / 20) * (1.6 if i % 2 else 0.4) for i in range(40)]
    assert Symptom.OSCILLATION not in loss_advice(course(total, bands=None))


def test_a_loss_above_its_band_is_told_after_a_third_of_the_run_and_not_before() -> None:
    total = [0.3] * 30
    assert loss_advice(course(total, share=0.3)) == {}
    text = loss_advice(course(total, share=0.4))[Symptom.HIGH]
    assert "still 0.3 after 40,000 of 100,000 samples (normal is 0.001 to 0.1)" in text
    assert "0.0001 -> 0.00015" in text
    assert loss_advice(course([0.3] * 10 + [0.09] * 20, share=0.4)) == {}


def test_one_word_on_the_learning_rate_at_a_time() -> None:
    wild = [0.5 * (1.7 if i % 2 else 0.3) for i in range(40)]
    assert loss_advice(course(wild)).keys() == {Symptom.OSCILLATION}
    assert loss_advice(course([3.0 * value for value in wild])).keys() == {Symptom.TROUBLE}


def test_a_loss_below_its_band_names_a_checkpoint_that_exists() -> None:
    text = loss_advice(course([5e-5] * 10, earlier="checkpoints/step-000000050000"))[Symptom.BELOW]
    assert "overfitting" in text
    assert "take the earlier checkpoint checkpoints/step-000000050000, or a smaller model" in text
    assert "end the run earlier" in loss_advice(course([5e-5] * 10))[Symptom.BELOW]


@pytest.mark.parametrize("total", [[], [math.nan] * 30, [math.inf] * 30, [0.0] * 30, [0.3]])
def test_odd_courses_are_survived(total: list[float]) -> None:
    assert Symptom.OSCILLATION not in loss_advice(Course(range(len(total)), total, HORIZON, 1e-4, BANDS))


FALLING = [0.5 * math.exp(-i / 15) for i in range(40)]


def evaluations(*values: float) -> list[tuple[int, float]]:
    """At 30 %, 40 %, ... of the run."""
    return [(HORIZON * (3 + i) // 10, value) for i, value in enumerate(values)]


def test_overfitting_needs_a_steady_turn_for_the_worse_while_training_gets_better() -> None:
    assert "overfitting" in overfitting(course(FALLING), "f1", evaluations(0.8, 0.78, 0.75, 0.7), higher=True)
    assert "overfitting" in overfitting(course(FALLING), "nll", evaluations(0.7, 0.75, 0.78, 0.8), higher=False)
    for peaceful in ((0.8, 0.78, 0.79, 0.7), (0.7, 0.75, 0.78, 0.8), (0.8, 0.7), (0.8, 0.799, 0.798, 0.797)):
        assert not overfitting(course(FALLING), "f1", evaluations(*peaceful), higher=True)
    flat = course([0.05] * 40)
    assert not overfitting(flat, "f1", evaluations(0.8, 0.78, 0.75, 0.7), higher=True)


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def adviser(events: list[Event]) -> Adviser:
    return Adviser(HORIZON, 1e-4, BANDS, events.append)


def texts(events: Sequence[Event]) -> list[str]:
    assert all(isinstance(event, NoticeEvent) and event.level == "warning" for event in events)
    return [event.text for event in events if isinstance(event, NoticeEvent)]


def feed(adviser: Adviser, total: Callable[[int], float], lines: range) -> None:
    for i in lines:
        adviser.line((i + 1) * 500, total(i))


def test_a_symptom_is_told_once_and_again_only_after_it_was_over(adviser: Adviser, events: list[Event]) -> None:
    feed(adviser, lambda _: 0.3, range(100))
    assert len(texts(events)) == 1
    assert texts(events)[0].startswith("at 33,500 samples the loss is still 0.3")
    feed(adviser, lambda i: 0.3 if i % 7 else 0.05, range(100, 130))
    assert len(texts(events)) == 1, "a lucky line does not end a symptom"
    feed(adviser, lambda _: 0.05, range(130, 150))
    feed(adviser, lambda _: 0.3, range(150, 170))
    assert len(texts(events)) == 2


def test_a_resumed_run_judges_with_the_lines_of_before(adviser: Adviser, events: list[Event]) -> None:
    adviser.restore([500 * i for i in range(1, 80)], [0.3] * 79)
    adviser.line(40_000, 0.3)
    assert len(texts(events)) == 1

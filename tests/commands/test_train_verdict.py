"""The last lines of `tuner train`: faster than promised is no broken promise, whatever else is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.rows import MIB, WINNER, example_promise, measured
from tuner.commands.train_verdict import judge, verdict
from tuner.contract.measurement import Interval
from tuner.contract.probe import ProbeReply, TrainResult
from tuner.contract.production import ProductionRun
from tuner.contract.tuned import Promise, TunedConfig
from tuner.report.words import reality

REACHED = 270.0


def lines(promise: Promise) -> list[str]:
    result = judge(TunedConfig(config=WINNER, promise=promise), reply(), "run-1", Path("runs/one"))
    assert result is not None
    return verdict(result, promise)


def reply() -> ProbeReply:
    return ProbeReply(request_id="run-1", points=(), seconds=1.0, train_result=trained())


def trained() -> TrainResult:
    measurement = measured(WINNER, 90, steps=100)
    rate = measurement.samples_per_step / (sum(measurement.steady_step_s) / len(measurement.steady_step_s))
    scaled = tuple(step * rate / REACHED for step in measurement.step_s)
    return TrainResult(
        samples=1600,
        step=100,
        finished=True,
        reason="reached the horizon",
        elapsed_s=6.2,
        measurement=measurement.model_copy(update={"step_s": scaled, "reference_s": ()}),
    )


def promised(value: float, low: float, high: float) -> Promise:
    return example_promise().model_copy(update={"samples_per_s": Interval(value=value, low=low, high=high)})


@pytest.mark.parametrize(
    ("promise", "said", "word"),
    [
        (promised(246.0, 236.0, 256.0), "+9.8 % raw: the promise is kept and exceeded: faster than", "above"),
        (promised(260.0, 180.0, 376.0), "+3.8 % raw: the promise is kept", "kept"),
        (promised(300.0, 290.0, 310.0), "-10.0 % raw: the promise is NOT kept: slower than the lower end", "below"),
    ],
)
def test_the_promised_interval_decides_and_every_place_says_the_same(promise: Promise, said: str, word: str) -> None:
    (line,) = [line for line in lines(promise) if "deviation" in line]
    assert said in line
    run = ProductionRun(id="run-1", config=WINNER, promise=promise, result=trained())
    assert reality(run).verdict == word


def test_a_peak_above_its_error_bar_is_told() -> None:
    promise = example_promise()
    peak = trained().measurement.memory.gate_bytes
    over = promise.model_copy(update={"peak_bytes": peak - 20 * MIB, "peak_high_bytes": peak - 1})
    within = promise.model_copy(update={"peak_bytes": peak - 20 * MIB, "peak_high_bytes": peak})
    assert "ABOVE its error bar" in "\n".join(lines(over))
    assert "ABOVE" not in "\n".join(lines(within))

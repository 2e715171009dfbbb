"""The frame holds one line per probe with every figure a reader asks for."""

from __future__ import annotations

import math

import pytest

from tests.store.rows import BASELINE, WINNER, device, example_rows, example_spec, target
from tuner.contract.config import Precision
from tuner.contract.measurement import MemoryPeak
from tuner.contract.statistics import throughput
from tuner.report.figures import gate_ratios
from tuner.report.frame import counted_bytes, counted_limit_bytes, frame, same_config, variant
from tuner.report.words import answer, where

SPEC = example_spec()
ROWS = example_rows()


def test_every_probe_is_one_line() -> None:
    data = frame(ROWS, SPEC)
    assert list(data["number"]) == list(range(len(ROWS)))
    assert list(data["outcome"]) == [row.outcome.value for row in ROWS]
    assert list(data["message"]) == [row.message for row in ROWS]


def test_a_measured_line_has_its_figures() -> None:
    data = frame(ROWS, SPEC)
    line = data[data["request"] == "verify-winner"].iloc[0]
    row = next(row for row in ROWS if row.request_id == "verify-winner")
    assert row.measurement is not None
    interval = throughput(row.measurement)
    assert (line["samples_per_s"], line["low"], line["high"]) == (interval.value, interval.low, interval.high)
    assert line["peak_mib"] == pytest.approx(780)
    assert line["memory_used"] == pytest.approx(0.78)
    assert line["data_wait"] == pytest.approx(0.05)
    total = row.measurement.losses["total"]
    assert line["loss"] == pytest.approx(sum(total[-10:]) / 10)
    assert (line["micro_batch"], line["accumulation"], line["fused"]) == (16, 1, True)


def test_what_was_not_measured_is_missing_and_not_zero() -> None:
    data = frame(ROWS, SPEC)
    line = data[data["request"] == "verify-big"].iloc[0]
    assert all(math.isnan(line[key]) for key in ("samples_per_s", "low", "high", "peak_mib", "loss", "data_wait"))
    assert line["seconds"] == 1.0


def test_the_baseline_is_known_by_what_it_does() -> None:
    idle = BASELINE.loader.model_copy(update={"prefetch_factor": 8})
    assert same_config(BASELINE, BASELINE.model_copy(update={"loader": idle}))
    assert not same_config(BASELINE, WINNER)
    data = frame(ROWS, SPEC)
    assert int(data["is_baseline"].sum()) >= 7
    assert variant(WINNER) == "fp32 eager fused"


def test_no_probes_are_an_empty_frame() -> None:
    assert frame((), SPEC).empty


def test_under_a_hard_cap_on_a_cpu_growth_is_what_counts() -> None:
    capped = SPEC.model_copy(update={"memory_cap_bytes": 1000})
    peak = MemoryPeak(process_bytes=1460, base_bytes=1000)
    assert counted_bytes(peak, capped) == pytest.approx(460)
    assert counted_limit_bytes(capped) == pytest.approx(920)


def test_each_round_of_the_gate_is_one_ratio() -> None:
    ratios = list(gate_ratios(ROWS, SPEC))
    assert [pair for _, pair, _ in ratios] == list(range(6))
    assert all(1.3 < ratio < 1.55 for _, _, ratio in ratios)
    halved = [row for row in ROWS if row.request_id != "gate-a-3"]
    assert [pair for _, pair, _ in gate_ratios(halved, SPEC)] == [0, 1, 2, 4, 5]


def test_speed_is_never_claimed_for_a_machine_it_was_not_measured_on() -> None:
    assert "Transfer: unverified" in where(SPEC)
    own = target().model_copy(update={"kind": "cpu", "dtypes": (Precision.FP32,)})
    here = SPEC.model_copy(update={"target": own})
    assert "unverified" not in where(here)
    assert device().name in where(here)


def test_without_a_decision_the_answer_says_so() -> None:
    assert answer(SPEC, None, 7).headline == "No decision yet: 7 probes so far."

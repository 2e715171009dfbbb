"""`tuner train --workload` trains the baseline itself, and says at the end what was learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RunTuner
from tuner.commands.train_verdict import quality
from tuner.contract.config import OptimizerConfig, QualityConfig, RunConfig
from tuner.contract.result import TrainResultJson
from tuner.contract.workload import Trivial

JUDGED = "tests.commands.judged_toy:JudgedToy"


def test_the_baseline_is_trained_and_held_against_no_learning(tuner: RunTuner, tmp_path: Path) -> None:
    words = ("train", "--workload", JUDGED, "-o", "samples=256", "--out", "run")
    ran = tuner(*words, "--max-samples", "640", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["samples"] == 640
    assert result["finished"]
    reached, trivial = result["metrics"]["valid_fit"], result["trivial"]["valid_fit"]
    assert trivial["text"] == "predicting zero"
    assert reached < trivial["value"]
    assert f"quality   valid_fit {reached:.4g} against {trivial['value']:.4g} (predicting zero): better" in ran.err
    assert result["best"]["value"] <= reached + 1e-9
    assert 0 < result["best"]["samples"] <= 640
    assert "best      valid_fit" in ran.err

    more = tuner(*words, "--max-samples", "800", "--json")
    assert more.code == 0, more.err
    assert more.json["resumed_from"] == 640


def test_stopped_by_the_clock_it_says_the_same_words_again(tuner: RunTuner, tmp_path: Path) -> None:
    ran = tuner("train", "-w", "tests.toys:Toy", "-o", "sleep_s=0.05", "--max-minutes", "0.01", "--out", "a run")
    assert ran.code == 75, ran.err
    words = "--workload tests.toys:Toy --option sleep_s=0.05 --out 'a run' --max-minutes 0.01"
    assert f"go on with: tuner train {words}" in ran.err


@pytest.mark.parametrize(
    ("value", "trivial", "said"),
    [
        (0.76, Trivial(value=0.5, text="chance"), "macro_auc 0.76 against 0.5 (chance): better"),
        (0.5, Trivial(value=0.5, text="chance"), "macro_auc 0.5 against 0.5 (chance): NOT better"),
        (0.4, Trivial(value=0.5, text="mean", higher_is_better=False), "macro_auc 0.4 against 0.5 (mean): better"),
        (float("nan"), Trivial(value=0.5, text="chance"), "macro_auc nan against 0.5 (chance): NOT better"),
        (0.76, None, "macro_auc 0.76"),
    ],
)
def test_what_is_said_of_a_metric(value: float, trivial: Trivial | None, said: str) -> None:
    assert said_of({"macro_auc": value}, trivial)[0] == f"  quality   {said}"


@pytest.mark.parametrize(
    ("value", "error", "higher", "said"),
    [
        (0.514, 0.048, True, "macro_auc 0.514 (standard error 0.048) against 0.5 (chance): NOT better, it is within 2"),
        (0.62, 0.048, True, "macro_auc 0.62 (standard error 0.048) against 0.5 (chance): better"),
        (0.45, 0.048, False, "macro_auc 0.45 (standard error 0.048) against 0.5 (chance): NOT better, it is within 2"),
        (0.3, 0.048, False, "macro_auc 0.3 (standard error 0.048) against 0.5 (chance): better"),
        (0.3, 0.048, True, "macro_auc 0.3 (standard error 0.048) against 0.5 (chance): NOT better"),
        (0.9, float("nan"), True, "macro_auc 0.9 (standard error nan) against 0.5 (chance): NOT better"),
        (0.514, 0.0, True, "macro_auc 0.514 (standard error 0) against 0.5 (chance): better"),
    ],
)
def test_what_lies_within_its_noise_is_not_called_better(value: float, error: float, higher: bool, said: str) -> None:
    trivial = Trivial(value=0.5, text="chance", higher_is_better=higher)
    first, *rest = said_of({"macro_auc": value, "macro_auc_se": error}, trivial)
    assert first.removesuffix(" standard errors") == f"  quality   {said}"
    assert not any("macro_auc_se" in line for line in rest)


def test_an_error_that_belongs_to_no_figure_is_a_figure() -> None:
    assert said_of({"macro_auc": 0.7, "other_se": 0.1}, None)[1] == "  quality   other_se 0.1"


def said_of(metrics: dict[str, float], trivial: Trivial | None) -> list[str]:
    result = TrainResultJson(
        run="1",
        out_dir="run",
        samples=100,
        finished=True,
        reason="",
        resumed_from=0,
        elapsed_s=1.0,
        samples_per_s=None,
        promised_samples_per_s=None,
        host_drift=None,
        deviation=None,
        deviation_beyond_drift=None,
        peak_bytes=1,
        promised_peak_bytes=None,
        peak_deviation=None,
        verdict=None,
        peak_verdict=None,
        losses={},
        metrics=metrics,
        trivial={"macro_auc": trivial} if trivial else {},
        best={"value": 0.8, "samples": 12_800},
    )
    config = RunConfig(
        workload="gpt2",
        micro_batch_size=1,
        optimizer=OptimizerConfig(lr=0.1),
        horizon_samples=1,
        quality=QualityConfig(metric="macro_auc"),
    )
    *lines, best = quality(result, config)
    assert "macro_auc 0.8 at 12,800 samples" in best
    return lines

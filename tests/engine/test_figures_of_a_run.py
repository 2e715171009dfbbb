"""What a run says of its model: assessments, raw against averaged weights, trivial values, and the table at the end."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.engine_toys import answer, toy_config
from tests.engine.judged_toys import Judged
from tests.toys import Toy
from tuner.contract.config import Cadence, EmaConfig, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, NoticeEvent, PhaseEvent, PointReply, ProbeKind, TrainPlan, TrainResult
from tuner.contract.workload import Trivial
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.scores import write_quality

CADENCE = Cadence(log_samples=64, evaluate_samples=128, sample_samples=256, checkpoint_samples=128)


def config(**changes: Any) -> RunConfig:
    settings = {"horizon_samples": 512, "cadence": CADENCE, "ema": EmaConfig(half_life_samples=100), **changes}
    return toy_config({"samples": 128}).model_copy(update=settings)


def trained(run: RunConfig, out: Path, workload: type[Toy] = Judged, **plan: Any) -> list[Event]:
    return answer(ProbeKind.TRAIN, run, workload=workload, train=TrainPlan(out_dir=str(out), **plan))


def result_of(events: list[Event]) -> TrainResult:
    failed = [event.message for event in events if isinstance(event, PointReply) and event.outcome is not Outcome.OK]
    assert not failed
    (result,) = [event for event in events if isinstance(event, TrainResult)]
    return result


def told(events: list[Event], level: str = "info") -> list[str]:
    return [event.text for event in events if isinstance(event, NoticeEvent) and event.level == level]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as source:
        return list(csv.DictReader(source))


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = Checkpointer(out / "checkpoints").latest()
    assert state is not None
    found: dict[str, torch.Tensor] = state["model"]
    return found


def test_figures_of_both_kinds_are_kept_told_and_held_against_no_learning(tmp_path: Path) -> None:
    events = trained(config(), tmp_path)
    result = result_of(events)
    assert result.metrics.keys() == {"valid_fit", "sharpness"}
    assert result.trivial["valid_fit"].text == "predicting zero"
    assert [row["samples"] for row in table(tmp_path / "evaluations.csv")] == ["128", "256", "384", "512"]
    assert [row["samples"] for row in table(tmp_path / "assessments.csv")] == ["256", "512"]
    assert (tmp_path / "samples" / "000000000512" / "assessed.txt").exists()
    assert "assess" in [event.phase for event in events if isinstance(event, PhaseEvent)]
    rows = {row["metric"]: row for row in table(tmp_path / "quality.csv")}
    assert (rows["valid_fit"]["higher_is_better"], rows["valid_fit"]["better"]) == ("no", "yes")
    assert (rows["sharpness"]["trivial"], rows["sharpness"]["how"]) == ("0.9", "the data itself")
    assert (rows["sharpness"]["value"], rows["sharpness"]["better"]) == ("0.5", "no")
    for name in ("quality.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_judging_changes_nothing_in_the_training(tmp_path: Path) -> None:
    trained(config(), tmp_path / "judged")
    trained(config(cadence=Cadence()), tmp_path / "plain", Toy)
    judged, plain = weights(tmp_path / "judged"), weights(tmp_path / "plain")
    assert all(torch.equal(judged[name], plain[name]) for name in plain)


def test_the_raw_weights_are_evaluated_beside_the_averaged_ones(tmp_path: Path) -> None:
    slow = EmaConfig(half_life_samples=100_000, warmup_ratio=0.0, evaluate_raw=True)
    result = result_of(trained(config(ema=slow), tmp_path))
    assert result.metrics["raw_valid_fit"] < 0.8 * result.metrics["valid_fit"]
    last = table(tmp_path / "evaluations.csv")[-1]
    assert float(last["raw_valid_fit"]) == result.metrics["raw_valid_fit"]
    rows = {row["metric"]: row for row in table(tmp_path / "quality.csv")}
    assert rows["raw_valid_fit"]["trivial"] == rows["valid_fit"]["trivial"]


def test_an_assessment_or_a_sample_that_fails_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    class Clumsy(Judged):
        def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
            raise ValueError("no classifier here")

        def sample(self, model: nn.Module, out_dir: Path, seed: int) -> list[Path]:
            raise RuntimeError("cannot draw")

        def trivial(self) -> Mapping[str, Trivial]:
            raise KeyError("mean")

    events = trained(config(), tmp_path, Clumsy)
    result = result_of(events)
    assert (result.finished, result.trivial, set(result.metrics)) == (True, {}, {"valid_fit"})
    warnings = "\n".join(told(events, "warning"))
    for text in ("ValueError: no classifier here", "RuntimeError: cannot draw", "trivial failed: KeyError"):
        assert text in warnings


def test_a_resumed_run_writes_no_row_twice_and_knows_the_figures_of_before(tmp_path: Path) -> None:
    trained(config(), tmp_path, max_samples=300)
    second = result_of(trained(config(), tmp_path))
    samples = [int(row["samples"]) for row in table(tmp_path / "evaluations.csv")]
    assert samples == [128, 256, 304, 384, 512]
    again = result_of(trained(config(), tmp_path))
    assert again.metrics == second.metrics
    assert again.resumed_from == 512


def test_an_evaluation_lost_with_a_kill_is_made_up_for(tmp_path: Path) -> None:
    """The checkpoint at a border is written before the evaluation that is due there."""
    trained(config(), tmp_path, max_samples=256)
    lines = (tmp_path / "evaluations.csv").read_text().splitlines(keepends=True)
    (tmp_path / "evaluations.csv").write_text("".join(lines[:-1]))
    trained(config(), tmp_path)
    assert [row["samples"] for row in table(tmp_path / "evaluations.csv")] == ["128", "256", "384", "512"]


def test_a_new_figure_gets_its_column_in_the_file_of_an_older_run(tmp_path: Path) -> None:
    raw = EmaConfig(half_life_samples=100, evaluate_raw=True)

    class More(Judged):
        def evaluate(self, model: nn.Module, batches: Any) -> Mapping[str, float]:
            return {**super().evaluate(model, batches), "more": 7.0}

    trained(config(ema=raw), tmp_path, max_samples=256)
    trained(config(ema=raw), tmp_path, More)
    rows = table(tmp_path / "evaluations.csv")
    assert [row["more"] for row in rows] == ["", "", "7", "7"]
    assert all(row["valid_fit"] and row["raw_valid_fit"] for row in rows)


def test_the_table_does_not_call_noise_better(tmp_path: Path) -> None:
    trivial = {"match": Trivial(value=0.5, text="chance"), "raw_match": Trivial(value=0.5, text="chance")}
    figures = {"match": 0.514, "match_se": 0.048, "raw_match": 0.614, "raw_match_se": 0.048}
    write_quality(figures, trivial, tmp_path / "quality.csv")
    assert [row["better"] for row in table(tmp_path / "quality.csv")] == ["no", "", "yes", ""]


@pytest.mark.parametrize(
    ("value", "higher", "verdict"), [(0.6, True, "yes"), (0.6, False, "no"), (math.nan, True, "no")]
)
def test_the_table_says_what_no_learning_would_give(tmp_path: Path, value: float, higher: bool, verdict: str) -> None:
    trivial = {"auc": Trivial(value=0.5, text="chance", higher_is_better=higher)}
    write_quality({"auc": value, "untold": 1.0}, trivial, tmp_path / "quality.csv")
    auc, untold = table(tmp_path / "quality.csv")
    assert (auc["trivial"], auc["how"], auc["better"]) == ("0.5", "chance", verdict)
    assert untold["better"] == ""

"""The quality metric: the best checkpoint is kept, a run that gets no better ends, and a resume changes neither."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.engine.engine_toys import replies
from tests.engine.judged_toys import Judged, scripted
from tests.engine.test_figures_of_a_run import config, result_of, told, trained
from tests.toys import Toy
from tuner.contract.config import Cadence, QualityConfig, QualityWeights, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import SAMPLES_REACHED
from tuner.contract.workload import Batch, Trivial
from tuner.engine.checkpoint import BEST, Checkpointer, load

CADENCE = Cadence(log_samples=64, evaluate_samples=64, checkpoint_samples=128)


def run(patience: int = 0, metric: str = "score", **changes: Any) -> RunConfig:
    settings = {"metric": metric, "patience": patience, **changes}
    return config(cadence=CADENCE, quality=QualityConfig(**settings))


def best_of(out: Path) -> dict[str, Any]:
    about = Checkpointer(out / "checkpoints").best()
    assert about is not None
    return about


def test_the_best_is_kept_beside_the_last_ones_and_can_be_loaded(tmp_path: Path) -> None:
    result = result_of(trained(run(), tmp_path, scripted(0.1, 0.5, 0.3, 0.8, 0.7, 0.6, 0.2, 0.1)))
    assert result.best == {"value": 0.8, "samples": 256}
    assert load(tmp_path / "checkpoints" / BEST)["samples"] == 256
    names = [path.name for path in Checkpointer(tmp_path / "checkpoints").all()]
    assert names == ["step-000000000512", "step-000000000384"]
    assert (result.finished, result.reason) == (True, "reached the horizon")


def test_lower_can_be_better_and_a_small_gain_does_not_count(tmp_path: Path) -> None:
    lower = run(higher_is_better=False, min_delta=0.1)
    result = result_of(trained(lower, tmp_path, scripted(0.9, 0.5, 0.45, 0.41, 0.6, 0.7, 0.8, 0.9)))
    assert result.best == {"value": 0.5, "samples": 128}


def test_a_run_that_gets_no_better_ends_early_and_is_finished(tmp_path: Path) -> None:
    workload = scripted(0.1, 0.5, 0.4, 0.3, 0.2, 0.9)
    result = result_of(trained(run(patience=3), tmp_path, workload))
    assert (result.finished, result.samples) == (True, 320)
    assert result.reason == "ended early: score has not been better than 0.5 (at 128 samples) in 3 evaluations"
    again = result_of(trained(run(patience=3), tmp_path, workload))
    assert (again.finished, again.samples, again.best) == (True, 320, {"value": 0.5, "samples": 128})
    longer = result_of(trained(run(patience=6), tmp_path, workload))
    assert (longer.samples, longer.best["value"]) == (512, 0.9)


def test_patience_goes_on_counting_over_a_resume(tmp_path: Path) -> None:
    workload = scripted(0.5, 0.4, 0.3, 0.2, 0.9)
    trained(run(patience=4), tmp_path, workload, max_samples=192)
    result = result_of(trained(run(patience=4), tmp_path, workload))
    assert (result.samples, result.reason.split(":")[0]) == (512, "reached the horizon")
    other = scripted(0.5, 0.4, 0.3, 0.2, 0.1, 0.9)
    trained(run(patience=4), tmp_path / "other", other, max_samples=192)
    result = result_of(trained(run(patience=4), tmp_path / "other", other))
    assert (result.samples, result.reason.split(":")[0]) == (320, "ended early")


def test_a_part_done_again_never_overwrites_a_better_checkpoint(tmp_path: Path) -> None:
    """Killed after its best moment, before the next checkpoint: the part done again turns out worse."""
    trained(run(), tmp_path, scripted(0.1, 0.2, 0.9), max_samples=192)
    for newer in Checkpointer(tmp_path / "checkpoints").all()[:1]:
        newer.rename(tmp_path / "lost")
    result = result_of(trained(run(), tmp_path, scripted(0.3, 0.8, 0.4)))
    assert result.resumed_from == 128
    assert result.best == {"value": 0.9, "samples": 192}
    assert load(tmp_path / "checkpoints" / BEST)["samples"] == 192


def test_a_damaged_best_or_one_of_another_run_is_not_believed(tmp_path: Path) -> None:
    trained(run(), tmp_path, scripted(0.9), max_samples=64)
    weights = tmp_path / "checkpoints" / BEST / "tensors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    result = result_of(trained(run(), tmp_path, scripted(0.95, 0.5)))
    assert result.best == {"value": 0.95, "samples": 128}
    for step in Checkpointer(tmp_path / "checkpoints").all():
        step.rename(tmp_path / step.name)
    other = run().model_copy(update={"seed": 5})
    assert result_of(trained(other, tmp_path, scripted(0.3))).best == {"value": 0.3, "samples": 64}


def test_a_kill_while_the_best_is_replaced_loses_neither(tmp_path: Path) -> None:
    trained(run(), tmp_path, scripted(0.9), max_samples=64)
    (tmp_path / "checkpoints" / BEST).rename(tmp_path / "checkpoints" / ".step-best.old")
    assert best_of(tmp_path)["value"] == 0.9
    assert (tmp_path / "checkpoints" / BEST).is_dir()


@pytest.mark.parametrize("workload", [scripted(0.5), Judged])
def test_an_unknown_metric_is_refused_with_the_known_ones_before_the_training(tmp_path: Path, workload: Any) -> None:
    (reply,) = replies(trained(run(metric="auc"), tmp_path, workload))
    assert (reply.outcome, reply.values[SAMPLES_REACHED]) == (Outcome.BAD_INPUT, 0)
    assert "quality.metric: 'auc' is not among this workload's figures" in reply.message
    known = "sharpness, valid_fit" if workload is Judged else "other, score"
    assert reply.message.endswith(f"known: {known}")


def test_the_figures_of_the_weights_as_trained_are_named_where_they_decide(tmp_path: Path) -> None:
    (reply,) = replies(trained(run(metric="auc", weights=QualityWeights.RAW), tmp_path))
    assert (reply.outcome, reply.values[SAMPLES_REACHED]) == (Outcome.BAD_INPUT, 0)
    assert reply.message.endswith("figures of the weights as trained (quality.weights: raw); known: valid_fit")


class Late(Judged):
    """No figure is known beforehand: none has a trivial value, and one batch has too few rows for `auc`."""

    def trivial(self) -> Mapping[str, Trivial]:
        return {}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        rows = sum(len(batch["x"]) for batch in batches)
        return {"accuracy": 0.5, **({"auc": 0.5} if rows > 8 else {})}


@pytest.mark.parametrize("metric", ["accuracy", "auc", "sharpness"])
def test_a_figure_that_shows_late_is_no_unknown_one(tmp_path: Path, metric: str) -> None:
    result = result_of(trained(run(metric=metric), tmp_path, Late, max_samples=64))
    assert result.samples == 64


class FailsAtFirst(Toy):
    """Its figures cannot be made of a model that has learned nothing."""

    tries = 0

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        self.tries += 1
        if self.tries <= 2:
            raise ValueError("no positives yet")
        return {"score": 0.5}


def test_an_evaluation_that_fails_before_the_training_ends_nothing(tmp_path: Path) -> None:
    assert result_of(trained(run(), tmp_path, FailsAtFirst, max_samples=64)).samples == 64


def test_a_metric_that_would_never_be_measured_is_refused_at_once(tmp_path: Path) -> None:
    blind = config(cadence=Cadence(), quality=QualityConfig(metric="valid_fit"))
    (reply,) = replies(trained(blind, tmp_path))
    assert reply.outcome is Outcome.BAD_INPUT
    assert "cadence.evaluate_samples" in reply.message


def test_an_assessed_figure_can_be_the_metric(tmp_path: Path) -> None:
    assessed = config(quality=QualityConfig(metric="sharpness", patience=2), horizon_samples=2048)
    result = result_of(trained(assessed, tmp_path))
    assert result.best == {"value": 0.5, "samples": 256}
    assert (result.finished, result.samples) == (True, 768)


def test_overfitting_is_told_with_the_best_checkpoint(tmp_path: Path) -> None:
    falling = scripted(0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    cadence = Cadence(log_samples=16, evaluate_samples=64)
    events = trained(config(cadence=cadence, quality=QualityConfig(metric="score")), tmp_path, falling)
    (text,) = [text for text in told(events, "warning") if "overfitting" in text]
    assert "score has got worse in 3 evaluations in a row (0.9 at 128 samples, 0.6 now)" in text
    assert "take the earlier checkpoint checkpoints/best (score 0.9 at 128" in text

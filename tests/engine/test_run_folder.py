"""What a run's folder tells: its documents, status.json for who watches from outside, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine_toys import make_request, replies, start_apart
from tests.engine.judged_toys import Judged, scripted
from tests.engine.test_figures_of_a_run import config, result_of, table, told, trained
from tests.store.rows import example_promise
from tests.toys import Toy
from tuner.commands.run_state import read_status
from tuner.commands.setup import counted_in_samples
from tuner.contract.base import parse
from tuner.contract.config import Cadence, QualityConfig, QualityWeights, RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import EVENT, Event, PhaseEvent, ProbeKind, TrainEvent, TrainPlan
from tuner.contract.production import LiveStatus, RunStatus
from tuner.engine import tasks
from tuner.engine.checkpoint import BEST, Checkpointer
from tuner.export.tuned import load


def status_of(out: Path) -> LiveStatus:
    found = read_status(out)
    assert found is not None
    return found


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_folder_says_what_ran_where_and_what_was_promised(tmp_path: Path) -> None:
    run, promise = config(cadence=Cadence(log_samples=64)), example_promise()
    trained(run, tmp_path, promise=promise, run_id="first", command="tuner train --config best.yaml")
    assert load(tmp_path / "config.yaml").config == run
    assert "# tuner train --config best.yaml" in (tmp_path / "config.yaml").read_text()
    assert json.loads((tmp_path / "promise.json").read_text())["peak_bytes"] == promise.peak_bytes
    place = json.loads((tmp_path / "environment.json").read_text())
    assert place["device"] == "cpu"
    assert place["packages"]["torch"] == place["torch"]
    assert Path(place["code"]["folder"]).name == "tests"
    assert (place["run"], place["earlier"]) == ("first", [])
    trained(run.model_copy(update={"horizon_samples": 640}), tmp_path, run_id="second")
    place = json.loads((tmp_path / "environment.json").read_text())
    assert (place["run"], place["resumed_from"]) == ("second", 512)
    assert [earlier["run"] for earlier in place["earlier"]] == ["first"]
    assert not (tmp_path / "promise.json").exists()


def test_status_follows_the_run_and_holds_the_promise_against_it(tmp_path: Path) -> None:
    seen: dict[str, LiveStatus] = {}

    def watch(event: Event) -> None:
        if isinstance(event, PhaseEvent) and (tmp_path / "status.json").exists():
            seen.setdefault(event.phase, status_of(tmp_path))

    plan = TrainPlan(out_dir=str(tmp_path), promise=example_promise(), run_id="abc", command="again")
    tasks.run(make_request(ProbeKind.TRAIN, config(), train=plan), Judged, watch)
    assert {"measure", "evaluate", "sample", "checkpoint"} <= seen.keys()
    during = seen["sample"]
    assert (during.status, during.phase, during.run) == (RunStatus.RUNNING, "sample", "abc")
    assert during.writer.alive()
    assert during.samples == 256
    ended = status_of(tmp_path)
    assert (ended.status, ended.reason, ended.samples) == (RunStatus.FINISHED, "reached the horizon", 512)
    assert (ended.goal_samples, ended.step, ended.command) == (512, 32, "again")
    assert ended.checkpoint == "checkpoints/step-000000000512"
    assert ended.metrics.keys() == {"valid_fit", "sharpness"}
    assert ended.losses["total"] is not None
    assert ended.peak_bytes > 0
    assert ended.mean_samples_per_s is not None
    promised = example_promise().samples_per_s.value
    assert ended.deviation == pytest.approx(ended.mean_samples_per_s / promised - 1)
    assert ended.deviation is not None
    assert ended.host_drift is not None
    assert ended.deviation_beyond_drift == pytest.approx((ended.deviation + 1) / ended.host_drift - 1)


def test_a_writer_that_was_killed_is_recognised_and_nothing_stands_twice_after_the_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = config(horizon_samples=1024, cadence=Cadence(log_samples=32, evaluate_samples=128, checkpoint_samples=128))
    kill_after_line(9, make_request(ProbeKind.TRAIN, long, train=TrainPlan(out_dir=str(out))), tmp_path)
    left = status_of(out)
    assert left.status is RunStatus.RUNNING
    assert left.writer.alive() is False
    with (out / "metrics.jsonl").open("a") as torn:
        torn.write('{"kind": "log", "samp')
    result = result_of(trained(long, out, Toy))
    assert result.resumed_from >= 128
    rows = lines_of(out)
    places = [(row["kind"], row["samples"]) for row in rows]
    assert len(places) == len(set(places))
    assert [row["samples"] for row in rows if row["kind"] == "log"] == list(range(32, 1025, 32))
    assert [row["total"] for row in rows if row["kind"] == "log"] == totals(out)
    assert [row["samples"] for row in rows if row["kind"] == "evaluate"] == list(range(128, 1025, 128))
    assert (status_of(out).status, status_of(out).resumed_from) == (RunStatus.FINISHED, result.resumed_from)


def kill_after_line(lines: int, request: Any, folder: Path) -> None:
    process = start_apart(request, folder)
    assert process.stdout is not None
    with process.stdout as out:
        for line in out:
            if isinstance(EVENT.validate_json(line), TrainEvent) and (lines := lines - 1) == 0:
                process.kill()
                process.wait(timeout=20)
                return
    raise AssertionError("the run ended before it was killed")


def totals(out: Path) -> list[float]:
    return [float(row["total"]) for row in table(out / "metrics.csv")]


def test_a_line_written_by_a_stop_is_taken_back_in_both_files(tmp_path: Path) -> None:
    sparse = config(cadence=Cadence(log_samples=96))
    trained(sparse, tmp_path, Toy, max_samples=160)
    assert [row["samples"] for row in lines_of(tmp_path)] == [96, 160]
    trained(sparse, tmp_path, Toy)
    logged = [int(row["samples"]) for row in table(tmp_path / "metrics.csv")]
    assert logged == [row["samples"] for row in lines_of(tmp_path)] == [96, 192, 288, 384, 480, 512]


def test_a_run_that_fails_or_is_stopped_says_so_in_its_status(tmp_path: Path) -> None:
    failing = config(options={"samples": 128, "fail": "raise", "fail_call": 20})
    trained(failing, tmp_path / "fails", Toy)
    ended = status_of(tmp_path / "fails")
    assert ended.status is RunStatus.FAILED
    assert "the toy was told to fail" in ended.reason
    trained(config(), tmp_path / "stops", max_seconds=1e-6)
    assert status_of(tmp_path / "stops").status is RunStatus.STOPPED


def test_a_refused_second_run_leaves_the_first_ones_papers_alone(tmp_path: Path) -> None:
    trained(config(), tmp_path, run_id="mine")
    papers = ("status.json", "config.yaml", "environment.json", "metrics.jsonl")
    before = {name: (tmp_path / name).read_text() for name in papers}
    (reply,) = replies(trained(config(seed=9), tmp_path, run_id="other"))
    assert "checkpoints of another run" in reply.message
    assert {name: (tmp_path / name).read_text() for name in papers} == before


def test_a_status_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "status.json" / "in the way").mkdir(parents=True)
    events = trained(config(), tmp_path)
    assert result_of(events).finished
    (warning,) = [text for text in told(events, "warning") if "status.json" in text]
    assert "the run goes on" in warning


def test_a_cadence_in_epochs_is_one_in_samples_of_the_split(tmp_path: Path) -> None:
    by_epoch = Cadence(log_samples=64, evaluate_epochs=1, checkpoint_epochs=0.5, sample_epochs=2)
    result_of(trained(config(cadence=by_epoch), tmp_path))
    assert [row["samples"] for row in table(tmp_path / "evaluations.csv")] == ["128", "256", "384", "512"]
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert len(Checkpointer(tmp_path / "checkpoints").all()) == 2
    assert load(tmp_path / "config.yaml").config.cadence == by_epoch
    again = trained(config(cadence=by_epoch, horizon_samples=640), tmp_path)
    assert result_of(again).resumed_from == 512
    assert not any("cadence" in text for text in told(again, "warning"))


def test_a_study_forecasts_and_ships_a_cadence_in_samples() -> None:
    baseline = config(cadence=Cadence(evaluate_epochs=0.5))
    found = counted_in_samples(baseline, Toy({"samples": 200}).info())
    assert found.cadence == Cadence(evaluate_samples=100)


def test_a_cadence_in_both_units_is_refused() -> None:
    both = {"evaluate_samples": 512, "evaluate_epochs": 1.5}
    with pytest.raises(ConfigError, match=r"evaluate_samples \(512\) and evaluate_epochs \(1.5\) are both given") as no:
        parse(Cadence, both, "study.yaml")
    assert "set one of them" in str(no.value)


def judged_raw(metric: str = "score") -> RunConfig:
    cadence = Cadence(log_samples=64, evaluate_samples=64, checkpoint_samples=128)
    return config(cadence=cadence, quality=QualityConfig(metric=metric, weights=QualityWeights.RAW))


def test_the_raw_weights_can_decide_which_checkpoint_is_the_best(tmp_path: Path) -> None:
    # each evaluation asks twice: the averaged weights first, then the raw ones
    workload = scripted(0.9, 0.1, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.1)
    result = result_of(trained(judged_raw(), tmp_path, workload))
    assert result.best == {"value": 0.7, "samples": 128}
    about = Checkpointer(tmp_path / "checkpoints").best()
    assert about is not None
    assert about["metric"] == "raw_score"
    assert (tmp_path / "checkpoints" / BEST).is_dir()


def test_a_generated_figure_cannot_be_one_of_the_raw_weights(tmp_path: Path) -> None:
    (reply,) = replies(trained(judged_raw("sharpness"), tmp_path, Judged))
    assert reply.outcome is Outcome.BAD_INPUT
    assert "quality.weights: raw" in reply.message
    assert reply.message.endswith("known: valid_fit")


def test_without_the_package_tensorboard_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    (reply,) = replies(trained(config(), tmp_path, tensorboard=True))
    assert "--tensorboard" in reply.message
    assert "pip install tensorboard" in reply.message


class Painter(Judged):
    """Its sample is a picture."""

    def sample(self, model: Any, out_dir: Path, seed: int) -> Sequence[Path]:
        from PIL import Image

        path = out_dir / "grid.png"
        Image.new("RGB", (8, 6), (seed % 255, 20, 200)).save(path)
        return [path]


def test_tensorboard_shows_curves_figures_and_pictures_and_nothing_twice(tmp_path: Path) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("not run: tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(config(), tmp_path, Painter, tensorboard=True, max_samples=320)
    newest = Checkpointer(tmp_path / "checkpoints").all()[0]
    assert newest.name == "step-000000000320"
    newest.rename(tmp_path / "lost")  # as after a kill: the part since the checkpoint before is done again
    events = trained(config(), tmp_path, Painter, tensorboard=True)
    assert result_of(events).resumed_from == 256
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    steps = {tag: [point.step for point in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert steps["loss/total"] == steps["optimizer/lr"] == steps["speed/samples_per_s"] == list(range(64, 513, 64))
    assert steps["speed/data_wait"] == steps["loss/total"]
    assert steps["validation/valid_fit"] == [128, 256, 384, 512]
    values = [point.value for point in board.Scalars("loss/total")]
    assert values == pytest.approx(totals(tmp_path), rel=1e-6)
    assert [picture.step for picture in board.Images("samples/grid")] == [256, 512]
    assert (board.Images("samples/grid")[0].width, board.Images("samples/grid")[0].height) == (8, 6)

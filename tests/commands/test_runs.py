"""`tuner runs`: promise beside reality, a run that died is recognised, one run with its curve."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RunTuner, tuner_environment
from tests.store.rows import BASELINE, WINNER, example_promise, example_result
from tuner.commands import runs, train_words
from tuner.commands.run_state import close_status, marked, read_status, state_of
from tuner.commands.runs import cells, curve_of, curve_text, line_of
from tuner.commands.sparkline import sparkline
from tuner.commands.train_words import TrainWords, check_words
from tuner.contract.errors import ConfigError
from tuner.contract.liveness import Writer
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeReply
from tuner.contract.production import LiveStatus, ProductionRun, RunStatus
from tuner.store.store import StudyStore

SLOW = ("train", "-w", "tests.toys:Toy", "-o", "samples=256", "-o", "sleep_s=0.01", "--out", "run")


def test_runs_are_listed_with_what_became_of_them_and_a_killed_one_is_told(
    tuner: RunTuner, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/studies/studies.db"
    first = tuner(*SLOW, "--max-samples", "640", "--json")
    assert first.code == 0, first.err
    runs.run(None, None, 20, url, as_json=True)
    (line,) = json.loads(capsys.readouterr().out)["runs"]
    assert (line["run"], line["status"], line["samples"]) == (first.json["run"], "finished", 640)
    assert line["samples_per_s"] == pytest.approx(first.json["samples_per_s"]["value"])
    assert line["promised_samples_per_s"] is None

    killed = kill_while_it_trains(tmp_path, cache)
    runs.run(None, "toy", 20, url, as_json=False)
    listed = capsys.readouterr().out
    assert f"{killed:<12}  died" in listed
    assert "goes on with its own command" in listed
    runs.run(killed[:8], None, 20, url, as_json=False)
    told = capsys.readouterr().out
    assert "its process is gone without a word" in told
    words = "--workload tests.toys:Toy --option samples=256 --option sleep_s=0.01 --out run"
    assert f"go on     cd {tmp_path} && tuner train {words}" in told
    assert "▁" in told
    runs.run(killed, None, 20, url, as_json=True)
    whole = json.loads(capsys.readouterr().out)
    assert (whole["status"], whole["resumable"]) == ("died", True)
    assert [point["samples"] for point in whole["curve"]][:2] == [256, 512]
    assert whole["config"]["workload"] == "tests.toys:Toy"
    with pytest.raises(ConfigError, match=f"the newest are: {killed}"):
        runs.run("nope", None, 20, url, as_json=False)


def test_without_runs_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/studies/studies.db"
    StudyStore.open(url).close()
    runs.run(None, "gpt2", 20, url, as_json=False)
    assert "no production runs of gpt2 yet; make one: tuner train" in capsys.readouterr().out


def kill_while_it_trains(folder: Path, cache: Path) -> str:
    """Go on with the run in `folder`/run, kill -9 the command while steps are done; returns the run's id."""
    command = [sys.executable, "-m", "tuner.cli", *SLOW]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, env=tuner_environment(cache), stdout=quiet, stderr=quiet)
    try:
        status = wait_for(lambda: at_work(folder / "run"))
    finally:
        process.kill()
        process.wait(timeout=20)
    return status.run


def at_work(out: Path) -> LiveStatus | None:
    status = read_status(out)
    return status if status and status.status is RunStatus.RUNNING and status.samples > 640 else None


def wait_for(look: Callable[[], LiveStatus | None]) -> LiveStatus:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("the run did not begin")


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db")


def test_promise_and_reality_stand_side_by_side(store: StudyStore, tmp_path: Path) -> None:
    run = store.add_run(WINNER, str(tmp_path), study="nightly", promise=example_promise())
    store.finish_run(run.id, RunStatus.FINISHED, example_result())
    ((found,), more) = store.newest_runs(20)
    line = line_of(found)
    assert more == 0
    assert (line.status, line.study, line.samples, line.resumable) == ("finished", "nightly", 1600, False)
    assert line.samples_per_s is not None
    assert line.deviation == pytest.approx(line.samples_per_s / example_promise().samples_per_s.value - 1)
    assert line.promised_peak_bytes == example_promise().peak_bytes
    assert line.peak_deviation is not None
    shown = " ".join(cells(line))
    assert "1,600 of" in shown
    assert f"of {example_promise().peak_bytes >> 20:,} MiB" in shown


def test_the_newest_come_first_and_can_be_narrowed(store: StudyStore) -> None:
    other = BASELINE.model_copy(update={"workload": "mine.jobs:Night"})
    ids = [store.add_run(config, "somewhere").id for config in (BASELINE, other, BASELINE)]
    few, more = store.newest_runs(2)
    assert (len(few), more) == (2, 1)
    ((only,), none) = store.newest_runs(20, lambda name: name == other.workload)
    assert (only.id, none) == (ids[1], 0)
    assert [run.id for run in store.runs_called(ids[0])] == [ids[0]]
    assert len(store.runs_called("")) == 3
    assert store.runs_called("%") == ()


def dead_writer() -> Writer:
    """Of a process that has ended."""
    code = "from tuner.contract.liveness import Writer; print(Writer.here().to_json())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return Writer.model_validate_json(ran.stdout)


def test_a_number_given_out_again_is_not_taken_for_the_same_process() -> None:
    here = Writer.here()
    assert here.alive() is True
    assert here.model_copy(update={"began": "1"}).alive() is False
    assert here.model_copy(update={"boot": "another"}).alive() is False
    assert here.model_copy(update={"host": "elsewhere"}).alive() is None
    assert here.model_copy(update={"space": "pid:[1]"}).alive() is None
    assert dead_writer().alive() is False


def test_running_or_died(tmp_path: Path) -> None:
    run = ProductionRun(id="r1", config=BASELINE, out_dir=str(tmp_path))
    assert state_of(run) is RunStatus.DIED
    with marked(tmp_path, "r1"):
        assert state_of(run) is RunStatus.RUNNING
        mark = tmp_path / ".run-r1.json"
        elsewhere = Writer.here().model_copy(update={"host": "elsewhere"})
        mark.write_text(elsewhere.to_json())
        write_status(tmp_path, updated_at="2020-01-01T00:00:00+00:00")
        assert state_of(run) is RunStatus.DIED
        write_status(tmp_path, updated_at="2999-01-01T00:00:00+00:00")
        assert state_of(run) is RunStatus.RUNNING
        mark.write_text(dead_writer().to_json())
        assert state_of(run) is RunStatus.DIED
    assert not list(tmp_path.glob(".run-*"))
    moved = run.model_copy(update={"out_dir": str(tmp_path / "gone")})
    assert state_of(moved) is RunStatus.RUNNING, "its folder is on another machine: nobody here can tell"


def write_status(out: Path, **changes: object) -> None:
    status = LiveStatus(
        run="r1",
        workload="toy",
        label="8x2",
        status=RunStatus.RUNNING,
        writer=Writer.here(),
        started_at="",
        updated_at="",
        goal_samples=100,
    )
    (out / "status.json").write_text(status.model_copy(update=changes).to_json())


def test_the_parent_says_what_a_killed_worker_could_not(tmp_path: Path) -> None:
    write_status(tmp_path)
    reply = ProbeReply(
        request_id="r", points=(PointReply(outcome=Outcome.OOM_HOST, message="killed by the kernel"),), seconds=1.0
    )
    close_status(tmp_path, "another", reply)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"
    close_status(tmp_path, "r1", reply)
    ended = read_status(tmp_path)
    assert ended is not None
    assert (ended.status, ended.reason) == (RunStatus.FAILED, "oom_host: killed by the kernel")


def test_a_run_gone_on_with_later_is_not_offered_for_resuming(store: StudyStore, tmp_path: Path) -> None:
    run = store.add_run(BASELINE, str(tmp_path))
    store.finish_run(run.id, RunStatus.STOPPED)
    (tmp_path / "checkpoints" / "step-000000000016").mkdir(parents=True)
    ((found,), _) = store.newest_runs(1)
    assert line_of(found).resumable
    write_status(tmp_path, run="later", status=RunStatus.FINISHED)
    line = line_of(found)
    assert not line.resumable
    assert "gone on with as later" in line.reason


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([float("nan")], ""),
        ([1.0, 1.0], "▅▅"),
        ([8.0, 1.0], "█▁"),
        ([1.0, float("nan"), 2.0], "▁ █"),
        ([0.001, 1.0, 1000.0], "▁▅█"),
    ],
)
def test_a_curve_as_a_line(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn


def test_a_long_curve_is_told_in_as_many_characters_as_there_is_room(tmp_path: Path) -> None:
    assert len(sparkline([float(x) for x in range(1000)], 60)) == 60
    assert curve_of(tmp_path) == ()
    (tmp_path / "metrics.csv").write_text("samples,total\n16,3.0\n32,nan\n48,1.5\n6")
    assert [point.loss for point in curve_of(tmp_path)][:3] == [3.0, None, 1.5]
    assert "3 to 1.5, least 1.5; 16 to" in "\n".join(curve_text(curve_of(tmp_path)))


def test_tensorboard_is_refused_before_anything_starts_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_words, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_words(TrainWords(config=Path("best.yaml"), tensorboard=True))

"""Two commands on one device, or on one study: the second waits and says for whom, or refuses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from tests.commands.test_main_job import TOY, start, wait_for_rows
from tests.conftest import LOCKS, RunTuner
from tuner.holders import FilePlace, Holder
from tuner.probe import device_memory
from tuner.store.store import StudyStore
from tuner.store.trials import open_storage

STUDY = """
workload: tests.toys:Toy
space: {micro_batch_size: [4, 8], num_workers: [0]}
budget_s: 60
measure: {measure_s: 0.1, compute_s: 0.1}
gate: {min_pairs: 2, max_pairs: 2, finalists: 1, measure_s: 0.1, min_gain: 0.9}
lr: {enabled: false}
"""
PROBE = ("probe", "-w", TOY, "--seconds", "0.1s")
OPTIMIZE = ("optimize", "-w", TOY, "--gpu", "cpu", "--spec", "study.yaml")
COMMANDS = {
    "optimize": OPTIMIZE,
    "probe": PROBE,
    "bench": ("bench", "-w", TOY),
    "train": ("train", "-w", TOY, "--max-samples", "64"),
}


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of its own for every test here, as for a host of its own."""
    monkeypatch.setenv(LOCKS, str(tmp_path / "locks"))
    (tmp_path / "study.yaml").write_text(STUDY)


@contextlib.contextmanager
def busy(folder: Path, *, alone: bool = True) -> Iterator[None]:
    """The device in use by this very process."""
    who = Holder.here("tuner optimize -w other", study="theirs", alone=alone)
    held = FilePlace(folder / "locks", "cpu", private=True).take(who)
    try:
        yield
    finally:
        held.release()


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_that_computes_refuses_where_another_one_measures(
    tuner: RunTuner, tmp_path: Path, words: tuple[str, ...]
) -> None:
    with busy(tmp_path):
        ran = tuner(*words, "--no-wait")
    assert ran.code == 75, ran.out + ran.err
    said = f"the CPU of this host is used by process {os.getpid()} (tuner optimize -w other, study theirs, since 20"
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_what_was_refused_has_stored_nothing(tuner: RunTuner, tmp_path: Path) -> None:
    with busy(tmp_path):
        assert tuner(*OPTIMIZE, "--no-wait").code == 75
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        assert store.studies() == ()


def test_bad_input_is_said_at_once_and_not_after_the_wait(tuner: RunTuner, tmp_path: Path) -> None:
    with busy(tmp_path):
        assert tuner(*OPTIMIZE, "-o", "wdith=3").code == 2
        assert tuner(*PROBE, "--set", "micro_batch_size=0").code == 2


def test_it_waits_says_for_whom_and_goes_on(tmp_path: Path, cache: Path) -> None:
    with busy(tmp_path):
        process = start(tmp_path, cache, *PROBE)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"waiting: the CPU of this host is used by process {os.getpid()} (tuner optimize")
        assert "--no-wait" in line
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("waited ")
    assert "throughput" in out
    assert not [*(tmp_path / "locks").glob("*.held")]


@pytest.mark.parametrize("words", [PROBE, OPTIMIZE, COMMANDS["train"]], ids=["probe", "optimize", "train"])
def test_ctrl_c_ends_the_wait(tmp_path: Path, cache: Path, words: tuple[str, ...]) -> None:
    with busy(tmp_path):
        process = start(tmp_path, cache, *words)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("waiting: "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)  # with the device still in use
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_sigterm_ends_the_wait_of_a_search_resumably(tmp_path: Path, cache: Path) -> None:
    with busy(tmp_path):
        process = start(tmp_path, cache, *OPTIMIZE)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("waiting: "):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75


def test_the_same_search_started_twice_is_made_once(tuner: RunTuner, tmp_path: Path, cache: Path) -> None:
    """The second neither measures beside the first nor fails its running trial; then it has nothing left to do."""
    first = start(tmp_path, cache, *OPTIMIZE)
    wait_for_rows(tmp_path, "toy-default-cpu", 1)
    second = start(tmp_path, cache, *OPTIMIZE)
    refused = tuner(*OPTIMIZE, "--no-wait")
    assert refused.code == 75
    assert f"process {first.pid} (tuner optimize -w {TOY}, study toy-default-cpu, since " in refused.err
    outs = [process.communicate(timeout=200) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outs
    assert f"waiting: the CPU of this host is used by process {first.pid} " in outs[1][0]
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        rows = store.rows("toy-default-cpu")
    assert len({(row.request_id, row.index) for row in rows}) == len(rows)
    assert f"(resumed: {len(rows)} points are stored" in outs[1][0]
    study = optuna.load_study(
        study_name="toy-default-cpu", storage=open_storage(f"sqlite:///{tmp_path}/studies/studies.db")
    )
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}


def test_another_host_on_the_same_study_waits_for_it(
    tuner: RunTuner, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device is another one: what is taken is the study."""
    first = start(tmp_path, cache, *OPTIMIZE)
    wait_for_rows(tmp_path, "toy-default-cpu", 1)
    monkeypatch.setenv(LOCKS, str(tmp_path / "another-host"))
    refused = tuner(*OPTIMIZE, "--no-wait")
    assert refused.code == 75
    assert f"study toy-default-cpu is used by process {first.pid} (tuner optimize" in refused.err
    first.kill()
    first.communicate()
    again = tuner(*OPTIMIZE, "--no-wait")
    assert again.code == 0, again.err
    assert "(resumed: " in again.out


def test_a_killed_holder_is_not_waited_for(tuner: RunTuner, tmp_path: Path, cache: Path) -> None:
    first = start(tmp_path, cache, *OPTIMIZE)
    wait_for_rows(tmp_path, "toy-default-cpu", 1)
    first.kill()
    first.communicate()
    ran = tuner(*PROBE, "--no-wait")
    assert ran.code == 0, ran.err


def test_production_runs_share_a_device_and_whoever_measures_waits_for_both(
    tuner: RunTuner, tmp_path: Path, cache: Path
) -> None:
    words = ("train", "-w", TOY, "-o", "sleep_s=0.05")
    first = start(tmp_path, cache, *words, "--out", "one")
    assert first.stdout is not None
    while "training " not in first.stdout.readline():
        assert first.poll() is None
    beside = tuner("train", "-w", TOY, "--max-samples", "64", "--out", "two")
    assert beside.code == 0, beside.err
    assert f"note: the CPU of this host is shared with process {first.pid} (tuner train -w {TOY}" in beside.out
    refused = tuner(*PROBE, "--no-wait")
    assert refused.code == 75
    assert f"the CPU of this host is used by process {first.pid} (tuner train" in refused.err
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=100)
    assert first.returncode == 75, err


def test_a_place_that_cannot_be_locked_is_said_and_the_work_goes_on(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "locks").symlink_to(tmp_path)
    ran = tuner(*PROBE)
    assert ran.code == 0, ran.err
    assert "warning: the CPU of this host cannot be locked:" in ran.out


@pytest.mark.slow
def test_eight_searches_begun_at_once_on_a_fresh_store_all_end_well(tmp_path: Path, cache: Path) -> None:
    studies = ["same"] * 4 + [f"other-{number}" for number in range(4)]
    processes = [start(tmp_path, cache, *OPTIMIZE, "--probes", "1", "--study", name) for name in studies]
    outs = [process.communicate(timeout=230) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outs
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        assert sorted(item.name for item in store.studies()) == sorted(set(studies))


UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2", "GPU-bbcc-3")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, UUIDS),
        ("1", UUIDS[1:2]),
        ("2,0", (UUIDS[2], UUIDS[0])),
        ("GPU-aaaa-1", UUIDS[:1]),
        ("GPU-bb", UUIDS[1:2]),
        (" 0 , 0 ", UUIDS[:1]),
        ("0,-1,1", UUIDS[:1]),
        ("7", ()),
        ("", ()),
        ("MIG-1234", ("MIG-1234",)),
    ],
)
def test_the_gpus_of_a_process_are_those_that_cuda_would_use(asked: str | None, found: tuple[str, ...]) -> None:
    assert device_memory._visible(UUIDS, None if asked is None else asked.split(",")) == found


def test_the_lock_s_place_is_the_same_in_every_session_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.commands.turns import lock_folder

    monkeypatch.delenv(LOCKS)
    for name in ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "HOME", "TUNER_CACHE"):
        monkeypatch.setenv(name, f"/elsewhere/{name}")
    assert lock_folder() == Path(f"/tmp/tuner-{os.getuid()}")


def test_nothing_of_the_command_line_but_the_job_is_written_down(tmp_path: Path, cache: Path) -> None:
    """An option may be a password."""
    process = start(tmp_path, cache, *OPTIMIZE, "--storage", f"sqlite:///{tmp_path}/canary.db", "-o", "width=16")
    found = ""
    while process.poll() is None and not found:
        with contextlib.suppress(FileNotFoundError):
            found = "".join(path.read_text() for path in (tmp_path / "locks").glob("*.held"))
    process.kill()
    process.communicate()
    assert re.search(r'"command":"tuner optimize -w tests.toys:Toy"', found)
    assert "canary" not in found
    assert "width" not in found

"""Every way a probe can die becomes one reply per point, in the words of what really happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fault_probes import alive, eventually, pids, request, struck
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, NoticeEvent, ProbeKind
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner


@pytest.mark.parametrize(
    ("workload", "outcome", "says"),
    [
        ("Segfaults", Outcome.CRASHED, "segmentation fault"),
        ("Aborts", Outcome.CRASHED, "aborted (signal 6"),
        ("KillsItself", Outcome.CRASHED, "killed by signal 9"),
        ("ExitsWithCode", Outcome.CRASHED, "exit code 42"),
        ("ExitsZero", Outcome.NO_RESULT, "without a result"),
        ("HalfReply", Outcome.NO_RESULT, '{"event": "point", "index": 0, "outc'),
        ("NanAtOnce", Outcome.DIVERGED, ""),
        ("RaisesInModel", Outcome.CRASHED, "a width of 7 does not fit 2 heads"),
    ],
)
def test_a_death_is_a_reply(runner: SubprocessRunner, ledger: Path, workload: str, outcome: Outcome, says: str) -> None:
    reply = runner.run(request(f"tests.faulty:{workload}", ledger))
    assert struck(ledger) == 1
    (point,) = reply.points
    assert (point.outcome, point.index) == (outcome, 0)
    assert says in point.message
    assert "\n" not in point.message


def test_the_last_words_are_kept(runner: SubprocessRunner, ledger: Path) -> None:
    reply = runner.run(request("tests.faulty:ExitsWithCode", ledger))
    assert "last words of a lost process" in reply.points[0].detail
    crash = runner.run(request("tests.faulty:Segfaults", ledger))
    assert "in strike" in crash.points[0].detail
    assert struck(ledger) == 2


def test_only_the_unanswered_points_are_lost(runner: SubprocessRunner, ledger: Path) -> None:
    asked = request("tests.faulty:Segfaults", ledger, points=4, strike_batch=16)
    reply = runner.run(asked)
    assert struck(ledger) == 1
    assert [point.index for point in reply.points] == [0, 1, 2, 3]
    outcomes = [point.outcome for point in reply.points]
    assert outcomes == [Outcome.OK, Outcome.CRASHED, Outcome.NO_RESULT, Outcome.NO_RESULT]
    assert all("not reached" in point.message for point in reply.points[2:])
    assert sum(point.seconds for point in reply.points) == pytest.approx(reply.seconds)


@pytest.mark.parametrize("workload", ["Hangs", "IgnoresSigterm", "StopsItself"])
def test_a_hang_is_ended(runner: SubprocessRunner, ledger: Path, workload: str) -> None:
    reply = runner.run(request(f"tests.faulty:{workload}", ledger, deadline_s=2.0))
    assert struck(ledger) == 1
    (point,) = reply.points
    assert point.outcome is Outcome.TIMEOUT
    assert "in phase" in point.message
    if workload != "StopsItself":
        assert "in strike" in point.detail, "the stack of the hang is kept"
    assert not alive(pids(ledger)[0])


@pytest.mark.parametrize("workload", ["ForksOrphans", "OrphansThenHangs"])
def test_no_descendant_outlives_its_probe(runner: SubprocessRunner, ledger: Path, workload: str) -> None:
    reply = runner.run(request(f"tests.faulty:{workload}", ledger, deadline_s=3.0))
    assert struck(ledger) == 3
    assert reply.points[0].outcome in (Outcome.OK, Outcome.TIMEOUT)
    assert not [pid for pid in pids(ledger) if alive(pid)]


def test_what_a_workload_prints_is_no_event(runner: SubprocessRunner, ledger: Path) -> None:
    reply = runner.run(request("tests.faulty:Chatty", ledger))
    assert struck(ledger) == 1
    assert [point.outcome for point in reply.points] == [Outcome.OK]
    assert reply.points[0].measurement is not None


def test_a_dead_loader_worker_is_named(runner: SubprocessRunner, ledger: Path) -> None:
    reply = runner.run(request("tests.faulty:WorkersDie", ledger, workers=1, kind=ProbeKind.END_TO_END))
    assert struck(ledger) >= 1
    assert reply.points[0].outcome is Outcome.LOADER_ERROR
    assert not [pid for pid in pids(ledger) if alive(pid)]


def test_a_real_out_of_memory_is_survived(runner: SubprocessRunner, ledger: Path) -> None:
    cap = 200 << 20
    roomy = request("tests.faulty:Toy", memory_bytes=cap, ballast_bytes=1 << 20)
    tight = request("tests.faulty:Toy", memory_bytes=cap, ballast_bytes=100 << 20)
    assert runner.run(roomy).points[0].outcome is Outcome.OK
    (point,) = runner.run(tight).points
    assert point.outcome is Outcome.OOM_HOST
    assert runner.run(roomy).points[0].outcome is Outcome.OK


def test_a_fault_leaves_the_next_probe_unharmed(runner: SubprocessRunner, ledger: Path) -> None:
    for workload in ("Segfaults", "ExitsZero", "Segfaults"):
        runner.run(request(f"tests.faulty:{workload}", ledger))
    assert struck(ledger) == 3
    reply = runner.run(request("tests.faulty:Toy"))
    assert reply.points[0].outcome is Outcome.OK


@pytest.mark.parametrize(
    ("workload", "message", "detail"),
    [
        ("tests.faulty_import:Broken", "pip install speclib", "in _needs_a_library"),
        ("tests.no_such_module:Job", "No module named 'tests.no_such_module'", ""),
        ("tests.not_workloads:NoSuchClass", "has no NoSuchClass", ""),
        ("tests.not_workloads:NOT_A_CLASS", "this is a int", ""),
        ("tests.not_workloads:LacksMethods", "info(self) -> WorkloadInfo; dataset(self", ""),
    ],
)
def test_a_broken_workload_is_told_in_its_own_words(
    runner: SubprocessRunner, ledger: Path, workload: str, message: str, detail: str
) -> None:
    for kind in (ProbeKind.DESCRIBE, ProbeKind.COMPUTE):
        asked = request(workload, ledger, kind=kind)
        if kind is ProbeKind.DESCRIBE:
            asked = asked.model_copy(update={"points": ()})
        (point,) = runner.run(asked).points
        assert point.outcome is Outcome.BAD_INPUT
        assert message in point.message
        assert detail in point.detail
        assert "importlib" not in point.detail, "the traceback is the user's, not ours"


@pytest.mark.parametrize(
    ("workload", "says"),
    [("tests.faulty_threads:Threaded", "starts threads"), ("tests.faulty_cuda:TouchesMockCuda", "touches CUDA")],
)
def test_what_cannot_be_forked_safely_is_not_forked(tmp_path: Path, workload: str, says: str) -> None:
    said: list[str] = []
    with SubprocessRunner(tmp_path / "cache", log_dir=tmp_path / "logs", trust=ANY_CODE) as runner:
        reply = runner.run(request(workload), lambda event: _note(event, said))
        assert runner.isolation == "fresh"
    assert reply.points[0].outcome is Outcome.OK
    assert len(said) == 1
    assert says in said[0]


def test_a_missing_preload_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with SubprocessRunner(tmp_path / "cache", log_dir=tmp_path / "logs", trust=ANY_CODE) as runner:
        asked = request("tests.faulty:WantsMissingModule")
        reply = runner.run(asked, lambda event: _note(event, said))
        assert runner.isolation == "forkserver"
    assert reply.points[0].outcome is Outcome.OK
    assert [text for text in said if "no_such_module_anywhere" in text]


def test_orphans_of_a_fresh_interpreter_are_ended_too(tmp_path: Path, ledger: Path) -> None:
    with SubprocessRunner(tmp_path / "cache", isolation="fresh", log_dir=tmp_path / "logs", trust=ANY_CODE) as runner:
        reply = runner.run(request("tests.faulty:ForksOrphans", ledger))
    assert struck(ledger) == 3
    assert reply.points[0].outcome is Outcome.OK
    assert eventually(lambda: not any(alive(pid) for pid in pids(ledger)), 5)


def _note(event: Event, said: list[str]) -> None:
    if isinstance(event, NoticeEvent):
        said.append(event.text)

"""The tuner itself, or the process its probes are forked from, is killed or interrupted while a probe runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.faults.fault_probes import alive, eventually, marked, pids, request, struck
from tuner.contract.base import parse_json
from tuner.contract.config import Cadence
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, PhaseEvent, ProbeKind, ProbeReply, ProbeRequest, TrainEvent, TrainPlan
from tuner.probe.runner import SubprocessRunner

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MARK = "TUNER_TEST_MARK"


class Parent:
    """`running_parent.py` with one request, in a process that carries a mark all its descendants inherit."""

    def __init__(self, base: Path, asked: ProbeRequest, isolation: str = "forkserver") -> None:
        self.base = base
        self.mark = uuid.uuid4().hex
        (base / "request.json").write_text(asked.to_json(), encoding="utf-8")
        command = [sys.executable, str(HERE / "running_parent.py"), str(base / "request.json"), str(base), isolation]
        environment = os.environ | {MARK: self.mark, "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    def family(self) -> list[psutil.Process]:
        return marked(MARK, self.mark)

    def reply(self) -> ProbeReply:
        return parse_json(ProbeReply, (self.base / "reply.json").read_text(encoding="utf-8"))


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


@pytest.mark.parametrize("isolation", ["forkserver", "fresh"])
def test_a_killed_tuner_leaves_nothing_behind(tmp_path: Path, ledger: Path, isolation: str) -> None:
    parent = Parent(tmp_path, request("tests.faulty:OrphansThenHangs", ledger), isolation)
    assert eventually(lambda: ledger.exists() and ledger.read_text().count("\n") == 3)
    assert len(parent.family()) >= 5, "tuner, host, probe, and two orphans"
    parent.process.kill()
    parent.process.wait()
    assert eventually(lambda: not parent.family(), 10)
    assert struck(ledger) == 3
    assert not [pid for pid in pids(ledger) if alive(pid)]


def test_ctrl_c_ends_the_probe_and_is_passed_on(tmp_path: Path, ledger: Path) -> None:
    parent = Parent(tmp_path, request("tests.faulty:IgnoresSigterm", ledger))
    assert eventually(ledger.exists)
    parent.process.send_signal(signal.SIGINT)
    assert parent.process.wait(30) == 130
    assert struck(ledger) == 1
    assert not parent.family()


def test_a_killed_host_costs_one_probe(runner: SubprocessRunner, ledger: Path) -> None:
    def kill_host(event: Event) -> None:
        if isinstance(event, PhaseEvent) and event.phase == "build":
            probe = next(p for p in psutil.Process().children(recursive=True) if p.parent() != psutil.Process())
            host = probe.parent()
            assert host is not None
            ledger.write_text(f"host {probe.pid}\n", encoding="utf-8")
            host.kill()

    reply = runner.run(request("tests.faulty:Toy"), kill_host)
    assert struck(ledger) == 1
    assert reply.points[0].outcome is Outcome.CRASHED
    assert "host has ended" in reply.points[0].message
    assert not alive(pids(ledger)[0])
    assert runner.run(request("tests.faulty:Toy")).points[0].outcome is Outcome.OK


def hosts() -> list[psutil.Process]:
    """Hosts of this process, other helpers of its own (multiprocessing's) left out."""
    return [child for child in psutil.Process().children() if "--serve" in child.cmdline()]


def test_a_host_that_died_between_probes_is_replaced(runner: SubprocessRunner, ledger: Path) -> None:
    assert runner.run(request("tests.faulty:Toy")).points[0].outcome is Outcome.OK
    (host,) = hosts()
    host.kill()
    assert runner.run(request("tests.faulty:Toy")).points[0].outcome is Outcome.OK


def test_a_hung_host_is_ended(runner: SubprocessRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.probe.launch.FARE_WELL_S", 0.5)
    assert runner.run(request("tests.faulty:Toy")).points[0].outcome is Outcome.OK
    (host,) = hosts()
    host.suspend()
    runner.close()
    assert not alive(host.pid)


def train(workload: str, ledger: Path | None, out: Path, sleep_s: float = 0.0) -> ProbeRequest:
    asked = request(workload, ledger, kind=ProbeKind.TRAIN, sleep_s=sleep_s)
    points = tuple(point.model_copy(update={"cadence": Cadence(log_samples=64)}) for point in asked.points)
    return asked.model_copy(update={"points": points, "train": TrainPlan(out_dir=str(out))})


def test_a_stop_signal_reaches_production_as_a_request_to_save(runner: SubprocessRunner, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    asked = train("tests.faulty:Toy", None, tmp_path / "out", sleep_s=0.02)

    def stop_once(event: Event) -> None:
        if isinstance(event, TrainEvent) and not lines.exists():
            lines.write_text(f"signal {os.getpid()}\n", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGTERM)

    reply = runner.run(asked, stop_once)
    assert struck(lines) == 1
    assert reply.train_result is not None
    assert not reply.train_result.finished
    assert 0 < reply.train_result.samples < 4096
    assert reply.points[0].outcome is Outcome.OK
    assert list((tmp_path / "out").rglob("*")), "a checkpoint was written"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_ctrl_c_kills_production(tmp_path: Path, ledger: Path) -> None:
    parent = Parent(tmp_path, train("tests.faulty:IgnoresSigterm", ledger, tmp_path / "out"))
    assert eventually(ledger.exists)
    parent.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        parent.process.wait(1.0)
    parent.process.send_signal(signal.SIGINT)
    assert parent.process.wait(30) == 130
    assert struck(ledger) == 1
    assert not parent.family()

"""Everything, or a part of it, is stopped for a while and goes on: SIGSTOP, Ctrl-Z, a paused container."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.fault_probes import eventually, request, struck
from tests.faults.test_tuner_faults import Parent, train
from tuner.contract.measurement import Measurement, Outcome
from tuner.contract.probe import Event, NoticeEvent, PhaseEvent, ProbeKind, ProbeReply, ProbeRequest, TrainEvent
from tuner.contract.statistics import throughput
from tuner.engine.pulse import Pulse
from tuner.probe.runner import SubprocessRunner

STOPPED_S = 1.5
FREEZER = Path("/sys/fs/cgroup/freezer")
SLOW: dict[str, Any] = {"sleep_s": 0.01}


def probe_processes() -> list[psutil.Process]:
    """The probe and its children, its host left out."""
    return [p for p in psutil.Process().children(recursive=True) if p.parent() != psutil.Process()]


def stop(processes: Sequence[psutil.Process], ledger: Path, seconds: float = STOPPED_S) -> threading.Thread:
    """Stops them now, and lets them go on after `seconds`."""

    def go_on() -> None:
        time.sleep(seconds)
        for process in processes:
            process.send_signal(signal.SIGCONT)

    for process in processes:
        process.send_signal(signal.SIGSTOP)
    with ledger.open("a") as out:
        out.write(f"stopped {len(processes)}\n")
    thread = threading.Thread(target=go_on)
    thread.start()
    return thread


class Stopper:
    """Listens to a probe; strikes in its first `times` measuring phases, and keeps what it is told."""

    def __init__(self, ledger: Path, victims: Callable[[], Sequence[psutil.Process]], times: int = 1) -> None:
        self.notices: list[str] = []
        self._ledger, self._victims, self._left = ledger, victims, times

    def __call__(self, event: Event) -> None:
        if isinstance(event, NoticeEvent):
            self.notices.append(event.text)
        if isinstance(event, PhaseEvent) and event.phase == "measure" and self._left:
            self._left -= 1
            stop(self._victims(), self._ledger)


def long(asked: ProbeRequest) -> ProbeRequest:
    """Measured for long enough to be struck in the middle."""
    return asked.model_copy(update={"limits": asked.limits.model_copy(update={"measure_s": 1.0, "half_width": 1e-9})})


def sound(reply: ProbeReply) -> Measurement:
    """A measurement in which nothing of the stop is left."""
    (point,) = reply.points
    assert point.outcome is Outcome.OK, point.message
    assert point.measurement is not None
    assert max(point.measurement.steady_step_s) < STOPPED_S / 2
    found = throughput(point.measurement)
    assert found.high < 2 * found.value
    return point.measurement


@pytest.mark.parametrize("kind", [ProbeKind.COMPUTE, ProbeKind.LOADER])
def test_a_probe_that_was_stopped_is_measured_once_more(
    runner: SubprocessRunner, ledger: Path, kind: ProbeKind
) -> None:
    heard = Stopper(ledger, probe_processes)
    options = SLOW if kind is ProbeKind.COMPUTE else {"load_s": 0.001}
    reply = runner.run(long(request("tests.faulty:Toy", kind=kind, **options)), heard)
    assert struck(ledger) == 1
    sound(reply)
    assert [text for text in heard.notices if "did not run for" in text and "once more" in text]


def test_stopped_again_it_is_no_measurement(runner: SubprocessRunner, ledger: Path) -> None:
    reply = runner.run(long(request("tests.faulty:Toy", **SLOW)), Stopper(ledger, probe_processes, times=2))
    assert struck(ledger) == 2
    (point,) = reply.points
    assert (point.outcome, point.measurement) == (Outcome.CONTENDED, None)
    assert "the process did not run for 1 s of its measurement" in point.message


def test_only_the_point_that_was_stopped_is_lost(runner: SubprocessRunner, ledger: Path) -> None:
    reply = runner.run(long(request("tests.faulty:Toy", points=2, **SLOW)), Stopper(ledger, probe_processes))
    assert struck(ledger) == 1
    assert [point.outcome for point in reply.points] == [Outcome.CONTENDED, Outcome.OK]


def test_a_loss_at_equal_samples_is_no_time_and_stands(runner: SubprocessRunner, ledger: Path) -> None:
    asked = request("tests.faulty:Toy", kind=ProbeKind.LR, **SLOW).model_copy(update={"samples": 800})
    (point,) = runner.run(asked, Stopper(ledger, probe_processes)).points
    assert struck(ledger) == 1
    assert point.outcome is Outcome.OK


def test_a_loader_worker_that_alone_was_stopped_leaves_no_step_of_seconds(
    runner: SubprocessRunner, ledger: Path
) -> None:
    """The probe itself ran all the time: that the one long wait was not the job's own is seen by measuring on."""
    asked = long(request("tests.faulty:Toy", kind=ProbeKind.END_TO_END, workers=1, load_s=0.002))
    heard = Stopper(ledger, lambda: [p for p in probe_processes() if p.parent() in probe_processes()])
    reply = runner.run(asked, heard)
    assert struck(ledger) == 1
    assert max(sound(reply).step_s) > STOPPED_S / 2


@pytest.mark.parametrize("who", ["the whole tree", pytest.param("the tuner alone", marks=pytest.mark.slow)])
def test_no_deadline_ends_a_probe_while_the_tuner_sleeps(tmp_path: Path, ledger: Path, who: str) -> None:
    asked = request("tests.faulty:Notes", ledger, deadline_s=2.0, **SLOW)
    parent = Parent(tmp_path, long(asked))
    assert eventually(ledger.exists)
    family = parent.family() if who == "the whole tree" else [psutil.Process(parent.process.pid)]
    stop(family, ledger, seconds=4.0).join()
    assert parent.process.wait(60) == 0
    assert struck(ledger) >= 2
    sound(parent.reply())


def test_production_leaves_out_the_step_it_was_stopped_in(
    runner: SubprocessRunner, ledger: Path, tmp_path: Path
) -> None:
    notices: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, NoticeEvent):
            notices.append(event.text)
        if isinstance(event, TrainEvent) and not ledger.exists():
            stop(probe_processes(), ledger)

    asked = train("tests.faulty:Toy", None, tmp_path / "out", sleep_s=0.01)
    plan = asked.train
    assert plan is not None
    asked = asked.model_copy(update={"train": plan.model_copy(update={"max_samples": 1600})})
    reply = runner.run(asked, listen)
    assert struck(ledger) == 1
    assert len(sound(reply).step_s) == 199, "of 200 steps"
    assert [text for text in notices if "had not run for 1 s" in text]
    assert reply.train_result is not None
    assert reply.train_result.finished


@pytest.fixture
def freezer() -> Iterator[Path]:
    folder = FREEZER / f"tuner-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / "freezer.state").write_text("THAWED")
    except OSError as error:
        pytest.skip(f"not run: no cgroup freezer can be made here ({error})")
    yield folder
    (folder / "freezer.state").write_text("THAWED")
    assert eventually(lambda: not (folder / "cgroup.procs").read_text().split())
    folder.rmdir()


def test_a_paused_container_is_seen_too(runner: SubprocessRunner, ledger: Path, freezer: Path) -> None:
    """`docker pause` sends no signal."""

    def pause() -> None:
        for process in probe_processes():
            (freezer / "cgroup.procs").write_text(str(process.pid))
        (freezer / "freezer.state").write_text("FROZEN")
        ledger.write_text("paused 1\n")
        time.sleep(STOPPED_S)
        (freezer / "freezer.state").write_text("THAWED")

    notices: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, NoticeEvent):
            notices.append(event.text)
        if isinstance(event, PhaseEvent) and event.phase == "measure" and not ledger.exists():
            pause()

    sound(runner.run(long(request("tests.faulty:Toy", **SLOW)), listen))
    assert struck(ledger) == 1
    assert [text for text in notices if "did not run for" in text]


def test_a_long_call_that_holds_pythons_lock_is_no_sleep() -> None:
    with Pulse() as pulse:
        for _ in range(2):
            ctypes.PyDLL(None).usleep(1_500_000)
        time.sleep(0.6)
        assert pulse.take() == 0.0


def test_a_stop_is_told_once_and_at_once() -> None:
    """A child stops itself; its parent lets it go on."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with Pulse() as pulse:
                os.kill(os.getpid(), signal.SIGSTOP)
                code = 0 if pulse.take() >= 1.0 and not pulse.take() else 2
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    time.sleep(STOPPED_S)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

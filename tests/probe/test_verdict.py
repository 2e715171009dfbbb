"""Every end of a process maps to exactly one outcome."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tuner.contract.measurement import Outcome
from tuner.probe.verdict import TAIL_LINES, Ending, judge, kernel_oom_kills, log_tail


@pytest.mark.parametrize(
    ("ending", "outcome", "says"),
    [
        (Ending(status=0), Outcome.NO_RESULT, "without a result (exit code 0)"),
        (Ending(status=0, garbage='{"ev'), Outcome.NO_RESULT, """'{"ev'"""),
        (Ending(status=3 << 8), Outcome.CRASHED, "exit code 3"),
        (Ending(status=signal.SIGSEGV), Outcome.CRASHED, "segmentation fault (signal 11, SIGSEGV)"),
        (Ending(status=signal.SIGSEGV | 0x80), Outcome.CRASHED, "segmentation fault"),
        (Ending(status=signal.SIGABRT), Outcome.CRASHED, "aborted (signal 6"),
        (Ending(status=signal.SIGBUS), Outcome.CRASHED, "bus error"),
        (Ending(status=signal.SIGKILL), Outcome.CRASHED, "killed by signal 9 (SIGKILL)"),
        (Ending(status=40), Outcome.CRASHED, "signal 40"),
        (Ending(status=signal.SIGKILL, kernel_oom=True), Outcome.OOM_HOST, "the host ran out of memory"),
        (Ending(lost="the worker host has ended", kernel_oom=True), Outcome.OOM_HOST, "the host ran out of memory"),
        (Ending(status=0, kernel_oom=True), Outcome.NO_RESULT, "without a result"),
        (Ending(status=signal.SIGABRT, log="terminate: std::bad_alloc"), Outcome.OOM_HOST, "std::bad_alloc"),
        (Ending(status=1 << 8, log="libgomp: Thread creation failed"), Outcome.OOM_HOST, "Thread creation failed"),
        (Ending(status=1 << 8, log="CUDA error: out of memory"), Outcome.OOM_DEVICE, "CUDA error: out of memory"),
        (Ending(status=signal.SIGKILL, timed_out="silent"), Outcome.TIMEOUT, "silent"),
        (Ending(status=signal.SIGTERM, asked_to_stop=True), Outcome.NO_RESULT, "stopped on request"),
        (Ending(lost="the worker host has ended"), Outcome.CRASHED, "the worker host has ended"),
        (Ending(refused="GPU memory not returned"), Outcome.CONTENDED, "GPU memory not returned"),
        (Ending(), Outcome.CRASHED, "not seen"),
    ],
)
def test_an_ending_has_one_outcome(ending: Ending, outcome: Outcome, says: str) -> None:
    found, message = judge(ending)
    assert found is outcome
    assert says in message


def test_every_status_is_judged() -> None:
    for status in range(0, 1 << 16, 7):
        if status & 0x7F != 0x7F:  # stopped, not ended
            outcome, message = judge(Ending(status=status))
            assert outcome in (Outcome.CRASHED, Outcome.NO_RESULT)
            assert message


def test_the_end_of_a_log_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"\xff early\n" * 5000 + b"last\n")
    lines = log_tail(log).splitlines()
    assert len(lines) == TAIL_LINES
    assert lines[-1] == "last"
    assert log_tail(tmp_path / "none.log") == ""


def test_the_kernel_is_asked_for_its_kills() -> None:
    assert kernel_oom_kills() >= 0

"""The process that runs the tests' commands: an interrupted one leaves no reply behind for the next."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from tests.conftest import tuner_environment
from tests.forked_cli import ForkedCli


class Interrupted(BaseException):
    """As pytest-timeout's: no Exception."""


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_command_that_was_interrupted_does_not_answer_for_the_next(tmp_path: Path) -> None:
    cli, env = ForkedCli(tuner_environment(tmp_path / "cache")), tuner_environment(tmp_path / "cache")

    def run(*words: str) -> int:
        return cli.run(words, cwd=tmp_path, env=env, aside=tmp_path, timeout_s=100.0)

    try:
        assert run("gpus") == 0
        with pytest.raises(Interrupted), interrupted_after(1.0):
            run("probe", "--workload", "tests.toys:Toy", "-o", "fail=hang", "-o", "fail_call=1")
        assert run("gpus", "--no-such-option") == 2
        assert run("gpus") == 0
    finally:
        cli.close()

"""What all tests share: the `tuner` command as a user runs it, in a folder and with a cache of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.forked_cli import ForkedCli

# The everyday suite gives the same verdict on the same code; TUNER_FUZZ=1 looks for new examples.
settings.register_profile("everyday", derandomize=not os.environ.get("TUNER_FUZZ"))
settings.load_profile("everyday")

ROOT = Path(__file__).resolve().parent.parent


LOCKS = "TUNER_LOCKS"


def pytest_configure() -> None:
    """Each parallel test process keeps to a core of its own: two thread pools on the same cores only spin. And it has
    devices of its own to lock, so that the processes of different tests do not wait for each other. What nohup or a
    shell's background made this process ignore is not ignored in the commands under test."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[LOCKS] = tempfile.mkdtemp(prefix="tuner-locks-")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker and len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ[LOCKS], ignore_errors=True)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Test ids are the same in every process and on every day. Bytes may hold anything: a compressed file holds the
    time, and two test processes then collect different tests. So bytes are numbered instead of shown."""
    return argname if isinstance(val, bytes) else None


@dataclass(frozen=True)
class Ran:
    """One finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


RunTuner = Callable[..., Ran]


def tuner_environment(cache: Path) -> dict[str, str]:
    """The environment of a `tuner` command in tests: our own cache, the tests' workloads importable."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TUNER_")}
    return env | {"TUNER_CACHE": str(cache), LOCKS: os.environ[LOCKS], "PYTHONPATH": str(ROOT), "COLUMNS": "150"}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the whole session: prepared data is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def forked_cli(cache: Path) -> Iterator[ForkedCli]:
    made = ForkedCli(tuner_environment(cache))
    yield made
    made.close()


@pytest.fixture
def tuner(tmp_path: Path, cache: Path, forked_cli: ForkedCli, tmp_path_factory: pytest.TempPathFactory) -> RunTuner:
    """`tuner("show", "--json")` runs it in `tmp_path` and gives exit code and output."""

    def run(*words: str, timeout_s: float = 200.0) -> Ran:
        aside = tmp_path_factory.mktemp("said")
        code = forked_cli.run(words, cwd=tmp_path, env=tuner_environment(cache), aside=aside, timeout_s=timeout_s)
        return Ran(code, (aside / "out").read_text(), (aside / "err").read_text())

    return run

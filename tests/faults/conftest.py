"""One runner for all fault tests, so that every fault also proves that the next probe is unharmed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner


@pytest.fixture(scope="session")
def shared_runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessRunner]:
    base = tmp_path_factory.mktemp("runner")
    with SubprocessRunner(base / "cache", log_dir=base / "logs", grace_s=0.5, trust=ANY_CODE) as runner:
        yield runner


@pytest.fixture
def runner(shared_runner: SubprocessRunner) -> Iterator[SubprocessRunner]:
    yield shared_runner
    assert shared_runner.isolation == "forkserver", "a fault made the runner give up forking"


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger"

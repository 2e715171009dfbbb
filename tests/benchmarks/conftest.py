"""One made-up recording for all tests of the replayed benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.recorded_world import write_recording


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("grids") / "made_up.jsonl.gz")

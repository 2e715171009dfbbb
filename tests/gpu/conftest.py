"""Tests of what only a CUDA device shows: `make gpu-check` runs them; without one each says why it did not run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("not run: this machine has no CUDA device that torch can see")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def gpu_runner(cuda: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessRunner]:
    base = tmp_path_factory.mktemp("gpu-runner")
    with SubprocessRunner(base / "cache", log_dir=base / "logs", grace_s=0.5, trust=ANY_CODE) as runner:
        yield runner

"""What the tests of the shipped workloads share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tuner.prepared import locked
from workloads.sd_kanji.workload import SdKanji


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share their machine, and threads that wait for each other make a busy one crawl."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kanji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd_kanji's default data: drawn once for all test processes, and a copy for each."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return drawn_kanji(base / "sd_kanji")
    shutil.copytree(drawn_kanji(base.parent / "sd_kanji"), base / "sd_kanji")
    return base / "sd_kanji"


def drawn_kanji(cache: Path) -> Path:
    cache.mkdir(exist_ok=True)
    with locked(cache, lambda: None):
        SdKanji({}).prepare(cache, lambda done, total, text: None)
    return cache

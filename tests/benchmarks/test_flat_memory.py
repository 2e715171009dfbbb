"""The benchmark that watches a run's memory: it reads a real worker, and it tells a growing run from a flat one."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.flat_memory import Course, text_of, watched


def course(rss: list[int], files: int = 20, threads: int = 5) -> Course:
    return Course("toy", 100, rss, [20] * 90 + [files] * 10, [5] * 90 + [threads] * 10)


def test_growth_after_the_warm_up_is_seen() -> None:
    flat = course([80 + i for i in range(20)] + [100] * 80)
    assert (flat.drift, flat.flat) == (0.0, True)
    assert not course([100 + i // 10 for i in range(100)]).flat
    assert not course([100] * 100, files=21).flat
    assert not course([100] * 100, threads=6).flat
    assert "+1" not in text_of([flat])


def test_a_real_worker_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    found = watched("tests.toys:Toy", 30, tmp_path, argparse.Namespace(background_checkpoints=False))
    assert len(found.rss_bytes) == len(found.files) == len(found.threads) >= 25
    assert min(found.rss_bytes) > 10 << 20
    assert min(found.files) > 2

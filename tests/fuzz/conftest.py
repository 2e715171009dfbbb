"""A folder with a canary module in it, where no worker starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.hostile import CANARY, describing
from tuner.probe.runner import SubprocessRunner


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "evilmod.py").write_text(CANARY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.setattr(SubprocessRunner, "run", describing)
    monkeypatch.setattr("tuner.report.dashboard.serve", lambda *_, **__: None)
    return tmp_path

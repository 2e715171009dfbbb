"""docs/adding-a-workload.md is true: its code is short, passes the contract suite, and takes the user's own data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, tuner_environment
from tuner.contract.documents import load_document
from tuner.contract.study import StudyFile
from tuner.contract.workload import Trivial

PAGE = (ROOT / "docs" / "adding-a-workload.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The page's only code block of that language with that text in it."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)
    (found,) = [text for text in blocks if containing in text]
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files of the page, as a reader would write them."""
    made = tmp_path_factory.mktemp("resnet")
    (made / "resnet_job.py").write_text(block("python", "class ResNet:"), encoding="utf-8")
    (made / "test_resnet_job.py").write_text(block("python", "WorkloadContract"), encoding="utf-8")
    return made


def environment(folder: Path) -> dict[str, str]:
    return tuner_environment(folder / "cache") | {"OMP_NUM_THREADS": "1"}


def test_the_example_is_short() -> None:
    assert len(block("python", "class ResNet:").splitlines()) < 80


def test_the_example_passes_the_suite_it_shows(folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_resnet_job.py"],
        cwd=folder,
        env=environment(folder) | {"TUNER_CACHE": os.devnull},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^\d+ passed in", ran.stdout, flags=re.M), ran.stdout


def test_the_set_up_brings_what_the_suite_needs() -> None:
    """`python -m pytest` of the page, after `make setup` of the README."""
    told = subprocess.run(
        ["make", "-n", "setup", "VENV=not-there"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    (extras,) = re.findall(r"-e '\.\[(.*?)\]'", told)
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(line.startswith("pytest>") for extra in extras.split(",") for line in offered[extra])


def test_the_example_takes_the_users_pictures(folder: Path) -> None:
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "pictures.npz", images=images, labels=draw.integers(0, 3, 40))
    ran = probe(folder, "--data", "pictures.npz", "--kind", "compute", "--set", "micro_batch_size=4", "--json")
    assert ran.returncode == 0, ran.stderr
    point = json.loads(ran.stdout)["points"][0]
    assert point["outcome"] == "ok"
    assert point["measurement"]["parameters"] == 176_402 - 7 * 65, "three classes instead of ten"

    np.savez(folder / "grey.npz", images=images[..., 0], labels=np.zeros(40))
    ran = probe(folder, "--data", "grey.npz")
    assert ran.returncode == 2
    assert "grey.npz: images must be uint8 [N, 32, 32, 3]" in ran.stderr
    assert "Traceback" not in ran.stderr


def probe(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuner.cli", "probe", "-w", "resnet_job:ResNet", "--seconds", "0.2s", *words],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_full_is_a_resnet_18(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    import resnet_job  # type: ignore[import-not-found]

    job = resnet_job.ResNet({"preset": "full"})
    job.prepare(tmp_path, print)
    with torch.device("meta"):
        assert sum(part.numel() for part in job.model().parameters()) == 11_173_962
    assert f"{11_173_962:,}" in PAGE
    assert isinstance(job.trivial()["accuracy"], Trivial)
    assert 0.1 < job.trivial()["accuracy"].value < 0.15


@pytest.mark.parametrize(
    ("text", "factors"),
    [("torch.optim.Adadelta", {0: 1.0, 63: 1.0, 64: 0.7, 640: 0.7**10}), ("up, down", {0: 0.04, 192: 1.0, 640: 0.0})],
)
def test_the_schedules_are_what_they_are_called(text: str, factors: dict[float, float]) -> None:
    """StepLR and OneCycleLR over 640 samples, of which an epoch has 64."""
    names: dict[str, Any] = {}
    exec(f"import math, torch\nclass Job:\n    train = 64\n{block('python', text)}", names)
    job = names["Job"]()
    assert {samples: job.schedule(samples, 640) for samples in factors} == pytest.approx(factors)


def test_the_study_file_is_one() -> None:
    file = load_document(StudyFile, block("yaml", "space:"), "the page")
    assert file.workload == "resnet_job:ResNet"

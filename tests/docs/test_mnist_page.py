"""docs/mnist.md is true: the example of PyTorch's own works on the first try, on idx files as MNIST has them."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, tuner_environment

PAGE = (ROOT / "docs" / "mnist.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script, and a small MNIST: the digit is where a bright bar lies."""
    made = tmp_path_factory.mktemp("mnist")
    (made / "mnist_job.py").write_text(SCRIPT, encoding="utf-8")
    raw = made / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 256), ("t10k", 64)):
        labels = draw.integers(0, 10, count, dtype=np.uint8)
        images = draw.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3 : 2 * label + 6] = 250
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return made


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    """http://yann.lecun.com/exdb/mnist: two zeros, 8 for unsigned bytes, the number of dimensions, their sizes."""
    head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def tuner(folder: Path, *words: str) -> str:
    """What `tuner` says, as a stranger runs it beside the script."""
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tuner.cli", *words]
    more: Sequence[str] = ("--workload", "mnist_job:Mnist")
    ran = subprocess.run(
        [*command, *more],
        cwd=folder,
        env=tuner_environment(folder / "cache") | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    return ran.stdout


def test_the_script_is_short_and_needs_no_torchvision() -> None:
    assert len(SCRIPT.splitlines()) <= 45
    assert "import torchvision" not in SCRIPT


def test_a_probe_measures_it_and_tells_the_author_of_the_plain_loss(folder: Path) -> None:
    said = tuner(folder, "probe", "--seconds", "0.5s", "--data", "data/MNIST/raw")
    assert re.search(r"throughput +[\d,.]+", said)
    assert said.count("warning: loss: it returned a plain tensor") == 1


def test_accumulation_is_proved_to_be_the_same_training(folder: Path) -> None:
    said = tuner(folder, "probe", "--kind", "equivalence")
    (apart,) = re.findall(r"relative_l2 +(\S+)", said)
    assert float(apart) < 1e-5


def test_it_trains(folder: Path) -> None:
    said = tuner(folder, "train", "--max-samples", "640", "--out", "run")
    (accuracy,) = re.findall(r"evaluated at 640 samples: accuracy ([\d.]+)", said)
    assert float(accuracy) > 0.5


@pytest.mark.slow
def test_a_short_search_ends_with_an_answer(folder: Path) -> None:
    said = tuner(folder, "optimize", "--budget", "30s", "--out", "best.yaml")
    assert said.count("warning: loss: it returned a plain tensor") == 1
    assert re.search(r"^(winner|no gain)", said, flags=re.M), said

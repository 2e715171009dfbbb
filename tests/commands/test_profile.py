"""`tuner probe --profile` says where a step's time goes, and leaves a trace that a browser can open."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

from tests.conftest import RunTuner

TOY = "tests.toys:Toy"


def test_the_parts_of_a_step_and_the_trace(tuner: RunTuner, tmp_path: Path) -> None:
    ran = tuner("probe", "-w", TOY, "--profile", "--seconds", "0.1s")
    assert ran.code == 0, ran.err
    parts = dict(re.findall(r"^  (data wait|forward|backward|optimizer)\s+([\d.]+) %", ran.out, flags=re.M))
    assert parts.keys() == {"data wait", "forward", "backward", "optimizer"}
    shares = [float(share) for share in re.findall(r"^  [a-z ]+\s([\d.]+) %\s+[\d.]+ ms$", ran.out, flags=re.M)]
    assert abs(sum(shares) - 100) < 1
    assert "aten::mm" in ran.out
    folder = tmp_path / "runs" / "profile-toy"
    assert "trace     runs/profile-toy/trace.json" in ran.out
    assert "perfetto" in ran.out
    (trace,) = folder.glob("trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    with (folder / "operators.csv").open(newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) > 5


def test_a_folder_that_cannot_be_made_is_named(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = tuner("probe", "-w", TOY, "--profile", "--out", "file/folder")
    assert ran.code == 2
    assert "--out: file/folder cannot be written" in ran.err

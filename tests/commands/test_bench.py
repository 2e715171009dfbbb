"""`tuner bench` measures a workload from data to training and draws what it found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import RunTuner
from tuner.commands.bench import around, sizes

TOY = "tests.toys:Toy"


def test_everything_is_measured_and_drawn(tuner: RunTuner, tmp_path: Path, cache: Path) -> None:
    before = set(cache.rglob("toy.json"))
    ran = tuner("bench", "-w", TOY, "--micro-batch", "8,1", "--seconds", "0.2s", "--json")
    assert ran.code == 0, ran.err
    result = ran.json
    inference = result["inference"]
    assert 0 < inference["latency_p50_s"] <= inference["latency_p95_s"]
    assert [speed["batch_size"] for speed in inference["speeds"]] == [1, 4, 16, 64]
    assert inference["peak_bytes"] > 0
    assert [point["micro_batch_size"] for point in result["training"]] == [1, 8]
    for point in result["training"]:
        assert point["outcome"] == "ok", point["message"]
        assert point["samples_per_s"]["value"] > 0
        assert point["peak_bytes"] > 0
    assert result["config"]["micro_batch_size"] == 8
    assert result["parameters"] > 0
    assert result["prepare_cold_s"] > 0
    assert result["prepared_bytes"] > 0
    assert set(cache.rglob("toy.json")) == before, "the user's own cache is left alone"
    assert result["picture"] == "runs/bench-toy/toy_benchmark.png"
    with Image.open(tmp_path / result["picture"]) as picture:
        assert picture.size == (1210, 880)
        assert np.asarray(picture.convert("L")).std() > 20, "something is drawn"
    assert "preparation" in ran.err
    assert "toy_benchmark.png" in ran.err


def test_a_failure_is_told_and_shown_in_its_place(tuner: RunTuner, tmp_path: Path) -> None:
    """The sixth call of the loss fails: in the middle of inference, and of training too."""
    words = ("-o", "fail=raise", "-o", "fail_call=5", "--micro-batch", "4", "--out", "here", "--json")
    ran = tuner("bench", "-w", TOY, *words)
    assert ran.code == 3
    assert "2 of 2 measurements failed" in ran.err
    assert "the toy was told to fail" in ran.err
    assert ran.json["training"][0]["outcome"] == ran.json["inference"]["outcome"] == "crashed"
    assert ran.json["prepare_cold_s"] > 0
    assert (tmp_path / "here" / "toy_benchmark.png").exists()


def test_sizes() -> None:
    assert sizes(" 8, 1,8") == (1, 8)
    assert around(8) == (2, 4, 8, 16, 32)
    assert around(1) == (1, 2, 4)

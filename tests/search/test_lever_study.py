"""A real study that may change the model: a wide toy against a narrow one, with real processes from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RunTuner

STUDY = """
workload: tests.toys:Toy
options: {width: 768}
space:
  options: {width: [32, 768]}
quality: {metric: valid_fit, higher_is_better: false, tolerance: 2.0, samples: 64, seeds: 3}
baseline: {micro_batch_size: 16, accumulation_steps: 1, threads: 1}
targets: {gpu_utilisation_min: 0.9, memory_share_max: 0.8, data_wait_max: 0.9, speedup_min: 50.0}
budget_s: 60
measure: {measure_s: 0.4, compute_s: 0.2, min_steps: 4}
gate: {min_pairs: 3, max_pairs: 4, finalists: 1, measure_s: 0.4}
lr: {enabled: false}
"""


@pytest.mark.slow
def test_a_narrow_model_of_equal_quality_is_shipped_aloud(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    ran = tuner(
        "optimize", "-w", "tests.toys:Toy", "--gpu", "cpu", "--spec", "study.yaml", "--study", "lever", "--json"
    )
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["decision"] == "winner", ran.err
    assert result["baseline"]["config"]["options"]["width"] == 768
    assert result["winner"]["config"]["options"]["width"] == 32
    assert result["gain"]["low"] > 1.0
    assert "The MODEL itself was changed: width 768 -> 32 (valid_fit" in result["reason"]
    assert (
        "the model itself may change: width 32, 768; only if valid_fit after 64 samples is at most 2 worse" in ran.err
    )
    assert "width=768, seed 0" in ran.err
    assert "quality" in result["seconds"]

    reached = {item["name"]: (item["wanted"], item["verdict"]) for item in result["targets"]}
    assert reached == {
        "memory": ("< 80 %", "ok"),
        "data wait": ("< 90 %", "ok"),
        "GPU utilisation": ("> 90 %", "unknown"),
        "speed-up": ("> 50x", "missed"),
    }
    assert "GPU utilisation > 90 %: unknown (no GPU); speed-up > 50x:" in ran.err
    best = (tmp_path / result["config_path"]).read_text()
    assert "width: 32" in best
    assert "MODEL" in best
    page = tuner("report", "lever", "--out", "page.html")
    assert page.code == 0, page.err
    text = (tmp_path / "page.html").read_text()
    assert "16x1 fp32 eager w0 width=32 is " in text
    assert "<th>speed-up</th><td>&gt; 50x</td>" in text

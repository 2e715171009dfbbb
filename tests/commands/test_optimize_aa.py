"""`tuner optimize --aa` on a toy, as a user runs it."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import RunTuner

STUDY = """
workload: tests.toys:Toy
space: {micro_batch_size: [4, 8], num_workers: [0]}
budget_s: 60
measure: {measure_s: 0.1, compute_s: 0.1}
gate: {min_pairs: 2, max_pairs: 2, finalists: 1, measure_s: 0.1, min_gain: 0.9}
lr: {enabled: false}
"""


def test_an_aa_run_finds_no_gain_and_writes_no_best(tuner: RunTuner, tmp_path: Path) -> None:
    """Only nearly twice the speed would count, and two runs of one configuration do not differ by that."""
    (tmp_path / "study.yaml").write_text(STUDY)
    ran = tuner("optimize", "-w", "tests.toys:Toy", "--gpu", "cpu", "--spec", "study.yaml", "--json", "--aa")
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["study"].endswith("-aa")
    assert result["decision"] == "no_gain"
    assert result["aa"]["false_gain"] is False
    assert result["aa"]["search_maximum"] > 0
    assert result["config_path"] is None
    assert not list(tmp_path.rglob("best.*.yaml"))
    assert "no gain, as it must be" in ran.err
    assert "would have claimed" in ran.err

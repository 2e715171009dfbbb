"""The guide's tiers: which one holds for a GPU, what lies over what, and that it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunTuner
from tuner.commands.setup import resolved, tier_for
from tuner.contract.documents import load_document
from tuner.contract.errors import ConfigError
from tuner.contract.gpu import gpu_profile
from tuner.contract.study import StudyFile

FILE = """
workload: tests.toys:Toy
options: {width: 8, depth: 1, samples: 100}
baseline: {micro_batch_size: 1, accumulation_steps: 4}
tiers:
  - {above_gib: 40, baseline: {micro_batch_size: 64}}
  - {above_gib: 8, baseline: {micro_batch_size: 16}, options: {width: 16, depth: 2}}
  - {above_gib: 4, baseline: {micro_batch_size: 8}}
presets:
  small: {options: {width: 4}, baseline: {accumulation_steps: 2}}
  flat: {tiers: []}
"""


def study(text: str = FILE) -> StudyFile:
    return load_document(StudyFile, text, "study.yaml")


@pytest.mark.parametrize(("gpu", "above"), [("p100", 8), ("t4", 8), ("a100-80", 40), ("a100-40", 8), ("cpu", 4)])
def test_the_first_tier_below_the_gpu_s_memory_holds_and_a_cpu_takes_the_last(gpu: str, above: float) -> None:
    tier = tier_for(study().tiers, gpu_profile(gpu))
    assert tier is not None
    assert tier.above_gib == above


def test_on_a_gpu_below_the_last_tier_the_baseline_stays() -> None:
    small = gpu_profile("p100").model_copy(update={"memory_bytes": 4 << 30})
    file, tier = resolved(study(), "", small)
    assert tier is None
    assert file.baseline == {"micro_batch_size": 1, "accumulation_steps": 4}


def test_the_preset_lies_over_the_tier_and_the_tier_over_the_file() -> None:
    file, _ = resolved(study(), "small", gpu_profile("p100"))
    assert file.options == {"width": 4, "depth": 2, "samples": 100}
    assert file.baseline == {"micro_batch_size": 16, "accumulation_steps": 2}


def test_a_preset_may_do_without_the_tiers() -> None:
    file, tier = resolved(study(), "flat", gpu_profile("p100"))
    assert tier is None
    assert file.options["width"] == 8


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ("[{above_gib: 4}, {above_gib: 8}]", "above_gib 8 comes after 4"),
        ("[{above_gib: 8}, {above_gib: 8}]", "above_gib 8 comes after 8"),
        ("[{above_gib: 8, options: {preset: full}}]", "the preset is chosen before the tier"),
        ("[{above_gib: 8, batch: 4}]", "tiers.0.batch: this key is not known"),
    ],
)
def test_tiers_in_a_wrong_order_or_with_wrong_keys_are_refused(tiers: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study(f"workload: x\ntiers: {tiers}")


def optimize(tuner: RunTuner, tmp_path: Path, text: str, *more: str) -> Any:
    (tmp_path / "mine.yaml").write_text(text)
    return tuner("optimize", "-w", "tests.toys:Toy", "--gpu", "p100", "--spec", "mine.yaml", "--budget", "1s", *more)


def test_optimize_says_which_tier_holds_and_describes_the_workload_with_it(tuner: RunTuner, tmp_path: Path) -> None:
    ran = optimize(tuner, tmp_path, FILE + QUICK, "-o", "depth=3", "--json")
    assert ran.code == 0, ran.err
    assert "tier above 8 GiB: micro-batch 16, width 16, depth 2 (here 3)" in ran.err
    assert ran.json["tier"] == "tier above 8 GiB: micro-batch 16, width 16, depth 2 (here 3)"
    config = ran.json["baseline"]["config"]
    assert (config["micro_batch_size"], config["accumulation_steps"]) == (16, 4)
    assert config["options"] == {"width": 16, "depth": 3, "samples": 100}
    assert "tier above 8 GiB: micro-batch 16" in (tmp_path / ran.json["config_path"]).read_text()


def test_a_probe_by_hand_takes_the_machine_s_own_tier(tuner: RunTuner, tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "toy"
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(FILE)
    words = ("-w", "tests.toys:Toy", "--kind", "compute", "--seconds", "0.2s")
    ran = tuner("probe", *words)
    assert ran.code == 0, ran.err
    assert "8x4 fp32" in ran.out


QUICK = """
measure: {measure_s: 0.1, compute_s: 0.1}
gate: {min_pairs: 2, max_pairs: 2, finalists: 1, measure_s: 0.1}
lr: {enabled: false}
"""
LEVER = "workload: tests.toys:Toy\nspace: {options: {width: [16, 32]}}\n"
QUALITY = "quality: {metric: valid_fit, higher_is_better: false, tolerance: 1.0, samples: 64}\n"


def test_options_that_change_the_model_need_a_condition(tuner: RunTuner, tmp_path: Path) -> None:
    ran = optimize(tuner, tmp_path, LEVER)
    assert ran.code == 2
    (line,) = ran.err.strip().splitlines()
    assert "space.options changes the model itself (width)" in line
    assert "quality: {metric: ..., tolerance: ..., samples: ...}" in line


def test_the_baseline_s_own_value_of_a_searched_option_must_be_known(tuner: RunTuner, tmp_path: Path) -> None:
    ran = optimize(tuner, tmp_path, LEVER + QUALITY)
    assert ran.code == 2
    assert "space.options.width: which of 16, 32 the baseline's model has is not said" in ran.err

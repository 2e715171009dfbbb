"""The chaos that a benchmark deals to real workers: on a toy here, on the four workloads in `make chaos-train`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.chaos_judging import differences, flips_found, unloadable
from benchmarks.chaos_train import Tally, attack, text_of
from tests.engine.engine_toys import answer, toy_config
from tuner.contract.config import Cadence
from tuner.contract.probe import ProbeKind, ProbeRequest, TrainPlan
from tuner.contract.trust import ANY_CODE
from tuner.engine import judging
from tuner.probe.runner import SubprocessRunner

TOY = "tests.toys:Toy"


def test_killed_again_and_again_a_run_ends_as_if_nobody_had_touched_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    tally, chance = Tally(TOY, steps=40), random.Random()
    with SubprocessRunner(tmp_path / "cache", log_dir=tmp_path / "idle", trust=ANY_CODE) as idle:
        idle.run(ProbeRequest(id="idle", kind=ProbeKind.DESCRIBE, workload=TOY, device="cpu"))  # not to be taken for it
        for _ in attack(tally, tmp_path, kills=4, flips=30, chance=chance, background=chance.random() < 0.5):
            pass
    assert tally.struck == 4
    assert tally.runs >= 1
    assert (tally.mismatches, tally.unloadable) == ([], [])
    assert (tally.flips, tally.found) == (30, 30)
    assert "4 kills struck" in text_of([tally])


def test_the_judge_sees_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_curves", "draw_quality"):
        monkeypatch.setattr(judging, name, lambda *_: None)
    config = toy_config({"samples": 200}, horizon_samples=160, cadence=Cadence(log_samples=32, checkpoint_samples=64))
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        plan = TrainPlan(out_dir=str(tmp_path / name))
        answer(ProbeKind.TRAIN, config.model_copy(update={"seed": seed}), train=plan)
    assert differences(tmp_path / "one", tmp_path / "same") == []
    assert "metrics.csv" in differences(tmp_path / "one", tmp_path / "other")
    table = tmp_path / "same" / "metrics.csv"
    table.write_text(table.read_text().replace("32,2,", "32,3,", 1))
    assert differences(tmp_path / "one", tmp_path / "same") == ["metrics.csv"]


def test_a_lost_or_damaged_state_is_counted(tmp_path: Path) -> None:
    assert unloadable(tmp_path / "checkpoints", had_one=False) == ("", False)
    assert unloadable(tmp_path / "checkpoints", had_one=True)[0] == "the checkpoints are gone"
    config = toy_config({"samples": 200}, horizon_samples=64, cadence=Cadence(checkpoint_samples=32))
    answer(ProbeKind.TRAIN, config, train=TrainPlan(out_dir=str(tmp_path)))
    assert unloadable(tmp_path / "checkpoints", had_one=True) == ("", True)
    assert flips_found(tmp_path / "checkpoints", 20, random.Random()) == 20
    next((tmp_path / "checkpoints").glob("step-*64/state.json")).unlink()
    assert "state.json" in unloadable(tmp_path / "checkpoints", had_one=True)[0]

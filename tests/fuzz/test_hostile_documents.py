"""Documents that nobody would write: never a traceback, never a hang, never an import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.hostile import changed, relaxed, run, values
from tests.store.rows import BASELINE, WINNER, example_promise
from tuner.contract.choice import Confirmation, Fallbacks, FellBack
from tuner.contract.measurement import Outcome
from tuner.contract.tuned import TunedConfig

JOB = BASELINE.model_copy(update={"workload": "graph"})
TUNED = TunedConfig(
    config=JOB,
    promise=example_promise(),
    runner_ups=(WINNER.model_copy(update={"workload": "graph"}),),
    runner_up_peaks=(1 << 20,),
    baseline=JOB,
)
STUDY: dict[str, Any] = {
    "workload": "graph",
    "options": {"preset": "tiny"},
    "baseline": {"micro_batch_size": 8, "loader": {"num_workers": 1}},
    "space": {"micro_batch_size": [4, 8], "num_workers": [0, 1], "precision": ["fp32", "bf16"], "fused": [True]},
    "budget_s": 60,
    "measure": {"measure_s": 1, "min_steps": 4},
    "gate": {"min_pairs": 3, "max_pairs": 6},
    "lr": {"samples": 16},
    "targets": {"speedup_min": 2.0},
    "tiers": [{"above_gib": 8, "baseline": {"micro_batch_size": 4}, "options": {"size": 1}}],
    "presets": {"tiny": {"budget_s": 10, "baseline": {"seed": 1}}},
}
KEPT = {
    "confirmed.json": Confirmation(
        asked=JOB.digest(), device="here", at="", sides=(), chosen=JOB, reason="", promise=example_promise()
    ),
    "fallback.json": Fallbacks(
        asked=JOB.digest(),
        steps=(FellBack(ended=JOB, outcome=Outcome.OOM_HOST, message="", samples=8, chosen=JOB, why="", at=""),),
    ),
}


def plain(value: Any) -> Any:
    return json.loads(value.model_dump_json())


def tuned_document(place: Path, text: str) -> None:
    (place / "best.yaml").write_text(text, encoding="utf-8")
    run(("train", "--config", "best.yaml", "--out", "run", "--no-confirm"))
    run(("train", "--config", "best.yaml", "--out", "run", "--confirm", "--nproc", "2", "--json"))
    run(("explain", "--config", "best.yaml"))


def study_document(place: Path, text: str) -> None:
    (place / "mine.yaml").write_text(text, encoding="utf-8")
    run(("optimize", "-w", "graph", "--gpu", "cpu", "--spec", "mine.yaml", "--fresh"))
    (place / "studies" / "graph").mkdir(parents=True, exist_ok=True)
    (place / "studies" / "graph" / "study.yaml").write_text(text, encoding="utf-8")
    run(("train", "-w", "graph", "--out", "run"))
    run(("probe", "-w", "graph", "--set", "micro_batch_size=4"))


def kept_document(place: Path, name: str, text: str) -> None:
    (place / "good.yaml").write_text(json.dumps(plain(JOB)), encoding="utf-8")
    (place / "run").mkdir(exist_ok=True)
    for other in KEPT:
        (place / "run" / other).unlink(missing_ok=True)
    (place / "run" / name).write_text(text, encoding="utf-8")
    run(("train", "--config", "good.yaml", "--out", "run"))


tuned_texts = st.one_of(changed(plain(TUNED)), changed(plain(JOB)), values.map(repr), values.map(json.dumps))
study_texts = st.one_of(changed(STUDY), values.map(repr))
kept_texts = st.sampled_from(sorted(KEPT)).flatmap(lambda name: st.tuples(st.just(name), changed(plain(KEPT[name]))))


@settings(relaxed, max_examples=80)
@given(text=tuned_texts)
def test_tuned_files(place: Path, text: str) -> None:
    tuned_document(place, text)


@settings(relaxed, max_examples=60)
@given(text=study_texts)
def test_study_files(place: Path, text: str) -> None:
    study_document(place, text)


@settings(relaxed, max_examples=60)
@given(drawn=kept_texts)
def test_kept_choices(place: Path, drawn: tuple[str, str]) -> None:
    kept_document(place, *drawn)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(relaxed, max_examples=1500)
@given(text=tuned_texts)
def test_many_tuned_files(place: Path, text: str) -> None:
    tuned_document(place, text)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(relaxed, max_examples=600)
@given(text=study_texts)
def test_many_study_files(place: Path, text: str) -> None:
    study_document(place, text)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(relaxed, max_examples=600)
@given(drawn=kept_texts)
def test_many_kept_choices(place: Path, drawn: tuple[str, str]) -> None:
    kept_document(place, *drawn)

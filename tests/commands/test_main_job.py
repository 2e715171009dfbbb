"""The main job on a toy workload, as a user runs it: optimize -> best.yaml -> train, killed and gone on with."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil

from tests.conftest import Ran, RunTuner, tuner_environment
from tuner.store.trials import open_storage

TOY = "tests.toys:Toy"
QUICK = """
workload: tests.toys:Toy
space: {micro_batch_size: [4, 8, 16], fused: [false, true], num_workers: [0, 1], lr: [0.001, 0.003]}
budget_s: 90
measure: {measure_s: 0.3, compute_s: 0.2}
gate: {min_pairs: 3, max_pairs: 4, finalists: 1, measure_s: 0.3}
lr: {samples: 256, seeds: 1}
"""


def optimize(tuner: RunTuner, tmp_path: Path, *more: str) -> Ran:
    (tmp_path / "study.yaml").write_text(QUICK)
    return tuner("optimize", "-w", TOY, "--gpu", "cpu", "--spec", "study.yaml", "--probes", "6", "--json", *more)


def test_optimize_then_train_then_look(tuner: RunTuner, tmp_path: Path) -> None:
    ran = optimize(tuner, tmp_path)
    assert ran.code == 0, ran.err
    result = ran.json
    assert result["decision"] in ("winner", "no_gain")
    assert result["baseline"]["config"]["micro_batch_size"] == 8
    assert result["winner"]["samples_per_s"]["low"] < result["winner"]["samples_per_s"]["value"]
    kept = result["winner"]["config"]
    assert kept["micro_batch_size"] * kept["accumulation_steps"] == 16
    assert kept["optimizer"]["lr"] == result["baseline"]["config"]["optimizer"]["lr"]
    best = tmp_path / result["config_path"]
    assert best.is_file()

    trained = tuner("train", "--config", str(best), "--allow-code", "--max-samples", "1600", "--out", "run", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["samples"] >= 1600
    assert trained.json["promised_samples_per_s"] is not None
    more = tuner("train", "--config", str(best), "--allow-code", "--max-samples", "3200", "--out", "run", "--json")
    assert more.json["resumed_from"] == trained.json["samples"]

    second = optimize(tuner, tmp_path)
    assert second.code == 0, second.err
    assert second.json["probes"] == result["probes"], "the same command after the end measures nothing again"
    assert second.json["decision"] == result["decision"]

    study = result["study"]
    shown = tuner("show", study, "--probes")
    assert shown.code == 0
    assert "baseline" in shown.out
    assert "run " in shown.out
    report = tuner("report", study, "--out", "page.html")
    assert report.code == 0, report.err
    assert (tmp_path / "page.html").stat().st_size > 1 << 20
    again = tuner("export", study, "--format", "yaml", "--out", "again.yaml")
    assert again.code == 0, again.err
    assert "micro_batch_size" in (tmp_path / "again.yaml").read_text()
    assert tuner("export", study, "--format", "csv").out.count("\n") > 5
    assert_pareto_study(f"sqlite:///{tmp_path}/studies/studies.db", study)


def assert_pareto_study(url: str, name: str) -> None:
    """What the dashboard shows beside the study."""
    study = optuna.load_study(study_name=f"{name}-pareto", storage=open_storage(url))
    assert study.best_trials
    assert study.metric_names is not None
    assert study.metric_names[:2] == ["samples/s", "peak MiB"]
    assert [trial.user_attrs["baseline"] for trial in study.trials].count(True) == 1


def test_a_tiny_budget_ends_with_an_honest_answer(tuner: RunTuner, tmp_path: Path) -> None:
    ran = optimize(tuner, tmp_path, "--budget", "1s")
    assert ran.code == 0, ran.err
    assert ran.json["decision"] == "no_gain"
    assert "budget" in (ran.json["reason"] + " ".join(ran.json["notes"])).lower()
    assert ran.json["config_path"]


def test_a_real_out_of_memory_is_a_typed_outcome(tuner: RunTuner, tmp_path: Path) -> None:
    words = ("-w", TOY, "-o", "width=4096", "--set", "micro_batch_size=4096", "--set", "effective_batch_size=4096")
    ran = tuner("probe", *words, "--kind", "compute", "--seconds", "0.2s", "--memory-cap", "64MiB", "--json")
    assert ran.code == 3
    assert ran.json["points"][0]["outcome"] == "oom_host"
    assert "Traceback" not in ran.err.splitlines()[0]


def test_equivalence_is_shown_and_its_absence_found_out(tuner: RunTuner) -> None:
    good = tuner("probe", "-w", TOY, "--kind", "equivalence")
    assert good.code == 0, good.err
    assert "equivalent" in good.out
    bad = tuner("probe", "-w", "tests.toys:BatchNormToy", "--kind", "equivalence")
    assert bad.code == 3
    assert "2 x BatchNorm1d" in bad.err
    assert "use GroupNorm or LayerNorm" in bad.err


def start(tmp_path: Path, cache: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tuner.cli", *words],
        cwd=tmp_path,
        env=tuner_environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(folder: Path, study: str, rows: int) -> int:
    """Until the store has so many; asked as the database's other readers ask it, so that the tuner has its core."""
    path = folder / "studies" / "studies.db"
    for _ in range(400):
        found = 0
        if path.exists():
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(path)) as database:
                question = "SELECT count(*) FROM tuner_probe JOIN tuner_study s ON s.id = study_id WHERE s.name = ?"
                (found,) = database.execute(question, (study,)).fetchone()
        if found >= rows:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{study}: never reached {rows} rows")


def session_processes(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def test_a_killed_tuner_goes_on_and_repeats_nothing(tuner: RunTuner, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "study.yaml").write_text(QUICK)
    own = ("--study", "killed", "--probes", "6", "--json")
    words = ("optimize", "-w", TOY, "--gpu", "cpu", "--spec", "study.yaml", *own)
    running = start(tmp_path, cache, *words)
    before = wait_for_rows(tmp_path, "killed", 2)
    running.kill()
    running.communicate()
    ran = tuner(*words)
    assert ran.code == 0, ran.err
    assert "resumed" in ran.err
    csv = tuner("export", "killed", "--format", "csv").out.splitlines()
    assert len(csv) - 1 > before
    assert sum(",baseline," in line for line in csv) == 1


def test_ctrl_c_leaves_nothing_behind(tuner: RunTuner, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "study.yaml").write_text(QUICK)
    words = ("optimize", "-w", TOY, "--gpu", "cpu", "--spec", "study.yaml", "--study", "stopped")
    running = start(tmp_path, cache, *words)
    wait_for_rows(tmp_path, "stopped", 1)
    children = psutil.Process(running.pid).children(recursive=True)
    assert children
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not session_processes(running.pid)

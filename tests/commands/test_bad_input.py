"""Bad input gets one clear line naming the option, the rule and the value, and a non-zero exit code."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from tests.conftest import RunTuner

TOY = "tests.toys:Toy"

REFUSED = [
    (("optimize", "-w", "latent_cfgg"), "latent_cfg"),
    (("optimize", "-w", "no.such.module:Job"), "no.such.module"),
    (("optimize", "-w", TOY, "--gpu", "p101"), "'p101'; known: cpu, p100"),
    (("optimize", "-w", TOY, "--budget", "soon"), "--budget: a duration above zero"),
    (("optimize", "-w", TOY, "--budget", "0s"), "--budget: a duration above zero"),
    (("optimize", "-w", TOY, "--memory-cap", "lots"), "--memory-cap: a size above zero"),
    (("optimize", "-w", TOY, "--micro-batch", "0"), "--micro-batch: a number from 1"),
    (("optimize", "-w", TOY, "--micro-batch", "5"), "5 does not divide it (16 / 5 leaves 1)"),
    (("optimize", "-w", TOY, "--effective-batch", "some"), "--effective-batch: keep, free, or a number"),
    (("optimize", "-w", TOY, "--sampler", "magic"), "--sampler: unknown value 'magic'; known: staged, tpe, gp, random"),
    (("optimize", "-w", TOY, "--objective", "speed"), "known: time, throughput, goodput, memory, energy"),
    (
        ("optimize", "-w", TOY, "--objective", "energy", "--gpu", "cpu"),
        "--objective energy: nothing tells the power of",
    ),
    (("optimize", "-w", TOY, "--aa", "--effective-batch", "free"), "--effective-batch free: an A/A run keeps"),
    (("optimize", "-w", TOY, "--study", "mine-pareto"), "--study mine-pareto: names ending in -pareto are the store's"),
    (("optimize", "-w", TOY, "--study", "mine-aa"), "--study mine-aa: names ending in -aa are for A/A runs"),
    (
        ("optimize", "-w", TOY, "--tune-lr"),
        "--tune-lr: the study lists no rate besides the baseline's 0.001; write some",
    ),
    (("optimize", "-w", TOY, "--data", "nowhere"), "--data: nowhere does not exist"),
    (("optimize", "-w", TOY, "--option", "width"), "--option: KEY=VALUE is expected"),
    (("optimize", "-w", TOY, "--storage", "nonsense"), "nonsense"),
    (("optimize", "-w", TOY, "--isolation", "none"), "--isolation: unknown value 'none'"),
    (("probe", "-w", TOY, "--set", "batch=4"), "--set: unknown knob 'batch'; known:"),
    (("probe", "-w", TOY, "--set", "micro_batch_size=0"), "--set micro_batch_size: a number from 1"),
    (("probe", "-w", TOY, "--set", "precision=fp8"), "--set precision: unknown value 'fp8'; known: fp32"),
    (("probe", "-w", TOY, "--kind", "train"), "--kind: train is not for use by hand"),
    (("train", "--config", "missing.yaml"), "missing.yaml: cannot be read: No such file"),
    (("train",), "--config FILE, or by --workload NAME"),
    (("train", "--config", "a.yaml", "-w", TOY), "one of the two"),
    (("train", "--config", "a.yaml", "--preset", "tiny"), "--preset: it belongs to --workload"),
    (("train", "-w", TOY, "--max-hours", "1", "--max-minutes", "5"), "--max-hours and --max-minutes: give one"),
    (("train", "-w", "latent_cfgg"), "latent_cfg"),
    (("bench", "-w", TOY, "--micro-batch", "8,many"), "--micro-batch: numbers from 1 are expected"),
    (("bench", "-w", TOY, "--seconds", "0"), "--seconds: a duration above zero"),
    (("probe", "-w", TOY, "--out", "here"), "--out: it belongs to --profile"),
    (("probe", "-w", TOY, "--profile", "--kind", "lr"), "--profile: it is a kind of its own"),
    (("show", "nothing"), "study 'nothing' is not in the store"),
    (("report", "nothing"), "study 'nothing' is not in the store"),
    (("export", "nothing", "--format", "xml"), "--format: unknown format 'xml'; known: yaml, json, csv"),
]


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_refused_with_one_clear_line(tuner: RunTuner, words: tuple[str, ...], said: str) -> None:
    ran = tuner(*words)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_an_unknown_option_names_the_nearest(tuner: RunTuner) -> None:
    ran = tuner("optimize", "--bugdet", "3m")
    assert ran.code == 2
    assert "--budget" in ran.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("workload: [", "not readable as YAML"),
        ("workload: latent_cfg\nmicro_batch_size: 0\n", "micro_batch_size"),
        ("workload: latent_cfg\nmicro_batch: 8\n", "micro_batch: this key is not known here"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("- 1\n", "a mapping of keys to values is expected"),
    ],
)
def test_a_broken_configuration_names_file_path_and_rule(tuner: RunTuner, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    ran = tuner("train", "--config", "job.yaml")
    assert ran.code == 2
    assert ran.err.startswith("tuner: job.yaml: ")
    assert said in ran.err


def test_a_yaml_that_names_code_needs_permission(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "workload: tests.canary:Job\nmicro_batch_size: 8\nhorizon_samples: 64\noptimizer: {lr: 0.1}\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "canary.py").write_text("open('imported', 'w')\n")
    ran = tuner("train", "--config", "job.yaml")
    assert ran.code == 2
    assert "--allow-code" in ran.err
    assert not (tmp_path / "imported").exists()


def test_a_corrupt_store_is_refused_and_left_as_it_is(tuner: RunTuner, tmp_path: Path) -> None:
    store = tmp_path / "studies.db"
    store.write_bytes(b"this is not a database, but somebody's file" * 100)
    before = store.read_bytes()
    ran = tuner("show", "--storage", f"sqlite:///{store}")
    assert ran.code == 2
    assert "studies.db" in ran.err
    assert store.read_bytes() == before


def test_a_foreign_database_keeps_its_tables(tuner: RunTuner, tmp_path: Path) -> None:
    store = tmp_path / "mine.db"
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        connection.execute("create table recipes (name text)")
        connection.execute("insert into recipes values ('bread')")
    before = store.read_bytes()
    for words in (("show",), ("runs",), ("optimize", "-w", TOY, "--gpu", "cpu"), ("train", "-w", TOY)):
        ran = tuner(*words, "--storage", f"sqlite:///{store}")
        assert ran.code == 2, ran.err
        assert "it is the database of another program (it holds recipes); nothing in it was changed" in ran.err
        assert len(ran.err.splitlines()) == 1
    assert store.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"mine.db"}
    with sqlite3.connect(store) as connection:
        assert connection.execute("select name from recipes").fetchall() == [("bread",)]

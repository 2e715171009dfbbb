"""Data known by its content: a run or a study goes on with the data it was begun with, wherever they lie, and is
refused other data unless the user says how to go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ran, RunTuner, tuner_environment
from tests.forked_cli import ForkedCli

TOY = "tests.commands.data_toy:DataToy"
ROWS = [(f"text {number}", number % 2) for number in range(40)]
SPEC = """
workload: tests.commands.data_toy:DataToy
space: {micro_batch_size: [8, 16]}
budget_s: 40
measure: {measure_s: 0.2, compute_s: 0.1}
gate: {min_pairs: 2, max_pairs: 2, finalists: 1, measure_s: 0.2}
lr: {enabled: false}
"""


def write_table(path: Path, rows: list[tuple[str, int]], header: str = "text,label") -> None:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n", encoding="utf-8")


def other_texts(table: Path) -> None:
    write_table(table, [(text.upper(), label) for text, label in ROWS])


def flipped_labels_with_the_old_times(table: Path) -> None:
    """The same size, and the times put back, as `cp -p` and rsync do."""
    about = table.stat()
    write_table(table, [(text, 1 - label) for text, label in ROWS])
    os.utime(table, ns=(about.st_atime_ns, about.st_mtime_ns))


def more_rows(table: Path) -> None:
    write_table(table, [*ROWS, *ROWS])


def another_column(table: Path) -> None:
    write_table(table, ROWS, header="comment,label")


Change = Callable[[Path], None]
CHANGES: dict[str, tuple[Change, str]] = {
    "other texts": (other_texts, "41 lines, 401 bytes as before, but other content (SHA-256 "),
    "flipped labels": (flipped_labels_with_the_old_times, "41 lines, 401 bytes as before, but other content (SHA-256 "),
    "more rows": (more_rows, "41 lines, 401 bytes then, 81 lines, 791 bytes now"),
    "renamed column": (another_column, "41 lines, 401 bytes then, 41 lines, 404 bytes now, other columns in its first"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, forked_cli: ForkedCli) -> Path:
    """A folder with a table, and a run that has learned 640 samples from it."""
    folder = tmp_path_factory.mktemp("trained")
    write_table(folder / "table.csv", ROWS)
    words = ("train", "-w", TOY, "--data", "table.csv", "--out", "run", "--max-samples", "640")
    env, aside = tuner_environment(cache), tmp_path_factory.mktemp("said")
    code = forked_cli.run(words, cwd=folder, env=env, aside=aside, timeout_s=200.0)
    assert code == 0, (aside / "err").read_text()
    return folder


@pytest.fixture
def train(trained: Path, tuner: RunTuner, tmp_path: Path) -> Callable[..., Ran]:
    """The same command, in a copy of that folder: the table has moved, and is still the same."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def run(*words: str, data: str = "table.csv", samples: int = 1280) -> Ran:
        known = ("--data", data, "--out", "run", "--max-samples", str(samples))
        return tuner("train", "-w", TOY, *known, *words)

    return run


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_not_go_on_with_other_data(train: Callable[..., Ran], tmp_path: Path, what: str) -> None:
    change, told = CHANGES[what]
    before = sorted((tmp_path / "run").rglob("*"))
    change(tmp_path / "table.csv")
    ran = train()
    assert ran.code == 2, ran.out + ran.err
    (line,) = ran.err.strip().splitlines()
    assert line.startswith("tuner: run: its checkpoints were trained on other data. --data ")
    assert f"table.csv: {told}" in line
    assert "--fresh" in line
    assert "--accept-new-data" in line
    assert sorted((tmp_path / "run").rglob("*")) == before, "nothing of the old run was touched"


def test_moved_touched_and_renamed_data_are_the_same(train: Callable[..., Ran], tmp_path: Path) -> None:
    os.utime(tmp_path / "table.csv", (1, 1))
    (tmp_path / "table.csv").rename(tmp_path / "renamed.csv")
    ran = train("--json", data="renamed.csv")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_from"] == 640
    assert ran.json["best"]["samples"] > 0
    assert "counted anew" not in ran.err
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["data"][0]["path"].endswith("renamed.csv")
    assert kept["earlier"] == []


def test_accepted_new_data_are_noted_and_the_best_is_counted_anew(train: Callable[..., Ran], tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", [(text, 9) for text, _ in ROWS])
    ran = train("--accept-new-data", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["resumed_from"] == 640
    assert "going on with other data than the checkpoint's: --data " in ran.err
    assert ran.json["best"]["samples"] > 640, "what was the best on the old data is not the best on the new"
    assert list((tmp_path / "run" / "checkpoints").glob("best-before-*"))
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [item["until_samples"] for item in kept["earlier"]] == [640]
    again = train("--json", samples=1600)
    assert again.code == 0, again.err
    assert again.json["best"]["samples"] > 640, "nor is it after another resume"


def test_fresh_starts_beside_and_leaves_the_old_run_alone(train: Callable[..., Ran], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    more_rows(tmp_path / "table.csv")
    ran = train("--fresh", "--json", samples=320)
    assert ran.code == 0, ran.err
    assert ran.json["resumed_from"] == 0
    assert ran.json["out_dir"].endswith("run-2")
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_is_known_by_all_its_files(tuner: RunTuner, tmp_path: Path) -> None:
    """And what an option of the workload's own names is known as --data is. What a run writes there is no data."""
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (folder / name).write_text(name)
    write_table(tmp_path / "table.csv", ROWS)
    words = ("train", "-w", TOY, "--data", "texts", "-o", "extra=table.csv", "--out", "texts/run", "--max-samples")
    assert tuner(*words, "32").code == 0
    (folder / ".DS_Store").write_text("opened in a file manager")
    same = tuner(*words, "64")
    assert same.code == 0, same.err
    more_rows(tmp_path / "table.csv")
    (folder / "a.txt").unlink()
    (folder / "sub" / "c.txt").write_text("9.txt")
    (folder / "d.txt").write_text("new")
    ran = tuner(*words, "96")
    assert ran.code == 2, ran.err
    assert "-o extra=table.csv: 41 lines, 401 bytes then, 81 lines, 791 bytes now" in ran.err
    assert "; changed: sub/c.txt; new: d.txt; gone: a.txt" in ran.err


def test_a_study_does_not_ship_figures_of_other_data(tuner: RunTuner, tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", ROWS)
    (tmp_path / "study.yaml").write_text(SPEC)
    search = ("--gpu", "cpu", "--spec", "study.yaml", "--probes", "2", "--json", "--out", "b.yaml")
    words = ("optimize", "-w", TOY, *search)
    first = tuner(*words, "--data", "table.csv")
    assert first.code == 0, first.err
    (tmp_path / "table.csv").rename(tmp_path / "moved.csv")
    moved = tuner(*words, "--data", "moved.csv")
    assert moved.code == 0, moved.err
    assert moved.json["probes"] == first.json["probes"], "the data are the same: nothing is measured again"
    shipped = (tmp_path / "b.yaml").read_text()
    assert "moved.csv" in shipped
    assert "table.csv" not in shipped

    more_rows(tmp_path / "moved.csv")
    notice = tuner("train", "--config", "b.yaml", "--allow-code", "--max-samples", "320", "--out", "run")
    assert notice.code == 0, notice.err
    assert "tuned on other data, so its promise may not hold: --data " in notice.out

    (tmp_path / "b.yaml").unlink()
    ran = tuner(*words, "--data", "moved.csv")
    assert ran.code == 2, ran.err
    assert "it was measured on other data. --data " in ran.err
    assert "41 lines, 401 bytes then, 81 lines, 791 bytes now" in ran.err
    assert not (tmp_path / "b.yaml").exists()

    accepted = tuner(*words, "--data", "moved.csv", "--accept-new-data")
    assert accepted.code == 0, accepted.err
    assert "earlier figures are of the old data" in accepted.err
    assert "401 bytes then, 81 lines" in " ".join((tmp_path / "b.yaml").read_text().split())
    assert tuner(*words, "--data", "moved.csv").code == 0, "accepted once is accepted"


def test_data_changed_while_a_study_measures_ship_nothing(tuner: RunTuner, tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", ROWS)
    (tmp_path / "study.yaml").write_text(SPEC.replace("DataToy", "Vandal"))
    words = ("-w", TOY.replace("DataToy", "Vandal"), "--gpu", "cpu", "--spec", "study.yaml", "--probes", "1")
    own = ("--data", "table.csv", "-o", "extra=replaces the data")
    ran = tuner("optimize", *words, *own, "--out", "best.yaml")
    assert ran.code == 2, ran.out + ran.err
    assert "the data were changed while study " in ran.err
    assert not (tmp_path / "best.yaml").exists()

"""Reading a store never writes: nothing is made beside it or in it, a foreign file stays as it is, and one bad row
costs its own line."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, RunTuner
from tests.store.rows import (
    BASELINE,
    WINNER,
    example_decision,
    example_exchanges,
    example_promise,
    example_result,
    example_spec,
)
from tuner.contract.errors import StoreError
from tuner.contract.production import RunStatus
from tuner.probe.launch import worker_environment
from tuner.store.engine import parse_url, shown
from tuner.store.store import StudyStore

READERS = (
    ("show",),
    ("show", "mine", "--probes"),
    ("runs",),
    ("explain", "mine"),
    ("export", "mine", "--format", "csv"),
    ("report", "mine", "--out", "page.html"),
)


def filled(path: Path) -> str:
    url = f"sqlite:///{path}"
    with StudyStore.open(url) as store:
        store.create_study(example_spec("mine"))
        store.create_study(example_spec("other"))
        for item in example_exchanges():
            store.add_reply("mine", item.request, item.reply, item.trial)
        store.save_decision("mine", example_decision(), {})
        store.save_decision("other", example_decision(), {})
        run = store.add_run(WINNER, "runs/one", study="mine", promise=example_promise(), run_id="aaaa")
        store.finish_run(run.id, RunStatus.FINISHED, example_result())
        store.add_run(BASELINE, "runs/two", study="mine", run_id="bbbb")
    return url


def changed(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def test_reading_changes_no_file_and_makes_none(tuner: RunTuner, tmp_path: Path) -> None:
    folder = tmp_path / "stores"
    folder.mkdir()
    url = filled(folder / "studies.db")
    before = state(folder)
    assert set(before) == {"studies.db"}
    for words in READERS:
        ran = tuner(*words, "--storage", url)
        assert ran.code == 0, ran.err
        assert state(folder) == before, words


def test_a_store_in_a_folder_that_nobody_may_write_to_is_shown() -> None:
    """As another user where this one is root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        url = filled(folder / "studies.db")
        (folder / "studies.db").chmod(0o444)
        folder.chmod(0o555)
        other = os.geteuid() == 0 and shutil.which("setpriv") is not None
        as_other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if other else []
        code = f"from tuner.store.store import StudyStore; print(len(StudyStore.read({url!r}).studies()))"
        command = [*as_other, sys.executable, "-c", code]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/", env=env)
        folder.chmod(0o755)
    assert ran.stdout.strip() == "2", ran.stderr


def test_what_a_writer_has_not_yet_written_back_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    with StudyStore.open(f"sqlite:///{path}") as writer:
        writer.create_study(example_spec("mine"))
        assert path.with_name("studies.db-wal").exists()
        with StudyStore.read(f"sqlite:///{path}") as reader:
            assert [study.name for study in reader.studies()] == ["mine"]
            with pytest.raises(StoreError):
                reader.create_study(example_spec("third"))


@pytest.mark.parametrize("words", [*READERS, ("doctor",), ("dashboard",)])
def test_a_mistyped_path_makes_nothing(tuner: RunTuner, tmp_path: Path, words: tuple[str, ...]) -> None:
    ran = tuner(*words, "--storage", f"sqlite:///{tmp_path}/typo/studies.db")
    assert ran.code == (0 if words == ("doctor",) else 2), ran.err
    assert "there is no such store; correct --storage" in ran.err + ran.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("show",), ("runs",), ("doctor",)])
def test_before_the_first_study_nothing_is_made_either(tuner: RunTuner, tmp_path: Path, words: tuple[str, ...]) -> None:
    ran = tuner(*words)
    assert ran.code == 0, ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tables", [("recipes",), ("studies",), ("trials", "notes"), ("tuner_study",)])
def test_a_foreign_file_is_refused_untouched(tmp_path: Path, tables: tuple[str, ...]) -> None:
    path = tmp_path / "mine.db"
    for name in tables:
        changed(path, f"CREATE TABLE {name} (name text)")
    before = state(tmp_path)
    for opened in (StudyStore.read, StudyStore.open):
        with pytest.raises(StoreError, match=r"another program \(it holds .*\); nothing in it was changed"):
            opened(f"sqlite:///{path}")
    assert state(tmp_path) == before


BAD = [
    ("UPDATE tuner_study SET decision = '{' WHERE name = 'other'", "study other"),
    ("UPDATE tuner_study SET decision = '[1]' WHERE name = 'other'", "study other"),
    ("UPDATE tuner_study SET spec = '{}' WHERE name = 'other'", "study other"),
    ("UPDATE tuner_study SET spec = x'ff' WHERE name = 'other'", "study other"),
    ("UPDATE tuner_run SET config = 'no JSON' WHERE id = 'bbbb'", "run bbbb"),
    ("UPDATE tuner_run SET config = '[]' WHERE id = 'bbbb'", "run bbbb"),
    ("UPDATE tuner_run SET status = 'odd' WHERE id = 'bbbb'", "run bbbb"),
    ("UPDATE tuner_run SET started_at = x'ff00' WHERE id = 'bbbb'", ""),
    ("UPDATE tuner_run SET promise = '{\"hours\": 0}' WHERE id = 'bbbb'", "run bbbb"),
    ("UPDATE tuner_run SET out_dir = 'a' || char(0) || 'b' WHERE id = 'bbbb'", ""),
    ("UPDATE tuner_run SET out_dir = replace(hex(zeroblob(2000)), '0', 'x') WHERE id = 'bbbb'", ""),
    ("UPDATE tuner_run SET out_dir = replace(hex(zeroblob(2000)), '0', 'x'), status = 'stopped' WHERE id = 'bbbb'", ""),
    ("UPDATE tuner_probe SET outcome = 'odd' WHERE number = 1", "probe 1 of study mine"),
    ("UPDATE tuner_probe SET \"values\" = '[[[' WHERE number = 1", "probe 1 of study mine"),
    ("UPDATE tuner_probe SET seconds = 'long' WHERE number = 1", "probe 1 of study mine"),
    ("UPDATE tuner_probe SET config = replace(config, '8', '-8') WHERE number = 1", "probe 1 of study mine"),
]


@pytest.mark.parametrize(("statement", "named"), BAD)
def test_one_bad_row_costs_its_own_line(tuner: RunTuner, tmp_path: Path, statement: str, named: str) -> None:
    path = tmp_path / "studies.db"
    url = filled(path)
    changed(path, statement)
    said = ""
    shown = ((("show",), "mine"), (("show", "mine", "--probes"), "aaaa"), (("runs",), "aaaa"), (("runs", "a"), "aaaa"))
    assert tuner("runs", "bbbb", "--storage", url).code in (0, 2)
    for words, good in shown:
        ran = tuner(*words, "--storage", url)
        assert ran.code == 0, ran.err
        assert good in ran.out
        assert "Traceback" not in ran.err
        said += ran.out
    if named:
        assert f"{named} cannot be read: " in said


def test_a_name_that_is_no_text_is_named_among_the_known(tuner: RunTuner, tmp_path: Path) -> None:
    url = filled(tmp_path / "studies.db")
    changed(tmp_path / "studies.db", "UPDATE tuner_study SET name = x'00' WHERE name = 'other'")
    for words in (("show", "nothing"), ("explain", "nothing"), ("export", "nothing"), ("report", "nothing")):
        ran = tuner(*words, "--storage", url)
        assert ran.code == 2, ran.err
        assert "study 'nothing' is not in the store; known: mine" in ran.err


def test_a_bad_decision_does_not_hide_its_study(tuner: RunTuner, tmp_path: Path) -> None:
    url = filled(tmp_path / "studies.db")
    changed(tmp_path / "studies.db", "UPDATE tuner_study SET decision = '{}' WHERE name = 'mine'")
    ran = tuner("show", "mine", "--storage", url)
    assert ran.code == 0, ran.err
    assert "decision of study mine cannot be read: " in ran.out
    for words in (("explain", "mine"), ("report", "mine", "--out", "page.html")):
        ran = tuner(*words, "--storage", url)
        assert ran.code == 0, ran.err
        assert "decision of study mine cannot be read: " in ran.out
    ran = tuner("export", "mine", "--storage", url)
    assert ran.code == 2, "there is nothing to write"
    assert len(ran.err.splitlines()) <= 5


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE tuner_run SET status = 'paused' WHERE id = 'bbbb'", "run bbbb"),
        ("UPDATE tuner_run SET result = '{\"samples\": 1, \"new\": 2}' WHERE id = 'aaaa'", "run aaaa"),
        ("UPDATE tuner_probe SET outcome = 'melted' WHERE number = 1", "probe 1 of study mine"),
        ("UPDATE tuner_probe SET seconds = 'NaN' WHERE number = 1", "probe 1 of study mine"),
        ('UPDATE tuner_probe SET "values" = \'{"x": NaN\' WHERE number = 1', "probe 1 of study mine"),
        ("UPDATE tuner_probe SET measurement = char(0) || '{}' WHERE number = 2", "probe 2 of study mine"),
        ("UPDATE tuner_study SET decision = replace(decision, '\"kind\"', '\"sort\"')", "decision of study mine"),
    ],
)
def test_one_bad_row_costs_its_own_line_in_what_is_made_of_a_study(
    tuner: RunTuner, tmp_path: Path, statement: str, named: str
) -> None:
    url = filled(tmp_path / "studies.db")
    changed(tmp_path / "studies.db", statement)
    said = ""
    for words in (("explain", "mine"), ("report", "mine", "--out", "page.html"), ("export", "mine", "--format", "csv")):
        ran = tuner(*words, "--storage", url)
        assert ran.code == 0, ran.err
        said += ran.out + ran.err
    assert f"{named} cannot be read: " in said
    assert (tmp_path / "page.html").stat().st_size > 1 << 20


SECRETS = [
    "postgresql://me:hun@ter2@127.0.0.1:1/db",
    "postgresql://me:hun@ter2@127.0.0.1:notaport/db",
    "postgresql://me:@hunter2@host/db",
    "postgresql://me:hun@t/er2@host/db",
    "postgresql://me:hun/t@er2@host/db",
    "mysql+pymysql://me:hun@ter2@host/db",
    "me:hun@ter2",
    "me/hun@ter2",
    "postgresql://me:hunter2%40x@127.0.0.1:1/db",
    "nosuch://me:hun@ter2@host/db",
]


@pytest.mark.parametrize("url", SECRETS)
def test_no_part_of_a_password_is_printed(tuner: RunTuner, url: str) -> None:
    ran = tuner("show", "--storage", url, timeout_s=60)
    assert ran.code in (2, 75), "a server that is down may come back"
    assert len(ran.err.splitlines()) == 1
    for part in ("hun", "ter2", "er2", "%40x"):
        assert part not in ran.err.replace("%40 (", "")


def test_an_encoded_password_works_and_is_hidden() -> None:
    url = parse_url("postgresql://me:a%40b%2Fc@host/db?application_name=me@work")
    assert url.password == "a@b/c"
    assert "***" in shown(url)


@pytest.mark.parametrize("value", ["postgresql://me:p/w@h/db", "postgresql://h/db?password=x", "mysql://u:p@ss@h/d"])
def test_no_worker_is_given_a_store_s_password(tmp_path: Path, value: str) -> None:
    assert "MY_DB" not in worker_environment({"MY_DB": value}, tmp_path, 1)
    assert "PLACE" in worker_environment({"PLACE": "https://example.org/a@b"}, tmp_path, 1)

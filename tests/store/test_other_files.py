"""What `--storage` may name by mistake: read, it is refused in one line, and is afterwards as it was, byte for byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, RunTuner
from tests.store.test_reading import changed, filled, state
from tuner.contract.errors import StoreError
from tuner.store.engine import parse_url, shown
from tuner.store.store import StudyStore

CRASHED = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("PRAGMA wal_autocheckpoint=0")
for statement in sys.argv[2:]:
    connection.execute(statement)
connection.commit()
os.kill(os.getpid(), 9)
"""
"""A program that is gone, and has left what it wrote in the log beside its file."""


def crashed(path: Path, *statements: str) -> None:
    ran = subprocess.run([sys.executable, "-c", CRASHED, str(path), *statements], check=False, timeout=60)
    assert ran.returncode == -signal.SIGKILL
    assert path.with_name(path.name + "-wal").stat().st_size


def no_database(path: Path) -> None:
    path.write_text("workload: gpt2\n")


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def foreign(path: Path) -> None:
    changed(path, "CREATE TABLE recipes (name text)")


def foreign_wal(path: Path) -> None:
    foreign(path)
    crashed(path, "INSERT INTO recipes VALUES ('soup')")


def foreign_all_in_its_log(path: Path) -> None:
    crashed(path, "CREATE TABLE recipes (name text)")


def foreign_wal_alone(path: Path) -> None:
    """Copied without the index of its log, as a backup is."""
    foreign_wal(path)
    path.with_name(path.name + "-shm").unlink()


def newer(path: Path) -> None:
    filled(path)
    changed(path, "UPDATE tuner_alembic_version SET version_num = '9999'")


def optunas(path: Path) -> None:
    for name in ("studies", "trials", "version_info"):
        changed(path, f"CREATE TABLE {name} (name text)")


def cut_short(path: Path) -> None:
    filled(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


OTHERS: list[tuple[Callable[[Path], object], str]] = [
    (Path.touch, "the file is empty"),
    (no_database, "this is no SQLite database"),
    (folder, "this is not a file"),
    (pipe, "this is not a file"),
    (foreign, "another program"),
    (foreign_wal, "another program"),
    (foreign_all_in_its_log, "another program"),
    (foreign_wal_alone, "another program"),
    (newer, "newer tuner"),
    (optunas, "no study of the tuner's"),
    (cut_short, "damaged"),
]


@pytest.mark.parametrize(("make", "says"), OTHERS, ids=lambda value: getattr(value, "__name__", "says"))
def test_what_is_no_store_of_ours_is_refused_and_stays_as_it_is(
    make: Callable[[Path], object], says: str, tuner: RunTuner, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    make(place / "file.db")
    before = state(place)
    names = sorted(os.listdir(place))
    for words in (("show",), ("runs",), ("explain", "mine"), ("report", "mine"), ("dashboard", "--port", "0")):
        ran = tuner(*words, "--storage", f"sqlite:///{place}/file.db")
        assert ran.code == 2, ran.err
        assert says in ran.err
        assert len(ran.err.splitlines()) == 1
        assert sorted(os.listdir(place)) == names, words
        assert state(place) == before, words
    assert not list(tmp_path.glob("studies*")), "a report that was not made leaves no folder"


def test_a_program_that_has_its_database_open_is_not_disturbed(tmp_path: Path) -> None:
    foreign(tmp_path / "file.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "file.db")) as theirs:
        theirs.execute("PRAGMA journal_mode=WAL")
        theirs.execute("INSERT INTO recipes VALUES ('soup')")
        theirs.commit()
        before = state(tmp_path)
        assert set(before) == {"file.db", "file.db-wal", "file.db-shm"}
        with pytest.raises(StoreError, match="another program"):
            StudyStore.read(f"sqlite:///{tmp_path}/file.db")
        assert state(tmp_path) == before
        theirs.execute("INSERT INTO recipes VALUES ('bread')")
        theirs.commit()


@pytest.mark.parametrize("index", [True, False], ids=["as it crashed", "copied without the log's index"])
def test_what_a_killed_tuner_had_only_in_its_log_is_read_and_nothing_changed(index: bool, tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    filled(path)
    crashed(path, "UPDATE tuner_run SET out_dir = 'from the log' WHERE id = 'aaaa'")
    if not index:
        path.with_name("studies.db-shm").unlink()
    before = state(tmp_path)
    with StudyStore.read(f"sqlite:///{path}") as store:
        assert {run.id: run.out_dir for run in store.runs()}["aaaa"] == "from the log"
    after = state(tmp_path)
    assert after.keys() == before.keys()
    for name in ("studies.db", "studies.db-wal"):
        assert after[name] == before[name]


@pytest.mark.parametrize("log", [False, True], ids=["whole", "with a log beside it"])
def test_a_store_on_a_disk_that_cannot_be_written_is_shown(log: bool, tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("not run: no unshare to mount a read-only folder with")
    place = tmp_path / "place"
    place.mkdir()
    filled(place / "studies.db")
    if log:
        crashed(place / "studies.db", "UPDATE tuner_run SET out_dir = 'from the log' WHERE id = 'aaaa'")
    (place / "studies.db").chmod(0o444)
    place.chmod(0o555)
    mount = ["unshare", "-m", "sh", "-c", 'mount --bind -o ro "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']
    if subprocess.run([*mount, str(place), "true"], capture_output=True, check=False).returncode:
        pytest.skip("not run: nothing can be mounted here")
    code = "import sys; from tuner.cli import main; sys.argv[0] = 'tuner'; main()"
    for words in (("show",), ("show", "mine", "--probes"), ("runs",), ("explain", "mine")):
        command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", code, *words]
        ran = subprocess.run(
            [*mount, str(place), *command, "--storage", f"sqlite:///{place}/studies.db"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
        )
        assert ran.returncode == 0, ran.stderr
        assert ("aaaa" if words == ("runs",) else "mine") in ran.stdout
    place.chmod(0o755)


@pytest.mark.parametrize("typed", [f"sqlite:///{'x' * 300}/studies.db", "sqlite:////proc/1/mem"])
def test_a_path_that_can_be_none_is_told_in_one_line(typed: str, tuner: RunTuner, tmp_path: Path) -> None:
    for words in (("show",), ("train", "-w", "tests.toys:Toy", "--max-samples", "16", "--out", "run")):
        ran = tuner(*words, "--storage", typed)
        assert ran.code == 2, ran.err
        assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me@127.0.0.1:1/db?password=hunter2",
        "postgresql://me@127.0.0.1:1/db?passfile=/hunter2&sslpassword=hunter2",
        "postgresql://127.0.0.1:1/db?user=me&password=hunter2&password=hunter2b",
        "postgresql://me:hun@ter2@[::1]:1/db",
        "postgresql://me:hunter2@[::1]:1/db",
        "postgresql://me:hunter2@[::1:1/db",
        "postgresql://me:h%75nter2@127.0.0.1:1/db",
        "nosuch://me@host/db?token=hunter2",
        "postgresql?password=hunter2",
        "postgresql//me?pwd=hunter2",
        "sqlite:///typo/studies.db?password=hunter2",
        "postgresql://me:hunter2@127.0.0.1:notaport/db",
        "postgresql+nosuch://me:hunter2@127.0.0.1/db",
        "//me:hunter2@host/db",
    ],
)
def test_no_secret_of_a_url_is_printed(url: str, tuner: RunTuner) -> None:
    for words in (("show",), ("runs", "--json"), ("train", "-w", "tests.toys:Toy", "--out", "run")):
        ran = tuner(*words, "--storage", url, timeout_s=60)
        assert ran.code in (2, 75), ran.err
        assert len(ran.err.splitlines()) == 1
        for secret in ("hunter2", "ter2", "h%75nter2"):
            assert secret not in ran.err + ran.out, words


def test_the_secrets_of_a_url_s_query_are_hidden() -> None:
    url = parse_url("postgresql://me:a@host/db?sslpassword=b&api_key=c&application_name=mine")
    assert shown(url).count("***") == 3
    assert "mine" in shown(url)

"""One process works on a study, wherever the store is; who else would is told for whom it waits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.store.conftest import Server
from tuner.contract.errors import StoreError
from tuner.holders import Hold, Holder, Taken
from tuner.store.store import StudyStore
from tuner.store.study_lock import study_place

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys
from tuner.holders import Holder
from tuner.store.study_lock import study_place
held = study_place(sys.argv[1], "first").take(Holder.here("tuner optimize -w toy", study="first"))
print("held", flush=True)
sys.stdin.readline()
held.release()
"""


def holding(url: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, url]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def me(study: str) -> Holder:
    return Holder.here("tuner optimize -w toy", study=study)


def test_one_process_has_a_study_and_is_told_by_name(url: str) -> None:
    StudyStore.open(url).close()
    other = holding(url)
    place = study_place(url, "first")
    for _ in range(3):
        with pytest.raises(Taken) as caught:
            place.take(me("first"))
        (holder,) = caught.value.holders
        assert (holder.pid, holder.study) == (other.pid, "first")
        assert holder.command.startswith("tuner optimize")
        assert holder.since.startswith("20")
    other.communicate("end\n")
    place.take(me("first")).release()


def test_it_ends_with_its_holder(url: str) -> None:
    StudyStore.open(url).close()
    other = holding(url)
    other.kill()
    other.communicate()
    for _ in range(2):
        held = _soon(url)
        held.release()


def _soon(url: str) -> Hold:
    """A server notices a dead client a moment later."""
    place = study_place(url, "first")
    for _ in range(200):
        try:
            return place.take(me("first"))
        except Taken:
            time.sleep(0.05)
    raise AssertionError("it did not end with its holder")


def test_studies_and_stores_do_not_wait_for_each_other(url: str, tmp_path: Path) -> None:
    StudyStore.open(url).close()
    held: list[Hold] = [study_place(url, name).take(me(name)) for name in ("first", "first.second", "second")]
    beside = f"sqlite:///{tmp_path}/studies/other.db"
    StudyStore.open(beside).close()
    held.append(study_place(beside, "first").take(me("first")))
    for one in held:
        one.release()


def test_nothing_but_a_gate_is_left_beside_the_file(sqlite_url: str, tmp_path: Path) -> None:
    StudyStore.open(sqlite_url).close()
    before = {path.name for path in (tmp_path / "studies").iterdir()}
    held = study_place(sqlite_url, "first").take(me("first"))
    held.release()
    assert {path.name for path in (tmp_path / "studies").iterdir()} - before == {".tuner-gate"}


def test_databases_of_one_server_have_studies_of_their_own(postgres_server: Server) -> None:
    one, other = postgres_server.fresh_database(), postgres_server.fresh_database()
    held = [study_place(url, "first").take(me("first")) for url in (one, other)]
    for hold in held:
        hold.release()


def test_a_server_that_is_gone_is_said_without_its_password(postgres_server: Server) -> None:
    url = postgres_server.fresh_database().replace(str(postgres_server.port), "1")
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        study_place(url, "first").take(me("first"))
    assert Server.SECRET not in str(caught.value)

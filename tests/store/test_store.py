"""The store keeps what it acknowledged, numbers it without gaps, and refuses what is no store of ours."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.conftest import Server
from tests.store.rows import (
    BASELINE,
    WINNER,
    Exchange,
    end_to_end,
    example_decision,
    example_exchanges,
    example_promise,
    example_result,
    example_rows,
    example_spec,
)
from tuner.contract.errors import StoreError
from tuner.contract.probe import ProbeReply, ProbeRow, Stage
from tuner.contract.production import RunStatus
from tuner.store.store import StudyStore

NAME = example_spec().name
WRITER = Path(__file__).with_name("writer.py")


def filled(url: str, exchanges: tuple[Exchange, ...] | None = None) -> StudyStore:
    store = StudyStore.open(url)
    store.create_study(example_spec())
    for item in example_exchanges() if exchanges is None else exchanges:
        store.add_reply(NAME, item.request, item.reply, item.trial)
    return store


def without_time(rows: tuple[ProbeRow, ...]) -> list[ProbeRow]:
    return [row.model_copy(update={"finished_at": ""}) for row in rows]


def one(request_id: str = "only") -> Exchange:
    return end_to_end(request_id, Stage.HAND, BASELINE, 7)


# -- what is stored comes back


def test_rows_come_back_equal_to_what_was_measured(url: str) -> None:
    filled(url).close()
    with StudyStore.open(url) as store:
        rows = store.rows(NAME)
        assert without_time(rows) == without_time(example_rows())
        assert all(row.finished_at.endswith("+00:00") for row in rows)
        assert store.study(NAME) == example_spec()


def test_not_a_number_and_infinity_survive(url: str) -> None:
    item = one()
    measurement = item.reply.points[0].measurement
    assert measurement is not None
    odd = measurement.model_copy(update={"losses": {"total": (math.nan, math.inf, -math.inf)}})
    point = item.reply.points[0].model_copy(update={"measurement": odd, "values": {"final_loss": math.nan}})
    reply = item.reply.model_copy(update={"points": (point,)})
    with filled(url, ()) as store:
        store.add_reply(NAME, item.request, reply, 3)
        (row,) = store.rows(NAME)
    assert row.measurement is not None
    first, second, third = row.measurement.losses["total"]
    assert math.isnan(first)
    assert (second, third) == (math.inf, -math.inf)
    assert math.isnan(row.values["final_loss"])
    assert row.trial == 3


def test_text_a_database_refuses_is_stored_readably(url: str) -> None:
    item = one()
    point = item.reply.points[0].model_copy(update={"message": "nul \x00 here", "detail": "50 % — “ünï” 🚀"})
    reply = item.reply.model_copy(update={"points": (point,)})
    with filled(url, ()) as store:
        (row,) = store.add_reply(NAME, item.request, reply, None)
    assert row.message.startswith("nul ")
    assert row.message.endswith(" here")
    assert row.detail == "50 % — “ünï” 🚀"


def test_a_reply_delivered_twice_is_stored_once(url: str) -> None:
    with filled(url) as store:
        before = store.rows(NAME)
        for item in example_exchanges():
            again = store.add_reply(NAME, item.request, item.reply, item.trial)
            assert [row.index for row in again] == [point.index for point in item.reply.points]
        assert store.rows(NAME) == before


def test_only_the_missing_points_of_a_request_are_added(url: str) -> None:
    item = next(item for item in example_exchanges() if len(item.reply.points) == 3)
    first = item.reply.model_copy(update={"points": item.reply.points[:1]})
    with filled(url, ()) as store:
        store.add_reply(NAME, item.request, first, None)
        rows = store.add_reply(NAME, item.request, item.reply, None)
    assert [(row.number, row.index) for row in rows] == [(0, 0), (1, 1), (2, 2)]


def test_a_study_that_exists_is_kept_as_it_is(url: str) -> None:
    with filled(url) as store:
        other = example_spec().model_copy(update={"budget_s": 1.0})
        assert store.create_study(other) == example_spec()
        assert len(store.rows(NAME)) == len(example_rows())


def test_the_list_of_studies_counts_probes(url: str) -> None:
    with filled(url) as store:
        store.create_study(example_spec("empty"))
        store.save_decision(NAME, example_decision(), {"seconds": 1.5})
        full, empty = store.studies()
    rows = example_rows()
    assert (full.name, full.probes, full.decision) == (NAME, len(rows), "winner")
    assert full.ok == sum(row.outcome.value == "ok" for row in rows)
    assert full.seconds == pytest.approx(sum(row.seconds for row in rows))
    assert (empty.name, empty.probes, empty.ok, empty.decision) == ("empty", 0, 0, None)


def test_decision_and_summary_come_back(url: str) -> None:
    with filled(url, ()) as store:
        assert store.decision(NAME) is None
        assert store.summary(NAME) is None
        store.save_decision(NAME, example_decision(), {"seconds": {"gate": 2.0}})
        assert store.decision(NAME) == example_decision()
        assert store.summary(NAME) == {"seconds": {"gate": 2.0}}


def test_production_runs_are_kept_with_promise_and_result(url: str) -> None:
    with filled(url, ()) as store:
        run = store.add_run(WINNER, "runs/one", study=NAME, promise=example_promise())
        store.add_run(BASELINE, "runs/two")
        assert {item.status for item in store.runs()} == {RunStatus.RUNNING}
        store.finish_run(run.id, RunStatus.FINISHED, example_result())
        (found,) = store.runs(NAME)
        assert (found.promise, found.result, found.config) == (example_promise(), example_result(), WINNER)
        assert found.finished_at >= found.started_at
        assert len(store.runs()) == 2
        with pytest.raises(StoreError, match="no production run 'nope'"):
            store.finish_run("nope", RunStatus.FAILED)


def test_an_unknown_study_is_named_with_those_that_exist(url: str) -> None:
    with filled(url, ()) as store, pytest.raises(StoreError, match=f"no study 'latent'; known: {NAME}"):
        store.rows("latent")
    item = one()
    with StudyStore.open(url) as store, pytest.raises(StoreError, match="no study 'latent'"):
        store.add_reply("latent", item.request, item.reply, None)


def test_a_second_reader_sees_what_a_first_has_not_read_yet(url: str) -> None:
    with filled(url, ()) as writer, StudyStore.open(url) as reader:
        for count in (1, 2, 3):
            item = one(f"probe-{count}")
            writer.add_reply(NAME, item.request, item.reply, None)
            assert [row.number for row in reader.rows(NAME)] == list(range(count))


# -- several processes


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(WRITER), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workers: list[subprocess.Popen[str]]) -> list[list[str]]:
    outputs = [worker.communicate("go\n", timeout=120) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
        assert errors == ""
    return [out.splitlines() for out, _ in outputs]


def release_together(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()


@pytest.mark.parametrize("names", [[NAME] * 8, [f"study-{number}" for number in range(8)]], ids=["one", "eight"])
def test_eight_processes_begin_on_a_fresh_store_at_once(url: str, names: list[str]) -> None:
    """Our tables, Optuna's, the study and its first probe, whether it is one study or eight."""
    workers = [spawn("opened", url, name) for name in names]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    release_together(workers)
    assert finish(workers) == [["opened"]] * 8
    with StudyStore.open(url) as store:
        assert sorted(study.name for study in store.studies()) == sorted(set(names))
        assert sum(study.probes for study in store.studies()) == 8


def test_four_writers_number_without_gaps(url: str) -> None:
    workers = [spawn("added", url, f"w{index}", "10") for index in range(4)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    release_together(workers)
    said = [line for lines in finish(workers) for line in lines]
    with StudyStore.open(url) as store:
        rows = store.rows(NAME)
    assert [row.number for row in rows] == list(range(40))
    assert sorted(said) == sorted(f"{row.number} {row.request_id}" for row in rows)


def test_what_was_acknowledged_before_kill_9_is_there(url: str) -> None:
    worker = spawn("added", url, "w", "10000")
    assert worker.stdout is not None
    assert worker.stdin is not None
    assert worker.stdout.readline() == "ready\n"
    worker.stdin.write("go\n")
    worker.stdin.flush()
    said = [worker.stdout.readline() for _ in range(12)]
    os.kill(worker.pid, signal.SIGKILL)
    said += worker.communicate(timeout=60)[0].splitlines()
    assert worker.returncode == -signal.SIGKILL
    with StudyStore.open(url) as store:
        rows = store.rows(NAME)
        stored = [f"{row.number} {row.request_id}" for row in rows]
        assert [row.number for row in rows] == list(range(len(rows)))
        assert [line.strip() for line in said] == stored[: len(said)]
        item = one()
        store.add_reply(NAME, item.request, item.reply, None)


# -- what is refused


def refused(path: Path, match: str) -> None:
    before = path.read_bytes()
    with pytest.raises(StoreError, match=match) as caught:
        StudyStore.open(f"sqlite:///{path}", lock_timeout_s=0.3)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are my notes, not a database\n" * 100)
    refused(path, "no SQLite database")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    refused(path, "the file is empty")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a file"):
        StudyStore.open(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("at", [40, 4096, 5000])
def test_a_damaged_store_is_refused(tmp_path: Path, at: int) -> None:
    path = tmp_path / "studies.db"
    filled(f"sqlite:///{path}").close()
    data = bytearray(path.read_bytes())
    assert len(data) > 20_000
    data[at : at + 8000] = b"\xa5" * 8000
    path.write_bytes(data)
    refused(path, "damaged")


def test_a_store_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    filled(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE tuner_alembic_version SET version_num = '9999'")
    connection.close()
    refused(path, r"newer tuner .*'9999'")


def test_a_locked_store_says_so_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    url = f"sqlite:///{path}"
    filled(url).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    item = one()
    with StudyStore.open(url, lock_timeout_s=0.2) as store:
        with pytest.raises(StoreError, match=r"locked by another process for more than 0\.2 s"):
            store.save_decision(NAME, example_decision(), {})
        with pytest.raises(StoreError, match="result spooled to"):
            store.add_reply(NAME, item.request, item.reply, None)
        holder.execute("ROLLBACK")
        holder.close()
        assert store.deliver_spooled() == 1
        assert [row.request_id for row in store.rows(NAME)][-1] == "only"


def test_a_store_locked_whole_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    filled(f"sqlite:///{path}").close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN IMMEDIATE")
    holder.execute("UPDATE tuner_study SET created_at = 'x'")
    with pytest.raises(StoreError, match="locked by another process"):
        StudyStore.open(f"sqlite:///{path}", lock_timeout_s=0.2)
    holder.close()


def test_a_store_made_by_optuna_alone_gets_our_tables_beside(tmp_path: Path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{tmp_path}/optuna.db"
    storage = optuna.storages.RDBStorage(url)
    optuna.create_study(storage=storage, study_name="theirs")
    storage.engine.dispose()
    with filled(url) as store:
        assert len(store.rows(NAME)) == len(example_rows())
    again = optuna.storages.RDBStorage(url)
    assert [study.study_name for study in again.get_all_studies()] == ["theirs"]
    again.remove_session()
    again.engine.dispose()


def test_a_killed_first_start_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / ".studies.db.new-4711").write_bytes(b"SQLite format 3\x00 half written")
    filled(f"sqlite:///{tmp_path}/studies.db").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["studies.db"]


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("studies.db", "no database URL"),
        ("postgresql://me:hunter2@host:notaport/db", "no database URL"),
        ("sqlite://", "needs a file"),
        ("nosuch://me:hunter2@host/db", "not known here"),
        ("mysql+pymysql://me:hunter2@host/db", "driver 'pymysql' is not installed"),
        ("postgresql://me:hunter2@127.0.0.1:1/db", "cannot be reached"),
        ("postgresql://me@127.0.0.1:1/db?password=hunter2", "cannot be reached"),
    ],
)
def test_an_unusable_url_gets_one_line_without_its_password(url: str, match: str) -> None:
    with pytest.raises(StoreError, match=match) as caught:
        StudyStore.open(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


# -- a database that is away


def test_results_wait_while_postgresql_is_down(postgres_server: Server, tmp_path: Path) -> None:
    items = [one(f"probe-{index}") for index in range(3)]
    with StudyStore.open(postgres_server.fresh_database(), spool_dir=tmp_path / "spool") as store:
        store.create_study(example_spec())
        postgres_server.stop()
        try:
            for item in items:
                with pytest.raises(StoreError, match="store unreachable, result spooled to") as caught:
                    store.add_reply(NAME, item.request, item.reply, None)
                assert Server.SECRET not in str(caught.value)
            with pytest.raises(StoreError, match="cannot be reached") as caught:
                store.deliver_spooled()
            assert Server.SECRET not in str(caught.value)
        finally:
            postgres_server.start()
        spooled = list((tmp_path / "spool").iterdir())
        assert len(spooled) == 3
        assert Server.SECRET not in "".join(path.read_text() for path in spooled)
        assert store.deliver_spooled() == 3
        assert store.deliver_spooled() == 0
        assert {row.request_id for row in store.rows(NAME)} == {item.request.id for item in items}
        assert Server.SECRET not in store.shown_url


def test_a_cut_connection_is_made_anew(postgres_url: str) -> None:
    import psycopg

    with filled(postgres_url, ()) as store:
        before = one("before")
        store.add_reply(NAME, before.request, before.reply, None)
        with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as other:
            cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            found = other.execute(cut + "WHERE datname = current_database() AND pid <> pg_backend_pid()").fetchone()
            assert found is not None
            assert found[0] >= 1
        item = one("after")
        store.add_reply(NAME, item.request, item.reply, None)
        assert [row.request_id for row in store.rows(NAME)] == ["before", "after"]


def test_delivering_what_was_stored_after_all_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    item = one()
    with filled(url, ()) as store:
        store.add_reply(NAME, item.request, item.reply, None)
        before = store.rows(NAME)
        holder = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with StudyStore.open(url, lock_timeout_s=0.1) as hasty, pytest.raises(StoreError, match="spooled"):
            hasty.add_reply(NAME, item.request, item.reply, None)
        holder.close()
        assert store.deliver_spooled() == 1
        assert store.rows(NAME) == before


def test_a_spool_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    filled(url, ()).close()
    (tmp_path / "file").touch()
    holder = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    item = one()
    store = StudyStore.open(url, lock_timeout_s=0.1, spool_dir=tmp_path / "file" / "spool")
    with store, pytest.raises(StoreError, match="could not be spooled"):
        store.add_reply(NAME, item.request, item.reply, None)
    holder.close()


def test_a_spooled_file_that_is_none_is_named(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "odd.json").write_text(json.dumps({"study": "x"}))
    url = f"sqlite:///{tmp_path}/studies.db"
    with StudyStore.open(url, spool_dir=spool) as store, pytest.raises(StoreError, match=r"odd\.json"):
        store.deliver_spooled()


# -- the schema


def test_the_tables_are_what_the_migrations_make(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from tuner.store.engine import make_engine, parse_url
    from tuner.store.schema import alembic_config
    from tuner.store.tables import SCHEMA_REVISION, VERSION_TABLE, metadata

    StudyStore.open(url).close()
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == SCHEMA_REVISION
    engine = make_engine(parse_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_opening_the_store_needs_no_optuna() -> None:
    code = "import sys, tuner.store.store; sys.exit('optuna' in sys.modules or 'alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_reply_to_another_request_is_an_error_of_ours(tmp_path: Path) -> None:
    item = one()
    reply = ProbeReply(request_id="other", points=item.reply.points, seconds=1.0)
    with filled(f"sqlite:///{tmp_path}/s.db", ()) as store, pytest.raises(ValueError, match="given for request 'only'"):
        store.add_reply(NAME, item.request, reply, None)

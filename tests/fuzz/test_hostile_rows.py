"""A store whose rows somebody has written by hand: never a traceback, never a hang, never an import."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.hostile import changed, relaxed, run, texts
from tests.store.rows import (
    BASELINE,
    WINNER,
    example_decision,
    example_exchanges,
    example_promise,
    example_result,
    example_spec,
)
from tuner.contract.production import RunStatus
from tuner.store.store import StudyStore
from tuner.store.tables import metadata

COLUMNS = [(table, column.name) for table, rows in metadata.tables.items() for column in rows.columns]
DOCUMENTS = {
    "spec": example_spec("mine"),
    "decision": example_decision(),
    "config": WINNER,
    "promise": example_promise(),
    "result": example_result(),
    "measurement": example_exchanges()[0].reply.points[0].measurement,
}
COMMANDS = (
    ("show",),
    ("show", "mine", "--probes"),
    ("show", "mine", "--json"),
    ("runs",),
    ("runs", "a"),
    ("runs", "--json"),
    ("explain", "mine"),
    ("export", "mine"),
    ("export", "mine", "--format", "csv"),
    ("report", "mine", "--out", "page.html"),
    ("optimize", "-w", "latent_cfg", "--study", "mine", "--gpu", "cpu"),
)


def plain(value: Any) -> Any:
    return json.loads(value.model_dump_json()) if value is not None else {}


@pytest.fixture
def template(place: Path) -> Path:
    path = place / "template.db"
    with StudyStore.open(f"sqlite:///{path}") as store:
        store.create_study(example_spec("mine"))
        for item in example_exchanges():
            store.add_reply("mine", item.request, item.reply, item.trial)
        store.save_decision("mine", example_decision(), {})
        run_ = store.add_run(WINNER, "runs/one", study="mine", promise=example_promise(), run_id="aaaa")
        store.finish_run(run_.id, RunStatus.FINISHED, example_result())
        store.add_run(BASELINE, "runs/two", study="mine", run_id="bbbb")
    return path


cells: st.SearchStrategy[Any] = st.one_of(
    texts,
    st.none(),
    st.binary(max_size=8),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(),
    st.sampled_from(sorted(DOCUMENTS)).flatmap(lambda name: changed(plain(DOCUMENTS[name]))),
)


@st.composite
def writings(draw: st.DrawFn) -> tuple[str, str, Any]:
    table, column = draw(st.sampled_from(COLUMNS))
    own = DOCUMENTS.get(column)
    value = draw(changed(plain(own)) if own is not None and draw(st.booleans()) else cells)
    return table, column, value


def rows(template: Path, writing: tuple[str, str, Any], words: tuple[str, ...]) -> None:
    store = template.with_name("store.db")
    for beside in ("", "-wal", "-shm"):
        store.with_name(store.name + beside).unlink(missing_ok=True)
    shutil.copyfile(template, store)
    table, column, value = writing
    with contextlib.closing(sqlite3.connect(store)) as connection, connection, contextlib.suppress(sqlite3.Error):
        one = f"(SELECT max(rowid) FROM {table})"
        connection.execute(f'UPDATE {table} SET "{column}" = ? WHERE rowid = {one}', (value,))
    run((*words, "--storage", f"sqlite:///{store}"))


@settings(relaxed, max_examples=100)
@given(writing=writings(), words=st.sampled_from(COMMANDS))
def test_rows(template: Path, writing: tuple[str, str, Any], words: tuple[str, ...]) -> None:
    rows(template, writing, words)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(relaxed, max_examples=1000)
@given(writing=writings(), words=st.sampled_from(COMMANDS))
def test_many_rows(template: Path, writing: tuple[str, str, Any], words: tuple[str, ...]) -> None:
    rows(template, writing, words)

"""The CSV tables of a run: columns that come later, rows of a killed writer, and a disk that is full."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tuner.contract.probe import Event, NoticeEvent
from tuner.engine.table import Table, number


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def table(tmp_path: Path, events: list[Event]) -> Table:
    return Table(tmp_path / "run" / "t.csv", events.append)


def read(table: Table) -> list[list[str]]:
    with table.path.open(encoding="utf-8", newline="") as source:
        return list(csv.reader(source))


def test_new_columns_rewrite_the_header_and_missing_ones_stay_empty(table: Table) -> None:
    table.add(10, {"loss": 0.5})
    table.add(20, {"loss": 0.25, "auc": 0.75})
    table.add(30, {"auc": 1.0})
    assert read(table) == [["samples", "loss", "auc"], ["10", "0.5", ""], ["20", "0.25", "0.75"], ["30", "", "1"]]


def test_another_process_goes_on_where_the_first_was_killed(table: Table, events: list[Event]) -> None:
    for samples in (10, 20, 30):
        table.add(samples, {"loss": samples / 100})
    with table.path.open("a", encoding="utf-8") as file:
        file.write("40,0.")  # the kill came in the middle of a row
    again = Table(table.path, events.append)
    again.forget_after(20)
    again.add(30, {"loss": 0.7, "kl": 1e-5})
    assert read(again) == [["samples", "loss", "kl"], ["10", "0.1", ""], ["20", "0.2", ""], ["30", "0.7", "1e-05"]]
    assert [number(row["kl"]) == 1e-5 for row in again.rows()] == [False, False, True]


def test_a_run_begun_anew_begins_its_tables_anew(table: Table) -> None:
    table.add(10, {"old": 1.0})
    table.forget_after(0)
    assert table.rows() == []
    table.add(10, {"new": 2.0})
    assert read(table) == [["samples", "new"], ["10", "2"]]


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path, events: list[Event]) -> None:
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "t.csv", events.append)
    table.add(1, {"loss": 1.0})
    table.add(2, {"loss": 1.0})
    (event,) = events
    assert isinstance(event, NoticeEvent)
    assert "t.csv cannot be written" in event.text

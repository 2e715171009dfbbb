"""Users' tables: separators, indices, field counts, numbers as names, broken text; by row and by column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from tuner.contract.errors import WorkloadError
from tuner.readers.table_file import TableFile, plain_name


def written(path: Path, content: str | bytes) -> TableFile:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return TableFile(path)


def values(table: TableFile) -> list[dict[str, Any]]:
    return [dict(row.values) for row in table.rows()]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.csv", "a,b\n1,x;y\n2,z\n", ""),
        ("t.csv", "a;b\n1;x, y\n2;z\n", "parted by semicolons"),
        ("t.csv", "a\tb\n1\tx\n2\tz, and more\n", "parted by tabs"),
        ("t.csv", "a|b\n1|x;\n2|z\n", "parted by bars"),
        ("t.tsv", "a,b\n1,x\n2,z\n", "parted by commas"),
        ("t.csv", "sep=;\na;b\n1;x,y\n2;z\n", "parted by semicolons"),
        ("t.csv", "\ufeffa, b\r\n1,x\r\n\r\n2,z\r\n\r\n", ""),
    ],
)
def test_the_separator_is_found_and_told(tmp_path: Path, name: str, content: str, told: str) -> None:
    table = written(tmp_path / name, content)
    assert table.columns == ("a", "b")
    assert [row["a"] for row in values(table)] == ["1", "2"]
    assert "".join(table.remarks).endswith(told)
    assert bool(table.remarks) is bool(told)
    ((first, (names,)),) = table.names(["a"])
    ((_, numbers),) = table.numbers(["a"])
    assert (first, names.tolist(), numbers.tolist()) == (0, ["1", "2"], [[1.0], [2.0]])


def test_an_unquoted_separator_is_named_by_its_row_and_never_cut(tmp_path: Path) -> None:
    lines = ["file_name,text", *(f"{i}.png,number {i}" for i in range(300)), "300.png,a bar, long"]
    table = written(tmp_path / "t.csv", "\n".join(lines))
    for read in (lambda: values(table), lambda: list(table.names(["text"]))):
        with pytest.raises(WorkloadError, match=r"t\.csv: row 302 has 3 fields, but the header has 2: file_name, text"):
            read()
    short = written(tmp_path / "s.csv", 'a,b\n"two\nlines",1\nalone\n')
    with pytest.raises(WorkloadError, match=r"s\.csv: row 3 \(line 4\) has 1 fields, but the header has 2"):
        values(short)


def test_an_index_of_pandas_is_no_column(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"x": [0.5, 1.5, 2.5], "y": [1, 2, 3]})
    frame.to_csv(tmp_path / "index.csv")
    pandas.read_csv(tmp_path / "index.csv").to_csv(tmp_path / "saved.csv", index=False)
    pandas.read_csv(tmp_path / "saved.csv").to_csv(tmp_path / "twice.csv")
    frame.iloc[[1, 0, 2]].to_parquet(tmp_path / "filtered.parquet")
    frame.reset_index().to_json(tmp_path / "reset.jsonl", orient="records", lines=True)
    for name in ("index.csv", "saved.csv", "twice.csv", "filtered.parquet", "reset.jsonl"):
        table = TableFile(tmp_path / name)
        assert table.columns == ("x", "y"), name
        assert [list(row) for row in values(table)][-1] == ["x", "y"]
        assert "taken for an index" in table.remarks[0]
        if not name.endswith("jsonl"):
            assert np.concatenate([piece for _, piece in table.numbers(["y", "x"])])[-1].tolist() == [3.0, 2.5]


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (("2", "2.0", " 2.00", 2, 2.0, "+2", "2e0"), "2"),
        (("-0.5", "-.5e0", -0.5, "-0.50"), "-0.5"),
        (("0", "-0", "0.0", 0.0), "0"),
        (("1e6", 1e6, "1000000"), "1000000"),
        (("007",), "007"),
        (("2.0.1",), "2.0.1"),
        (("walk ",), "walk"),
        (("123456789012345678901",), "123456789012345678901"),
        (("nan",), "nan"),
    ],
)
def test_equal_numbers_have_one_name(spellings: tuple[Any, ...], name: str) -> None:
    own = [spelling for spelling in spellings if not str(spelling).startswith("-.")]
    assert {plain_name(spelling) for spelling in own} == {name}


def test_names_by_column_are_plain_too(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", "block,label\n1,2\n1.0,2.0\n 1 ,007\n")
    ((_, (blocks, labels)),) = table.names(["block", "label"])
    assert (blocks.tolist(), labels.tolist()) == (["1", "1", "1"], ["2", "2", "007"])
    pandas.DataFrame({"label": [2.0, 3.5]}).to_parquet(tmp_path / "t.parquet")
    ((_, (found,)),) = TableFile(tmp_path / "t.parquet").names(["label"])
    assert found.tolist() == ["2", "3.5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"text,n\nfine,1\ncaf\xe9,2\n", "row 3, column 'text': it is not UTF-8 text (byte 0xe9); save"),
        ("t.csv", b"t\xe9xt,n\nfine,1\n", r"row 1, column 't\xe9xt': it is not UTF-8 text (byte 0xe9)"),
        ("t.jsonl", b'{"text": "fine"}\n{"text": "half \\ud83d"}\n', "row 2, column 'text': it holds half a character"),
        ("t.jsonl", b'{"text": "caf\xe9"}\n', "row 1, column 'text': it is not UTF-8 text (byte 0xe9)"),
        ("t.jsonl", b'{"a\\ud83d": "x"}\n', r"row 1: the column name 'a\ud83d': it holds half a character"),
        ("t.csv", "text,n\nx,1\n".encode("utf-16"), "it is UTF-16, not UTF-8 text; save the file as UTF-8"),
        ("t.jsonl", b'{"text": \n', "row 1: it is no valid JSON"),
        ("t.jsonl", b"[" * 100_000, "row 1: it is no valid JSON: nested too deeply"),
        ("t.csv", b'text,n\n"open,1\n', "line 2 is no valid CSV"),
    ],
)
def test_broken_text_is_one_line_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        values(written(tmp_path / name, content))
    assert f"{name}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_whole_characters_in_any_spelling_are_kept(tmp_path: Path) -> None:
    table = written(tmp_path / "t.jsonl", b'{"text": "\\ud83d\\ude00 caf\\u00e9 \xe5\xb1\xb1"}\n')
    assert values(table) == [{"text": "😀 café 山"}]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1,5", "row 3, column 'y': '1,5' is not a finite number; write it with a decimal point, or leave the column"),
        ("", "row 3, column 'y': the value is missing"),
        ("caf\udce9", "row 3, column 'y': it is not UTF-8 text (byte 0xe9)"),
    ],
)
def test_a_cell_that_is_no_number_is_named(tmp_path: Path, cell: str, message: str) -> None:
    content = f"x;y\n1;2\n3;{cell}\n".encode("utf-8", "surrogateescape")
    with pytest.raises(WorkloadError) as caught:
        list(written(tmp_path / "t.csv", content).numbers(["y"], "options.sensor_columns"))
    assert message in str(caught.value)

"""gpt2's data: docstrings and their facts, tables of the user's own, the split, the tokeniser, and wrong data."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.contract.base import Scalar
from tuner.contract.errors import WorkloadError
from workloads.gpt2 import docstrings
from workloads.gpt2.docstrings import FACTS, TRAIN_ROWS, VALID_ROWS, Docstrings
from workloads.gpt2.rows import Parts, Rows, same_text
from workloads.gpt2.tables import Table
from workloads.gpt2.tokens import Tokens
from workloads.gpt2.workload import Gpt2

Record = Mapping[str, Any]


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


# --- docstrings -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> tuple[Rows, Parts]:
    return Docstrings().load(quiet)


def test_there_are_as_many_texts_as_the_description_says(library: tuple[Rows, Parts]) -> None:
    rows, parts = library
    assert (len(parts.train), len(parts.valid)) == (TRAIN_ROWS, VALID_ROWS)
    assert Gpt2({}).info().train_samples == TRAIN_ROWS
    assert rows.label_names == tuple(FACTS)
    for place in range(len(FACTS)):
        share = sum(rows.labels[index][place] for index in parts.train) / TRAIN_ROWS
        assert 0.03 < share < 0.8


def test_no_module_and_no_docstring_serves_both_splits(library: tuple[Rows, Parts]) -> None:
    rows, parts = library
    sides = (parts.train, parts.valid)
    modules = [{rows.groups[index] for index in side} for side in sides]
    said = [{same_text(rows.texts[index].partition("\n")[2]) for index in side} for side in sides]
    assert modules[0].isdisjoint(modules[1])
    assert said[0].isdisjoint(said[1])
    paragraphs = [{p for index in side for p in docstrings._paragraphs(rows.texts[index])} for side in sides]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    assert parts.dropped > 0
    halves = [{rows.groups[i] for i, side in zip(parts.valid, parts.fold, strict=True) if side == n} for n in (0, 1)]
    assert halves[0].isdisjoint(halves[1])
    assert 0.4 < sum(parts.fold) / VALID_ROWS < 0.6


@pytest.mark.parametrize(
    ("body", "true"),
    [
        ("return x + 1", {"returns_value"}),
        ("return None", set()),
        ("return x > 1", {"returns_value", "returns_truth"}),
        ("return not x", {"returns_value", "returns_truth"}),
        ("return isinstance(x, int)", {"returns_value", "returns_truth"}),
        ("self.x = 1", {"stores_attribute"}),
        ("return [y for y in x]", {"returns_value", "loops", "names_a_value"}),
        ("while True: pass", {"loops"}),
        ("if x: raise ValueError(x)", {"raises"}),
        ("y = x", {"names_a_value"}),
        ("def inner():\n        raise KeyError\n    inner()", set()),
    ],
)
def test_the_facts_of_a_body(body: str, true: set[str]) -> None:
    source = f'def f(self, x, *, key=None):\n    """Do it: return, raise, loop."""\n    {body}\n'
    ((text, docstring, labels),) = docstrings._functions(source.encode())
    assert text == "f(self, x, key)\nDo it: return, raise, loop."
    assert docstring == "Do it: return, raise, loop."
    assert {name for name, value in zip(FACTS, labels, strict=True) if value} == true


def test_the_text_shows_nothing_of_the_body(library: tuple[Rows, Parts]) -> None:
    rows, _ = library
    source = (docstrings._root() / "textwrap.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    said = {f"{node.name}: {ast.get_docstring(node)}" for node in nodes}
    texts = [text for text, module in zip(rows.texts, rows.groups, strict=True) if module == "textwrap.py"]
    assert texts
    for text in texts:
        head, _, docstring = text.partition("\n")
        assert f"{head.partition('(')[0]}: {docstring}" in said


def test_a_stripped_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docstrings, "_root", lambda: tmp_path)
    with pytest.raises(WorkloadError, match=r"only 0 were found in .*give your own texts: --data FILE"):
        Docstrings().load(quiet)


# --- tables ---------------------------------------------------------------------------------------------------------

GOOD = [{"text": f"a good day number {i}, and more", "kind": 1, "long": i % 2} for i in range(20)]
BAD = [{"text": f"a bad night number {i}", "kind": 0, "long": i % 2} for i in range(20)]
RECORDS: list[Record] = [*GOOD, *BAD]


def write(path: Path, records: Sequence[Record]) -> Path:
    """The records as a table of the kind the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        import pandas

        pandas.DataFrame(records).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            made = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            made.writeheader()
            made.writerows(records)
    return path


def tokens_of(path: Path, folder: Path, **options: Scalar) -> Tokens:
    job = Gpt2({"data": str(path), **options})
    job.prepare(folder, quiet)
    return job.tokens


def told(job: Gpt2, cache: Path) -> list[str]:
    """What `prepare` says."""
    said: list[str] = []
    job.prepare(cache, lambda done, total, text: said.append(text))
    return said


def texts_of(tokens: Tokens, part: str) -> list[str]:
    job = tokens.train if part == "train" else tokens.valid
    ends = (job.counts + 1).cumsum(0).tolist()
    return [tokens.decode(job.ids[end - n : end]) for end, n in zip(ends, job.counts.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_texts_and_labels(tmp_path: Path, kind: str) -> None:
    tokens = tokens_of(write(tmp_path / f"texts.{kind}", RECORDS), tmp_path / "cache")
    assert tokens.label_names == ("kind", "long")
    wanted = {record["text"]: [record["kind"], record["long"]] for record in RECORDS}
    found = {
        text: labels
        for part in ("train", "valid")
        for text, labels in zip(texts_of(tokens, part), tokens.part(part).labels.tolist(), strict=True)
    }
    assert found == wanted
    assert len(tokens.valid.counts) == 4


def test_chosen_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"id": i, "said": r["text"], **r, "score": 0.5} for i, r in enumerate(RECORDS)])
    tokens = tokens_of(path, tmp_path / "cache", text_column="said", label_columns="long, kind")
    assert tokens.label_names == ("long", "kind")


def test_one_column_of_classes_becomes_a_label_for_each(tmp_path: Path) -> None:
    records = [{"text": f"{word} {i}", "label": word} for word in ("up", "down", "left") for i in range(10)]
    tokens = tokens_of(write(tmp_path / "t.jsonl", records), tmp_path / "cache")
    assert tokens.label_names == ("down", "left", "up")
    assert torch.equal(tokens.train.labels.sum(dim=1), torch.ones(27))


def test_texts_that_say_the_same_do_not_serve_both_splits(tmp_path: Path) -> None:
    records = [{"text": f"A  TEXT {i % 12}" if i % 2 else f"a text {i % 12}", "long": i // 2 % 2} for i in range(48)]
    rows, parts = Table(write(tmp_path / "t.csv", records)).load(quiet)
    train, valid = ({same_text(rows.texts[i]) for i in side} for side in (parts.train, parts.valid))
    assert train
    assert valid
    assert train.isdisjoint(valid)


def test_the_datas_own_split_is_kept_and_cleaned_of_what_training_says_too(tmp_path: Path) -> None:
    records = [{**r, "split": "valid" if i % 4 == 0 else "train"} for i, r in enumerate(RECORDS)]
    records.append({"text": records[1]["text"].upper(), "kind": 1, "long": 0, "split": "dev"})
    rows, parts = Table(write(tmp_path / "t.csv", records)).load(quiet)
    assert [rows.texts[i] for i in parts.valid] == [r["text"] for r in records[:40:4]]
    assert parts.dropped == 1


def test_test_rows_are_neither_trained_on_nor_chosen_by(tmp_path: Path) -> None:
    """Without a valid split, validation is a part of the others. Test rows may hide their labels (-1, empty)."""
    for name, sides in (("three", ("train", "valid", "test")), ("two", ("train", "Test", "train"))):
        tests = [{"text": f"a secret question {i}", "kind": -1, "long": "", "split": "test"} for i in range(5)]
        rest = [{**r, "split": sides[i % 3]} for i, r in enumerate(RECORDS)]
        job = Gpt2({"data": str(write(tmp_path / f"{name}.csv", [*tests, *rest]))})
        aside = 5 + sum(r["split"].lower() == "test" for r in rest)
        for _ in range(2):  # made, and found in the cache
            said = told(job, tmp_path / "cache")
            assert said[-1] == f"{aside} test rows are set aside: neither trained on nor chosen by"
        used = {*texts_of(job.tokens, "train"), *texts_of(job.tokens, "valid")}
        assert used == {r["text"] for r in rest if r["split"].lower() != "test"}
        assert job.tokens.label_names == ("kind", "long")


def test_groups_stay_together(tmp_path: Path) -> None:
    records = [{**r, "group": f"author {i % 10}"} for i, r in enumerate(RECORDS)]
    rows, parts = Table(write(tmp_path / "t.csv", records)).load(quiet)
    train, valid = ({rows.groups[i] for i in side} for side in (parts.train, parts.valid))
    assert (len(train), len(valid)) == (9, 1)


def test_the_tokeniser_has_seen_training_texts_only(tmp_path: Path) -> None:
    def sided(word: str, side: str) -> list[Record]:
        return [{"text": f"{word} {word} {i}", "kind": i % 2, "split": side} for i in range(30)]

    path = write(tmp_path / "t.csv", [*sided("alphabetical", "train"), *sided("zoological", "valid")])
    tokens = tokens_of(path, tmp_path / "cache")
    assert len(tokens.tokenizer.encode(" alphabetical").ids) == 1
    assert len(tokens.tokenizer.encode(" zoological").ids) > 4


def test_any_text_comes_back_from_its_tokens(tmp_path: Path) -> None:
    texts = ["plain", "Grüße, 世界 🙂", "tab\tand\nnew line  two", 'quotes "," and , commas', "\x00 odd"]
    records = [{"text": f"{text} {i}", "kind": i % 2} for i in range(4) for text in texts]
    tokens = tokens_of(write(tmp_path / "t.jsonl", records), tmp_path / "cache")
    assert {*texts_of(tokens, "train"), *texts_of(tokens, "valid")} == {record["text"] for record in records}


def test_changed_data_and_changed_options_are_prepared_anew(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "t.csv", RECORDS), tmp_path / "cache"
    tokens_of(path, cache)
    told: list[str] = []
    Gpt2({"data": str(path)}).prepare(cache, lambda done, total, text: told.append(text))
    assert told == []
    assert tokens_of(path, cache, label_columns="kind").label_names == ("kind",)
    write(path, RECORDS[1:])
    assert len(tokens_of(path, cache).train.counts) == 35
    assert len(list((cache / "gpt2").iterdir())) == 3


def test_plain_text_for_the_language_model(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i}\nof a book." for i in range(30)))
    tokens = tokens_of(path, tmp_path / "cache", task="lm")
    assert texts_of(tokens, "train") == [f"Paragraph {i}\nof a book." for i in range(27)]
    assert len(tokens.valid.counts) == 3


# --- wrong data -----------------------------------------------------------------------------------------------------


def changed(number: int, **values: Any) -> list[Record]:
    """The records with values of one row (counted from 1) changed."""
    return [{**record, **values} if i == number else record for i, record in enumerate(RECORDS, start=1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", changed(7, kind="perhaps"), "t.csv: row 8, column 'kind': must be 0 or 1, got 'perhaps'"),
        ("t.csv", changed(7, text="  "), "t.csv: row 8, column 'text': the text is empty"),
        ("t.jsonl", changed(9, text=None), "t.jsonl: row 9, column 'text': a text is needed, but it is missing (NaN)"),
        ("t.jsonl", changed(9, text=5), "t.jsonl: row 9, column 'text': must be a text, got 5"),
        ("t.parquet", changed(3, text=None), "t.parquet: row 3, column 'text': a text is needed"),
        (
            "t.parquet",
            changed(3, kind=float("nan")),
            "t.parquet: row 3, column 'kind': a 0 or 1 is needed, but it is missing",
        ),
        ("t.csv", [{"words": "x", "kind": 1}], "no text column (text, comment, comment_text); its columns are 'words'"),
        ("t.csv", [{"text": "x", "score": 0.3}], "no label columns: besides 'text' there must be columns of 0 and 1"),
        ("t.csv", [dict(r, kind=1) for r in RECORDS], "column 'kind' is 1 in all 36 training rows"),
        ("t.csv", [{"text": f"x {i}", "label": "up"} for i in range(9)], "column 'label' has 1 different values"),
        ("t.csv", [{"text": "x", "kind": i % 2} for i in range(9)], "0 for validation, of 9"),
        ("t.csv", [dict(r, split="?") for r in RECORDS], "row 2, column 'split': must be one of train, valid"),
        ("t.csv", "", "t.csv: it has no rows of data"),
        ("t.csv", "text,kind\n", "t.csv: it has no rows of data"),
        ("t.csv", "text,kind\nhello, world,1\n", "row 2 has 3 fields, but the header has 2: text, kind"),
        ("t.csv", 'text,kind\n"never closed,1\n', "line 2 is no valid CSV"),
        ("t.csv", "text,kind,kind\na,1,1\n", "the column name 'kind' occurs twice"),
        ("t.csv", b"text,kind\ngr\xfc\xdfe,1\n", "row 2, column 'text': it is not UTF-8 text (byte 0xfc)"),
        ("t.jsonl", '{"text": "a", "kind": 1}\n{"text": \n', "t.jsonl: row 2: it is no valid JSON"),
        ("t.jsonl", "[1, 2]\n", "t.jsonl: row 1: it must be an object"),
        ("t.parquet", b"PAR1 and then nothing", "t.parquet cannot be read as parquet"),
        ("t.txt", "words", "t.txt has no labels; give a table (CSV, JSONL, parquet), or take task=lm"),
        ("t.xlsx", "words", "files of kind '.xlsx' are not read"),
    ],
)
def test_wrong_data_gets_one_line_with_its_place(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, list):
        write(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WorkloadError) as caught:
        Gpt2({"data": str(path)}).info()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "words"}, "no column 'words'; its columns are 'text', 'kind', 'long'"),
        ({"label_columns": "kind,size"}, "no column 'size' (label_columns)"),
        ({"data": "nowhere.csv"}, "options.data: nowhere.csv does not exist"),
        ({"data": "."}, "options.data: . is a folder; give a file (.csv"),
    ],
)
def test_wrong_columns_and_files(tmp_path: Path, options: dict[str, Scalar], message: str) -> None:
    path = write(tmp_path / "t.csv", RECORDS)
    with pytest.raises(WorkloadError) as caught:
        Gpt2({"data": str(path), **options}).info()
    assert message in str(caught.value)


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(WorkloadError, match=r"options\.colour: gpt2 does not know it; known: preset, data, task"):
        Gpt2({"colour": 1})

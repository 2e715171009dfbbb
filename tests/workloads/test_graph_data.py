"""graph's data: the split by blocks, windows inside segments, and the user's own tables with what is wrong in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from tuner.contract.base import Scalar
from tuner.contract.config import Cadence, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner
from tuner.readers import table_file
from workloads.graph import watch
from workloads.graph.data import Segment, WindowDataset, cut_windows, downsample, held_out_blocks
from workloads.graph.sensor_table import SensorTable
from workloads.graph.watch import WatchRecordings
from workloads.graph.workload import Graph

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
import sys
from pathlib import Path
from tuner.readers import table_file
from workloads.graph.workload import Graph
table_file.PIECE_ROWS = 50
Graph({"data": sys.argv[1]}).prepare(Path(sys.argv[2]), lambda *said: print(*said, flush=True))
"""


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


def made_table(blocks: int = 6, rows: int = 200, labels: tuple[str, ...] = ("still", "walk")) -> pandas.DataFrame:
    """Every block does every label; walking swings twice as fast in one channel, and the others follow."""
    drawn = np.random.default_rng(0)
    parts = []
    for block in range(blocks):
        for number, label in enumerate(labels):
            phase = np.arange(rows) * (0.15 + 0.25 * number) + drawn.uniform(0, 6)
            swing = np.sin(phase)
            sensors = {
                "x": swing + 0.1 * drawn.normal(size=rows),
                "y": 2 * swing + 5 + 0.1 * drawn.normal(size=rows),
                "z": np.cos(phase),
            }
            parts.append(pandas.DataFrame({"block": f"p{block}", "label": label, **sensors}))
    return pandas.concat(parts, ignore_index=True)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "walks.csv"
    made_table().to_csv(file, index=False)
    return file


def opened(path: Path, **options: Scalar) -> Graph:
    made = Graph({"data": str(path), **options})
    made.prepare(path.parent / "cache", quiet)
    return made


# --- the split ------------------------------------------------------------------------------------------------------


def test_no_person_is_on_both_sides_and_no_row_is_shared(tmp_path: Path) -> None:
    """The original split overlapping windows at random."""
    job = Graph({})
    job.prepare(tmp_path, quiet)
    assert job._table is not None
    segments = job._table.segments
    people: list[set[str]] = []
    rows: list[set[int]] = []
    for split in ("train", "valid"):
        windows = job._windows("train" if split == "train" else "valid")
        people.append({segments[int(number)].block for number in windows.segments})
        rows.append({int(start) + step for start in windows.starts for step in range(64)})
    assert not people[0] & people[1]
    assert not rows[0] & rows[1]
    assert (len(people[0]), len(people[1])) == (7, 3)
    data = job.dataset("valid")
    assert {int(data[index]["label"]) for index in range(len(data))} == set(range(7))  # type: ignore[arg-type]


def test_channels_are_standardised_by_training_people_alone(tmp_path: Path) -> None:
    table = made_table()
    held = held_out_blocks([Segment(f"p{i}", label, 0, 1, "") for i in range(6) for label in ("still", "walk")])
    shifted = table.copy()
    shifted.loc[shifted["block"].isin(held), "x"] += 1000.0
    stored = []
    for name, content in (("plain", table), ("shifted", shifted)):
        content.to_csv(tmp_path / f"{name}.csv", index=False)
        job = opened(tmp_path / f"{name}.csv")
        assert job._table is not None
        stored.append(job._table)
    plain, other = stored
    for field in ("mean", "deviation", "need", "linear"):
        assert torch.equal(getattr(plain, field), getattr(other, field)), f"{field} knows held-out rows"
    assert float((other.rows - plain.rows).abs().max()) > 100


def test_windows_are_cut_inside_segments() -> None:
    segments = [
        Segment("a", "x", 0, 100, ""),
        Segment("a", "y", 100, 70, ""),
        Segment("b", "x", 170, 100, ""),
        Segment("b", "y", 270, 40, ""),
        Segment("c", "y", 310, 64, ""),
    ]
    for held_out in (False, True):
        windows = cut_windows(segments, 64, held_out=held_out)
        for start, owner in zip(windows.starts.tolist(), windows.segments.tolist(), strict=True):
            segment = segments[owner]
            assert segment.first <= start
            assert start + 64 <= segment.first + segment.rows
            assert (segment.block in held_out_blocks(segments)) is held_out


@pytest.mark.parametrize(
    ("labels_of_blocks", "held", "valid_labels"),
    [
        ([{"x", "y"}] * 8, 2, {"x", "y"}),
        ([{"x"}] * 4 + [{"y"}] * 12, 4, {"x", "y"}),
        ([{"x", "y"}, {"x", "y"}], 1, {"x", "y"}),
        ([{"x"}, {"x", "y"}, {"y"}], 2, {"x", "y"}),
    ],
)
def test_a_quarter_of_the_blocks_of_each_label_is_held_out(
    labels_of_blocks: list[set[str]], held: int, valid_labels: set[str]
) -> None:
    segments = [
        Segment(f"b{number}", label, 0, 100, "")
        for number, labels in enumerate(labels_of_blocks)
        for label in sorted(labels)
    ]
    chosen = held_out_blocks(segments)
    assert len(chosen) == held
    assert held_out_blocks(list(reversed(segments))) == chosen
    assert {s.label for s in segments if s.block not in chosen} == {"x", "y"}
    assert {s.label for s in segments if s.block in chosen} == valid_labels


def test_items_are_views_of_one_table_and_come_in_batches() -> None:
    rows = torch.arange(600.0).reshape(200, 3)
    segments = [Segment(name[0], name[1], 50 * i, 50, "") for i, name in enumerate(("ax", "ay", "bx", "by"))]
    windows = cut_windows(segments, 20, held_out=False)
    data = WindowDataset(rows, windows, 20)
    many = data.__getitems__([3, 0, 5])
    for index, item in zip((3, 0, 5), many, strict=True):
        start = int(windows.starts[index])
        assert torch.equal(item["x"], rows[start : start + 20])
        assert torch.equal(item["x"], data[index]["x"])
        assert int(item["index"]) == index
    with pytest.raises(IndexError, match="of"):
        data[len(data)]


def test_the_watch_is_averaged_to_ten_hertz() -> None:
    fine, coarse = WatchRecordings(1), WatchRecordings(5)
    assert [s.rows // 5 for s in fine.segments()] == [s.rows for s in coarse.segments()]
    rows, slow = fine.load(lambda *said: None), coarse.load(lambda *said: None)
    second = coarse.segments()[1]
    begin = fine.segments()[1].first
    assert torch.allclose(slow[second.first], rows[begin : begin + 5].mean(0), atol=1e-5)
    assert downsample(torch.arange(7.0)[:, None], 3)[:, 0].tolist() == [1.0, 4.0]


# --- the user's own tables ------------------------------------------------------------------------------------------


def test_a_table_from_file_to_a_trained_model(table: Path) -> None:
    """Through the worker, as `tuner train` runs it: production on the user's CSV, judged on held-out blocks."""
    job = opened(table)
    info = job.info()
    assert info.train_samples == len(job.dataset("train"))  # type: ignore[arg-type]
    assert job.model()(torch.zeros(1, 64, 3), torch.zeros(1, 3, dtype=torch.bool))[0].shape == (1, 2)
    with SubprocessRunner(table.parent / "cache", log_dir=table.parent / "logs", trust=ANY_CODE) as runner:
        config: RunConfig = info.baseline.model_copy(update={"horizon_samples": 160, "cadence": Cadence()})
        request = ProbeRequest(
            id="own-table",
            kind=ProbeKind.END_TO_END,
            workload="graph",
            options=config.options,
            points=(config,),
            limits=ProbeLimits(measure_s=0.5, min_steps=4, deadline_s=100.0),
            cache_dir=str(table.parent / "cache"),
            soak=True,
        )
        reply = runner.run(request).points[0]
    assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"


def test_a_model_learns_the_users_table(table: Path) -> None:
    job = opened(table, window_size=32)
    torch.manual_seed(0)
    model, data = job.model(), job.dataset("train")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(60):
        rows = torch.randint(len(data), (16,), generator=torch.Generator().manual_seed(step))  # type: ignore[arg-type]
        batch = {**job.collate(data.__getitems__(rows.tolist())), "sample_seed": rows + 1000 * step}  # type: ignore[attr-defined]
        optimizer.zero_grad()
        torch.stack([term.sum / term.weight for term in job.loss(model, batch).values()]).sum().backward()
        optimizer.step()
    found, trivial = job.evaluate(model.eval(), job._valid_batches()), job.trivial()
    assert found["accuracy"] > 0.9 > trivial["accuracy"].value
    assert found["masked_mse"] < 0.5 * trivial["masked_mse"].value


@pytest.mark.parametrize("kind", ["parquet", "folder", "pieces", "named"])
def test_other_forms_of_the_same_rows_give_the_same_windows(
    kind: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = opened(table)
    content, options, path = made_table(), {}, tmp_path / "other"
    path.mkdir()
    if kind == "parquet":
        content.to_parquet(path / "walks.parquet")
        path = path / "walks.parquet"
    elif kind == "folder":
        for number, (_, part) in enumerate(content.groupby("block")):
            part.to_csv(path / f"{number}.csv", index=False)
        (path / "README.txt").write_text("not a table")
    elif kind == "pieces":
        monkeypatch.setattr(table_file, "PIECE_ROWS", 37)
        content.to_csv(path / "walks.csv", index=False)
    else:
        content["time"] = "2024-01-01 00:00"
        content = content.rename(columns={"block": "who", "label": "what"})
        content.to_csv(path / "walks.csv", index=False)
        options = {"block_column": "who", "label_column": "what", "sensor_columns": "x, y,z"}
    got = opened(path, **options)
    assert got._table is not None
    assert wanted._table is not None
    assert got._source.channels == ("x", "y", "z")
    assert torch.allclose(got._table.rows, wanted._table.rows, atol=1e-4)
    for split in ("train", "valid"):
        one, two = (job._windows("train" if split == "train" else "valid") for job in (got, wanted))
        assert torch.equal(one.starts, two.starts)
        assert torch.equal(one.labels, two.labels)


def test_a_changed_table_is_read_again(table: Path) -> None:
    first = opened(table)
    content = made_table()
    content["x"] *= -1
    content.to_csv(table, index=False)
    second = opened(table)
    assert first._table is not None
    assert second._table is not None
    assert torch.allclose(second._table.rows[:, 0], -first._table.rows[:, 0], atol=1e-5)


def test_a_killed_reading_leaves_nothing_that_is_believed(table: Path, tmp_path: Path) -> None:
    made_table(blocks=40).to_csv(table, index=False)
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(table), str(tmp_path / "cache")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    for line in process.stdout:
        if line.endswith("reading sensors\n") or time.monotonic() > deadline:
            break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not list((tmp_path / "cache").glob("graph/table-*/*"))
    assert opened(table)._table is not None


def test_a_full_disk_is_said_before_the_table_is_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        """Hardware that is not there: a disk with 1 MiB left."""

        free = 1 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda path: FullDisk)
    with pytest.raises(WorkloadError, match=r"needs \d+ MiB, but 1 MiB are free; free disk space"):
        opened(table)


Change = Callable[[pandas.DataFrame], pandas.DataFrame]


def _cell(row: int, column: str, value: str | None) -> Change:
    def change(content: pandas.DataFrame) -> pandas.DataFrame:
        content = content.astype(object)
        content.loc[row, column] = value
        return content

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_cell(40, "y", "broken"), {}, "walks.csv: row 42, column 'y': 'broken' is not a finite number; mend it"),
        (_cell(41, "x", None), {}, "walks.csv: row 43, column 'x': the value is missing; fill it in or remove"),
        (_cell(42, "z", "inf"), {}, "walks.csv: row 44, column 'z': 'inf' is not a finite number"),
        (_cell(43, "x", "1e99"), {}, "walks.csv: row 45, column 'x': '1e+99' is not a finite number"),
        (_cell(44, "block", ""), {}, "walks.csv: row 46, column 'block': it is empty; every row needs one"),
        (_cell(45, "label", " "), {}, "walks.csv: row 47, column 'label': it is empty"),
        (lambda c: c.drop(columns="label"), {}, "it has no column 'label'; its columns are block, x, y, z: rename one"),
        (lambda c: c, {"block_column": "who"}, "no column 'who'; its columns are block, label, x, y, z: rename one"),
        (lambda c: c, {"sensor_columns": "x,w"}, "it has no column 'w'"),
        (lambda c: c, {"sensor_columns": "x"}, "2 to 32 sensor columns can be used, but it has 1; name those to use"),
        (lambda c: c.assign(**{f"s{i}": 0 for i in range(30)}), {}, "columns can be used, but it has 33"),
        (lambda c: c[c["label"] == "walk"], {}, "at least 2 different labels are needed to tell apart, but found only"),
        (lambda c: c[(c["label"] == "walk") | (c["block"] == "p1")], {}, "label 'still' is in one block only"),
        (lambda c: c[c["block"] == "p1"], {}, "('p1'); validation takes whole blocks, so each label"),
        (lambda c: c.drop(index=range(30, 400)), {}, "block 'p0' is shorter than a window: its longest run of one label"
         " (walks.csv rows 2 to 31) has 30 rows, and options.window_size is 64"),
        (lambda c: c.head(0), {}, "it holds no rows; expected one row a time step"),
    ],
)  # fmt: skip
def test_wrong_tables_get_one_clear_line(
    change: Change, options: dict[str, Scalar], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "walks.csv"
    change(made_table()).to_csv(file, index=False)
    with pytest.raises(WorkloadError) as caught:
        opened(file, **options).info()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: it is empty; expected one row a time step"),
        ("a.csv", b"block,label,x,x\n", "row 1: the column name 'x' occurs twice"),
        (
            "a.csv",
            b"block,label,x,y\np,q,1,2\np,q,1,2,3\n",
            "a.csv: row 3 has 5 fields, but the header has 4: block, label, x, y; texts with commas",
        ),
        ("a.csv", "block,label,x,\u00fc\n".encode("latin-1"), "a.csv: row 1, column '\\xfc': it is not UTF-8"),
        ("a.parquet", b"PAR1 no more", "a.parquet cannot be read as parquet"),
        ("a.txt", b"hello", "is no .csv or .parquet file"),
    ],
)
def test_files_that_are_no_tables(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkloadError) as caught:
        opened(tmp_path / name).info()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_and_a_folder_without_tables(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="does not exist; expected a CSV or parquet file"):
        Graph({"data": str(tmp_path / "none.csv")})
    with pytest.raises(WorkloadError, match=r"holds no \.csv or \.parquet file"):
        Graph({"data": str(tmp_path)})


def test_a_second_file_without_a_column_is_named(tmp_path: Path) -> None:
    made_table().to_csv(tmp_path / "a.csv", index=False)
    made_table().drop(columns="y").to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(WorkloadError, match=r"b\.csv: it has no column 'y'"):
        Graph({"data": str(tmp_path)})


def test_a_parquet_cell_is_named_by_its_row(tmp_path: Path) -> None:
    content = made_table()
    content.loc[7, "y"] = np.nan
    content.to_parquet(tmp_path / "walks.parquet")
    with pytest.raises(WorkloadError, match=r"walks\.parquet: row 8, column 'y': the value is missing"):
        opened(tmp_path / "walks.parquet")


def test_a_foreign_watch_file_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    watch._recordings.cache_clear()
    monkeypatch.setattr(watch, "SHA256", "0")
    with pytest.raises(WorkloadError, match=r"is not the file of seglearn 1.2.5, so it is not opened; install it with"):
        Graph({}).info()


def test_a_missing_watch_file_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    watch._recordings.cache_clear()
    monkeypatch.setattr(watch, "FILE", Path("data/none.npy"))
    with pytest.raises(WorkloadError, match=r"none.npy cannot be read: .*; install it with"):
        Graph({}).info()


def test_segments_end_where_block_label_or_file_changes(tmp_path: Path) -> None:
    rows = [("a", "x")] * 3 + [("a", "y")] * 2 + [("b", "y")] * 4
    for name in ("1.csv", "2.csv"):
        pandas.DataFrame([(*row, 1, 2) for row in rows], columns=["block", "label", "u", "v"]).to_csv(
            tmp_path / name, index=False
        )
    table = SensorTable(tmp_path, block_column="block", label_column="label", sensor_columns="", downsample_by=1)
    found = [(s.block, s.label, s.first, s.rows, s.where) for s in table.segments()]
    assert found[:3] == [
        ("a", "x", 0, 3, "1.csv rows 2 to 4"),
        ("a", "y", 3, 2, "1.csv rows 5 to 6"),
        ("b", "y", 5, 4, "1.csv rows 7 to 10"),
    ]
    assert found[3] == ("a", "x", 9, 3, "2.csv rows 2 to 4")

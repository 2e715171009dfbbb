"""What can happen to a checkpoint: flipped bits, other names, sick disks, a kill between two moves, a second run."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.engine_toys import ROOT, answer, toy_config
from tuner.contract.config import Cadence
from tuner.contract.errors import ConfigError
from tuner.contract.probe import NoticeEvent, ProbeKind, TrainPlan, TrainResult
from tuner.engine import checkpoint, judging, tensor_file
from tuner.engine.background import BackgroundWriter
from tuner.engine.checkpoint import BEST, Checkpointer, CheckpointError, Snapshot
from tuner.engine.table import Table
from tuner.run_lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from tuner.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves are another test's matter, and take longer than these runs."""
    for name in ("draw_curves", "draw_quality"):
        monkeypatch.setattr(judging, name, lambda *_: None)


def state(samples: int) -> dict[str, Any]:
    """All dtypes a state may have, tensors without elements and without dimensions, and plain values."""
    made = torch.Generator().manual_seed(samples)
    tensors = {str(dtype): torch.randint(0, 2, (7, 3), generator=made).to(dtype) for dtype in tensor_file.DTYPES}
    shapes = {"scalar": torch.tensor(float(samples)), "empty": torch.empty(0, 3), "one": torch.ones(1, 1)}
    return {"samples": samples, "tensors": tensors, "shapes": shapes, "plain": [1, 0.1, None, "ü", (2, True)]}


def saved(folder: Path, *samples: int, keep: int = 3) -> Checkpointer:
    keeper = Checkpointer(folder, keep)
    for count in samples:
        keeper.save(state(count))
    return keeper


def newest(folder: Path, keep: int = 3) -> tuple[int, list[str]]:
    """Samples of the newest intact state, once its content is proved, and what was told on the way to it."""
    told: list[str] = []
    found = Checkpointer(folder, keep).latest(told.append)
    assert found is not None
    expected = state(found["samples"])
    for name, value in {**expected["tensors"], **expected["shapes"]}.items():
        loaded = {**found["tensors"], **found["shapes"]}[name]
        assert loaded.dtype == value.dtype
        assert torch.equal(loaded, value)
    assert found["plain"] == expected["plain"]
    return found["samples"], told


def test_every_flipped_bit_of_every_file_is_found(tmp_path: Path) -> None:
    keeper = saved(tmp_path, 10)
    keeper.save_best(state(10), {"value": 0.25, "metric": "auc", "samples": 10})
    chance = random.Random()
    for folder in (keeper.all()[0], tmp_path / BEST):
        for file in sorted(folder.iterdir()):
            whole = file.read_bytes()
            for _ in range(60):
                flipped = bytearray(whole)
                place, bit = chance.randrange(len(whole)), chance.randrange(8)
                flipped[place] ^= 1 << bit
                file.write_bytes(flipped)
                with pytest.raises(CheckpointError):
                    assert checkpoint.load(folder), f"bit {bit} of byte {place} of {file} was not noticed"
            file.write_bytes(whole)
    assert newest(tmp_path) == (10, [])
    assert keeper.best() == {"value": 0.25, "metric": "auc", "samples": 10}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "longer", "folder"])
def test_torn_and_zeroed_files_are_passed_over_aloud(name: str, damage: str, tmp_path: Path) -> None:
    file = saved(tmp_path, 10, 20).all()[0] / name
    data = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        torn = {"cut": data[:-1], "empty": b"", "zeros": data[:9] + bytes(len(data) - 9), "longer": data + b" "}
        file.write_bytes(torn[damage])
    samples, told = newest(tmp_path)
    assert samples == 10
    assert len(told) == 1
    assert "step-000000000020" in told[0]


def test_a_damaged_best_checkpoint_is_told_and_not_trusted(tmp_path: Path) -> None:
    keeper = saved(tmp_path, 10)
    assert keeper.best() is None
    keeper.save_best(state(10), {"value": 1.0})
    manifest = tmp_path / BEST / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"value": 1.0', '"value": 9.0'))
    told: list[str] = []
    assert keeper.best(told.append) is None
    assert "best" in told[0]


def test_a_checkpoint_under_another_name_is_told_and_never_hides_that_there_was_one(tmp_path: Path) -> None:
    keeper = saved(tmp_path, 10, 20)
    keeper.all()[0].rename(tmp_path / "step-000000000030")
    samples, told = newest(tmp_path)
    assert samples == 10
    assert "step-000000000030" in told[0]
    assert "rename it to step-000000000020" in told[0]
    shutil.rmtree(tmp_path / "step-000000000010")
    (tmp_path / "step-000000000030").rename(tmp_path / "my backup")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is intact"):
        keeper.latest()


def test_a_folder_goes_on_where_it_was_copied_to(tmp_path: Path) -> None:
    saved(tmp_path / "here", 10, 20)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    assert newest(tmp_path / "there") == (20, [])


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_never_pushes_out_an_intact_one(keep: int, tmp_path: Path) -> None:
    keeper = saved(tmp_path, 10, 30, keep=2)
    (keeper.all()[0] / "state.json").write_bytes(b"")
    saved(tmp_path, 20, keep=keep)
    assert newest(tmp_path) == (20, [])
    assert len(keeper.all()) == keep


class Killed(BaseException):
    """Stands for a kill: nothing that cleans up after errors may run."""


@contextlib.contextmanager
def killed_at(moment: int) -> Iterator[list[int]]:
    """Within: the process is `killed` at its disk operation number `moment`; yields how many there have been."""
    count = [0]

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*words: Any, **named: Any) -> Any:
            count[0] += 1
            if count[0] == moment:
                raise Killed
            return operation(*words, **named)

        return operate

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
            patch.setattr(owner, name, watched(getattr(owner, name)))
        yield count


@pytest.mark.parametrize("what", ["next", "again", "best"])
def test_a_kill_between_any_two_disk_operations_leaves_an_intact_state(what: str, tmp_path: Path) -> None:
    """A loadable checkpoint exists at every instant after the first save, and so does a best one."""
    moment, operations = 0, -1
    while moment != operations:
        moment += 1
        folder = tmp_path / str(moment)
        keeper = saved(folder, 10, 20, keep=2)
        keeper.save_best(state(10), {"value": 10})
        with killed_at(moment) as count:
            try:
                if what == "best":
                    keeper.save_best(state(20), {"value": 20})
                else:
                    keeper.save(state(30 if what == "next" else 20))
            except Killed:
                pass
            else:
                operations = moment
        samples, told = newest(folder)
        assert samples in ((20, 30) if what == "next" else (20,))
        assert told == []
        assert (keeper.best() or {})["value"] in ((10, 20) if what == "best" else (10,))
        keeper.save(state(40))
        assert [path.name for path in folder.glob(".*")] == [], "a later save sweeps what the kill has left"
    assert count[0] >= 6


@pytest.mark.parametrize(("number", "says"), [(errno.EIO, "input/output error"), (errno.ENOSPC, "is full")])
def test_a_sick_disk_is_told_in_one_line_and_the_previous_one_stands(
    number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = saved(tmp_path, 10)

    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(CheckpointError, match=says) as raised:
            keeper.save(state(20))
    assert "the previous one (step-000000000010) is intact" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000010"]
    assert newest(tmp_path) == (10, [])


def test_a_limit_on_file_size_ends_no_run(tmp_path: Path) -> None:
    """The writing really fails, in the middle of a file; the run says so each time and goes on to its end."""
    config = toy_config({"width": 128, "samples": 200}, horizon_samples=480, cadence=Cadence(checkpoint_samples=160))
    small = toy_config({"width": 128, "samples": 200}, horizon_samples=480, cadence=Cadence())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for background in (False, True):
        plan = TrainPlan(out_dir=str(tmp_path / str(background)), background_checkpoints=background)
        answer(ProbeKind.TRAIN, small, train=plan.model_copy(update={"max_samples": 16}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            events = answer(ProbeKind.TRAIN, config, train=plan)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        told = [event.text for event in events if isinstance(event, NoticeEvent) and "File too large" in event.text]
        assert len(told) >= 2
        assert all("step-000000000016) is intact" in text for text in told)
        assert not [event for event in events if isinstance(event, TrainResult)], "the last one could not be written"
        (result,) = [e for e in answer(ProbeKind.TRAIN, config, train=plan) if isinstance(e, TrainResult)]
        assert (result.resumed_from, result.finished) == (16, True)


def test_what_is_written_in_the_background_is_the_state_of_one_moment(tmp_path: Path) -> None:
    """The training changes every tensor, and the numbers too, while the disk is slow."""
    gate, keeper = threading.Event(), Checkpointer(tmp_path)

    def slowly(snapshot: Snapshot) -> None:
        gate.wait(30)
        keeper.save(snapshot)

    live = state(10)
    writer = BackgroundWriter(slowly)
    writer.start(live)
    for value in (*live["tensors"].values(), *live["shapes"].values()):
        value.zero_()
    live["samples"] = 11
    live["plain"].clear()
    assert (writer.in_flight, writer.done) == (True, False)
    gate.set()
    writer.wait()
    assert newest(tmp_path) == (10, [])
    writer.start(state(20))
    writer.wait()
    assert newest(tmp_path) == (20, [])


def test_a_loaded_state_does_not_hold_its_file(tmp_path: Path) -> None:
    """A view into the file would keep the disk space of a removed checkpoint, and fall with a failing disk."""
    held = saved(tmp_path, 10).latest()
    assert held is not None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"another process is writing this run \\(process {holder.pid} on"):
            RunLock(tmp_path, wait_s=0.2).__enter__()
        holder.kill()
        with RunLock(tmp_path):
            pass


def test_a_torn_table_keeps_its_whole_rows(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", lambda _: None)
    for samples in (10, 20, 30):
        table.add(samples, {"loss": samples / 100, "lr": 1.0})
    with table.path.open("ab") as file:
        file.write(b"40,0.4\n50,0.5,1,60,0.6,1\n70,\xff\xfe,1\n\x00\x00\x00\x00\n80,0.8x,1\n90,0.9,1\n100,1.0")
    assert [row["samples"] for row in table.rows()] == ["10", "20", "30", "90"]
    again = Table(table.path, lambda _: None)
    again.forget_after(90)
    again.add(100, {"loss": 1.0, "lr": 1.0})
    assert table.path.read_text().splitlines() == [
        "samples,loss,lr", "10,0.1,1", "20,0.2,1", "30,0.3,1", "90,0.9,1", "100,1,1"
    ]  # fmt: skip

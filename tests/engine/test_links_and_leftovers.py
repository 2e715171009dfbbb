"""A run's folder is its own: no link in it leads a run to somebody else's files, and what a kill left is swept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import RunTuner
from tests.engine.test_figures_of_a_run import config, result_of, told, trained
from tests.toys import Toy
from tuner.contract.config import Cadence
from tuner.contract.errors import ConfigError
from tuner.contract.own_files import replace_text, replacing
from tuner.engine.checkpoint import Checkpointer, CheckpointError
from tuner.run_lock import RunLock

SHORT = config(horizon_samples=128, cadence=Cadence(log_samples=64, checkpoint_samples=32))


def victim(folder: Path) -> Path:
    """Somebody else's checkpoints, older ones than a run of ours would keep."""
    keeper = Checkpointer(folder / "theirs", keep=9)
    for samples in (1, 2, 3):
        keeper.save({"samples": samples, "w": torch.ones(3)})
    (folder / "theirs" / "notes.txt").write_text("mine")
    return folder / "theirs"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["checkpoints", "samples", ".lock", "status.json", "metrics.csv", "config.yaml", "samples/000000000128"]
)
def test_a_link_where_a_run_would_write_is_refused_and_nothing_behind_it_touched(
    name: str, tuner: RunTuner, tmp_path: Path
) -> None:
    theirs = victim(tmp_path)
    before = contents(theirs)
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs if "." not in name else theirs / "notes.txt")
    with pytest.raises(ConfigError, match="is a link to"):
        RunLock(tmp_path / "run").acquire()
    ran = tuner("train", "-w", "tests.toys:Toy", "--max-samples", "64", "--out", "run")
    assert ran.code == 2, ran.err
    assert len(ran.err.splitlines()) == 1
    assert f"run/{name}: is a link to" in ran.err
    assert contents(theirs) == before
    assert os.listdir(link.parent) == [link.name]


def test_the_folder_itself_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    result_of(trained(SHORT, tmp_path / "run", Toy))
    assert (tmp_path / "disk" / "checkpoints" / "step-000000000128").is_dir()


def test_of_a_checkpoint_that_is_a_link_the_link_alone_is_removed(tmp_path: Path) -> None:
    """Kept ones beyond the newest two, one to be replaced, the best, and what looks like a leftover."""
    theirs = victim(tmp_path)
    before = contents(theirs)
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("step-000000000001", "step-000000000002", "best", ".step-step-000000000009.old", ".step-left"):
        (mine / name).symlink_to(theirs / "step-000000000001")
    (mine / "step-000000000004").symlink_to(tmp_path / "nowhere")
    keeper = Checkpointer(mine, keep=2)
    keeper.save_best({"samples": 3, "w": torch.ones(3)}, {"value": 1})
    for samples in (4, 5):
        keeper.save({"samples": samples, "w": torch.ones(3)})
    assert sorted(os.listdir(mine)) == ["best", "step-000000000004", "step-000000000005"]
    assert not [path for path in mine.iterdir() if path.is_symlink()]
    assert contents(theirs) == before


def test_checkpoints_that_become_a_link_in_the_middle_of_a_run_are_not_followed(tmp_path: Path) -> None:
    theirs = victim(tmp_path)
    before = contents(theirs)
    (tmp_path / "mine").symlink_to(theirs)
    keeper = Checkpointer(tmp_path / "mine", keep=1)
    with pytest.raises(CheckpointError, match="is a link"):
        keeper.save({"samples": 9})
    with pytest.raises(CheckpointError, match="is a link"):
        keeper.save_best({"samples": 9}, {})
    keeper.sweep()
    assert contents(theirs) == before


@pytest.fixture
def other_process() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def test_what_a_killed_writer_left_is_swept_at_the_next_start(tmp_path: Path, other_process: int) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [
        f".status.json.{gone.pid}.part",
        f".metrics.csv.{os.getpid()}.part",
        ".curves.png.part",
        f"status.json.{gone.pid}.part",
        f"..run-abc.json.{gone.pid}.part",
        f"checkpoints/.step-000000000032.{gone.pid}/tensors.safetensors",
        "checkpoints/.step-step-000000000032.1.gone/state.json",
    ]
    kept = [f".status.json.{other_process}.part", "model.part", f".mine.txt.{gone.pid}.part", "notes.part.txt"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    events = trained(SHORT.model_copy(update={"cadence": Cadence(log_samples=64)}), tmp_path, Toy)
    assert result_of(events).finished
    assert not told(events, "warning")
    assert [name for name in left if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    assert os.listdir(tmp_path / "checkpoints") == ["step-000000000128"]


def test_nothing_is_swept_while_another_process_has_the_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tuner.run_lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); input()"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        part = tmp_path / ".status.json.part"
        part.write_text("being written")
        with pytest.raises(ConfigError, match="another process is writing this run"):
            RunLock(tmp_path, wait_s=0.1).acquire()
        assert part.read_text() == "being written"


def test_a_write_that_fails_leaves_no_part_and_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    replace_text(file, "old")
    with pytest.raises(UnicodeEncodeError), replacing(file) as aside:
        aside.write_text("half a \ud83d")
    assert contents(tmp_path) == {"file": b"old"}

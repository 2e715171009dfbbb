"""A disk too small for what is kept: older checkpoints make room for newer ones, and what cannot be saved is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.engine_toys import ROOT

MOUNT = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
SAVES = """
import json, sys
from pathlib import Path
import torch
from tuner.engine.checkpoint import Checkpointer, CheckpointError

keeper = Checkpointer(Path("checkpoints"), keep=3)
told = []
for word in sys.argv[1:]:
    what, _, number = word.partition(":")
    state = {"samples": int(number or 0), "w": torch.ones(250_000)}
    try:
        if what == "best":
            keeper.save_best(state, {"value": 1})
        elif what == "damage":
            (keeper.all()[0] / "state.json").write_bytes(b"")
        elif what == "huge":
            keeper.save({**state, "w": torch.ones(10_000_000)})
        else:
            keeper.save(state)
    except CheckpointError as error:
        told.append(str(error))
state = keeper.latest(told.append)
print(json.dumps({
    "latest": state["samples"], "best": keeper.best(), "told": told, "given_up": keeper.given_up,
    "left": sorted(path.name.lstrip("step-0") for path in keeper.directory.iterdir()),
}))
"""
RUN = """
import json, sys
from tests.engine.engine_toys import answer, toy_config
from tuner.contract.config import Cadence
from tuner.contract.probe import NoticeEvent, PointReply, ProbeKind, TrainPlan, TrainResult

config = toy_config({"width": 96}, horizon_samples=320, cadence=Cadence(checkpoint_samples=int(sys.argv[1])))
plan = TrainPlan(out_dir="run", background_checkpoints=sys.argv[2] == "background")
events = answer(ProbeKind.TRAIN, config, train=plan)
print(json.dumps({
    "results": [event.samples for event in events if isinstance(event, TrainResult)],
    "ends": [event.message for event in events if isinstance(event, PointReply)],
    "told": [event.text for event in events if isinstance(event, NoticeEvent) and event.level == "warning"],
}))
"""


def on_small_disk(folder: Path, size: str, code: str, *words: str) -> dict[str, Any]:
    """What `code` prints, run on a file system of `size` that nobody else sees."""
    if shutil.which("unshare") is None:
        pytest.skip("not run: no unshare to mount a small file system with")
    disk = folder / "disk"
    disk.mkdir()
    command = ["unshare", "-m", "sh", "-c", MOUNT, size, str(disk)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not run: a small file system cannot be mounted here")
    python = ["env", "-C", str(disk), f"PYTHONPATH={ROOT}", sys.executable, "-c", code, *words]
    ran = subprocess.run([*command, *python], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(
    ("words", "latest", "given_up", "left"),
    [
        pytest.param("save:1 save:2 save:3", 3, [1], ["2", "3"], id="the oldest makes room"),
        pytest.param("save:1 save:2 save:3 save:4", 4, [1, 2], ["3", "4"], id="again and again"),
        pytest.param("best:1 save:2 save:3", 2, [], ["2", "best"], id="never the best one"),
        pytest.param("save:1 save:2 damage save:3", 1, [], ["1", "2"], id="never the only good one"),
        pytest.param("save:1 save:2 best:2", 2, [1], ["2", "best"], id="for the best one too"),
    ],
)
def test_older_checkpoints_make_room_for_a_newer_one(
    words: str, latest: int, given_up: list[int], left: list[str], tmp_path: Path
) -> None:
    """One of a megabyte each, on a disk with room for two."""
    found = on_small_disk(tmp_path, "2500k", SAVES, *words.split())
    assert found["latest"] == latest
    assert found["given_up"] == [f"step-{number:012d}" for number in given_up]
    assert found["left"] == left
    assert (found["best"] is not None) == ("best" in left)


def test_what_finds_no_room_at_all_is_told_and_the_previous_one_stands(tmp_path: Path) -> None:
    found = on_small_disk(tmp_path, "2500k", SAVES, "save:1", "huge:2")
    assert (found["latest"], found["left"]) == (1, ["1"])
    assert "is full; the previous one (step-000000000001) is intact" in found["told"][0]


@pytest.mark.parametrize("how", ["waiting", "background"])
def test_a_run_on_a_disk_with_room_for_two_checkpoints_loses_nothing(how: str, tmp_path: Path) -> None:
    found = on_small_disk(tmp_path, "900k", RUN, "80", how)
    assert found["results"] == [320]
    given_up = [text for text in found["told"] if "given up" in text]
    assert "is full: step-000000000080 given up for a newer checkpoint" in given_up[0]


def test_a_run_whose_last_checkpoint_finds_no_room_names_the_one_before(tmp_path: Path) -> None:
    found = on_small_disk(tmp_path, "600k", RUN, "160", "waiting")
    assert found["results"] == []
    assert "the previous one (step-000000000160) is intact" in found["ends"][0]

"""Signals to stop, whichever of the processes gets them: `train` saves and goes on later, `optimize` keeps its rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import tuner_environment
from tests.faults.fault_probes import eventually, marked
from tests.faults.stopped_jobs import STUCK_FROM

MARK = "TUNER_TEST_MARK"
SHM_MIB = 1
"""Of the small /dev/shm."""


class Running:
    """A `tuner` command with all its processes, as `ps` would show them."""

    def __init__(self, folder: Path, cache: Path, *words: str, before: Sequence[str] = ()) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        environment = tuner_environment(cache) | {MARK: self.mark}
        self._said = (folder / "said").open("wb")
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "tuner", *words],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
            start_new_session=True,
        )  # fmt: skip

    def family(self) -> list[psutil.Process]:
        return marked(MARK, self.mark)

    def those(self, *words: str) -> list[int]:
        """Processes by their part: command, host, run, loader."""
        command = next(p for p in self.family() if "tuner" in p.cmdline()[1:4] and "--serve" not in p.cmdline())
        host = next(p for p in self.family() if "--serve" in p.cmdline())
        runs = host.children()
        loaders = [loader for run in runs for loader in run.children()]
        parts = {"command": [command], "host": [host], "run": runs, "loader": loaders}
        return [process.pid for word in words for process in parts[word]]

    def send(self, number: int, pids: Sequence[int]) -> None:
        for pid in pids:
            os.kill(pid, number)

    @property
    def said(self) -> str:
        return " ".join((self.folder / "said").read_text(errors="replace").split())

    def has_trained(self) -> bool:
        lines = self.folder / "run" / "metrics.jsonl"
        return lines.exists() and lines.stat().st_size > 0

    def samples(self) -> int:
        """In the newest line of the log."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["samples"]) if lines else 0

    def phase(self) -> str:
        return str(json.loads((self.folder / "run" / "status.json").read_text()).get("phase", ""))

    def ends(self) -> int:
        """Its exit code; nothing is left of it."""
        code = self.process.wait(100)
        assert eventually(lambda: not self.family(), 10), [p.cmdline() for p in self.family()]
        return code

    def close(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()
        self._said.close()


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path, cache: Path) -> Iterator[Start]:
    started: list[Running] = []

    def begin(*words: str, before: Sequence[str] = ()) -> Running:
        started.append(Running(tmp_path, cache, *words, before=before))
        return started[-1]

    yield begin
    for running in started:
        running.close()


def job(name: str) -> str:
    return f"tests.faults.stopped_jobs:{name}"


def training(start: Start, name: str, *words: str, before: Sequence[str] = ()) -> Running:
    """A run that has trained for a while."""
    running = start("train", "-w", job(name), "-o", "sleep_s=0.005", "--out", "run", *words, before=before)
    assert eventually(lambda: running.has_trained() or running.process.poll() is not None, 100), running.said
    assert running.process.poll() is None, running.said
    return running


def wait_until_stuck(running: Running) -> None:
    assert eventually(lambda: running.samples() > STUCK_FROM - 32)
    time.sleep(1)  # from the line of the log into the data set


ALL = ("command", "host", "run", "loader")


def long(*values: object) -> Any:
    """A sibling of the everyday cases, for `make test-long`."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "parts", "times"),
    [
        (signal.SIGTERM, ALL, 1),
        long(signal.SIGUSR1, ALL, 2),
        (signal.SIGHUP, ("command",), 1),
        long(signal.SIGTERM, ("host",), 1),
        long(signal.SIGINT, ("run",), 1),
        (signal.SIGTERM, ("loader",), 1),
        long(signal.SIGHUP, ("host", "loader"), 2),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(int(value)),
)
def test_training_saves_whoever_gets_the_signal(
    start: Start, number: signal.Signals, parts: tuple[str, ...], times: int
) -> None:
    running = training(start, "WithWorkers")
    for _ in range(times):
        running.send(number, running.those(*parts))
    assert running.ends() == 75, running.said
    assert f"stopped by {number.name}" in running.said
    assert "Traceback" not in running.said
    assert list((running.folder / "run" / "checkpoints").glob("step-*"))
    assert "go on with: tuner train" in running.said


@pytest.mark.parametrize("part", ["loader", long("command"), long("rank")])
def test_ranks_save_together(start: Start, part: str) -> None:
    running = training(start, "WithWorkers", "--nproc", "2")
    ranks = [p for p in running.family() if "torch.distributed.run" not in p.cmdline() and "--request" in p.cmdline()]
    if part == "command":
        running.send(signal.SIGTERM, [process.pid for process in running.family()])
    elif part == "loader":
        running.send(signal.SIGTERM, [loader.pid for rank in ranks for loader in rank.children()][-1:])
    else:
        last = max(ranks, key=lambda process: int(process.environ().get("RANK", -1)))
        running.send(signal.SIGTERM, [last.pid])
    assert running.ends() == 75, running.said
    assert "stopped by SIGTERM" in running.said
    assert list((running.folder / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_stops_nothing(start: Start) -> None:
    running = training(start, "WithWorkers", before=["nohup"])
    running.send(signal.SIGHUP, running.those("command", "host", "run"))
    before = running.samples()
    assert eventually(lambda: running.samples() > before + 200)
    running.send(signal.SIGTERM, running.those("command"))
    assert running.ends() == 75, running.said


def test_a_second_ctrl_c_says_what_is_lost(start: Start) -> None:
    running = training(start, "StuckData")
    wait_until_stuck(running)
    running.send(signal.SIGINT, running.those("command"))
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(1.0)
    running.send(signal.SIGINT, running.those("command"))
    assert running.ends() == 130
    assert "ended at once by a second Ctrl-C; lost: what was trained since the newest checkpoint" in running.said
    assert "go on with: tuner train" in running.said


def test_a_stop_is_heard_while_workers_deliver_nothing(start: Start) -> None:
    running = training(start, "StuckWorkers")
    assert eventually(lambda: running.samples() > STUCK_FROM)
    running.send(signal.SIGTERM, running.those("command"))
    assert running.ends() == 75, running.said
    assert "stopped by SIGTERM" in running.said
    assert "stuck" not in running.said


@pytest.mark.parametrize("name", ["StuckData", long("StuckEvaluation")])
def test_what_is_stuck_is_ended_and_the_checkpoint_named(start: Start, name: str) -> None:
    running = training(start, name)
    phase = "measure" if name == "StuckData" else "evaluate"
    if name == "StuckData":
        wait_until_stuck(running)
    assert eventually(lambda: running.phase() == phase)
    running.send(signal.SIGTERM, running.those("command"))
    assert running.ends() == 75, running.said
    assert f"did not end within 20 s of SIGTERM (stuck in phase '{phase}')" in running.said
    assert "The checkpoint step-" in running.said


@pytest.mark.parametrize(
    ("number", "parts", "code"),
    [
        (signal.SIGTERM, ("command", "host", "run"), 75),
        long(signal.SIGHUP, ("command",), 75),
        long(signal.SIGINT, ("command",), 130),
        long(signal.SIGTERM, ("host",), 75),
        (signal.SIGUSR1, ("run",), 75),
    ],
)
def test_a_search_ends_and_keeps_its_rows(
    start: Start, tmp_path: Path, number: signal.Signals, parts: tuple[str, ...], code: int
) -> None:
    (tmp_path / "study.yaml").write_text("workload: tests.toys:Toy\nbudget_s: 3600\n")
    running = start("optimize", "-w", "tests.toys:Toy", "-o", "sleep_s=0.02", "--gpu", "cpu", "--spec", "study.yaml")
    assert eventually(lambda: _struck(running, number, parts)), running.said
    if parts == ("run",):  # it may have been at its end: then the next one gets it
        eventually(lambda: running.process.poll() is not None or (_struck(running, number, parts) and False))
    assert running.ends() == code, running.said
    named = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"stopped by {named}. Finished probes are stored" in running.said
    assert "Traceback" not in running.said


def _struck(running: Running, number: int, parts: Sequence[str]) -> bool:
    """Is a probe after the baseline at work, and did the signal reach the parts?"""
    try:
        if "baseline" not in running.said or not running.those("run"):
            return False
        running.send(number, running.those(*parts))
    except (StopIteration, psutil.Error, ProcessLookupError):
        return False
    return True


@pytest.mark.parametrize("command", ["train", long("optimize")])
def test_a_signal_while_the_command_is_imported_is_heard(start: Start, command: str) -> None:
    """As soon as our code runs at all: `tuner` has its own handlers before it imports anything."""
    running = start(command, "-w", "tests.toys:Toy")
    process = psutil.Process(running.process.pid)
    assert eventually(lambda: _catches(process, signal.SIGTERM), 30)
    running.send(signal.SIGTERM, [process.pid])
    assert running.ends() == 75
    assert "stopped by SIGTERM" in running.said


def _catches(process: psutil.Process, number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def small_shared_memory() -> list[str]:
    """Words before a command that give it a /dev/shm of 1 MiB."""
    mount = f"mount -t tmpfs -o size={SHM_MIB}M tmpfs /dev/shm"
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, check=False)
    if shutil.which("unshare") is None or tried.returncode:
        pytest.skip(f"not run: this machine lets nobody mount ({tried.stderr.strip()})")
    return ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]


def test_too_little_shared_memory_is_seen_before(start: Start) -> None:
    running = start("train", "-w", job("LargeItems"), "--out", "run", before=small_shared_memory())
    assert running.ends() == 3, running.said
    assert "2 loader worker(s) x prefetch_factor 2 hold up to 5 batches" in running.said
    assert "/dev/shm has 1.0 MiB left" in running.said
    assert "num_workers 0" in running.said


def test_a_search_goes_on_without_workers_where_shared_memory_is_too_small(start: Start, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        f"workload: {job('LargeItems')}\nbudget_s: 15\nspace: {{num_workers: [0, 2]}}\n"
    )
    words = ("optimize", "-w", job("LargeItems"), "--gpu", "cpu", "--spec", "study.yaml", "--out", "best.yaml")
    running = start(*words, before=small_shared_memory())
    assert running.ends() == 0, running.said
    assert "the baseline itself cannot run here (shared memory: 2 loader worker(s)" in running.said
    assert "compared with itself without loader workers" in running.said

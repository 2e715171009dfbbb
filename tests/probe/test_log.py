"""A log keeps its beginning and its newest part, wherever it lies and however its writer ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.fault_probes import request, struck
from tuner.contract.measurement import Outcome
from tuner.contract.trust import ANY_CODE
from tuner.probe.log import HEAD_BYTES, TAIL_BYTES, Log
from tuner.probe.runner import SubprocessRunner

MOST = HEAD_BYTES + TAIL_BYTES + 100
"""Head, tail, and the line between them."""
WRITER = """
import os, sys
for number in range(300_000):
    print(f"line {number} " + "." * 60)
    if number % 20_000 == 0:
        sys.stdout.flush()
        print("so far", file=sys.stderr, flush=True)
        input()
print("last words", flush=True)
os.abort()
"""
FOLLOWER = """
import os, subprocess, sys
from pathlib import Path
from tuner.probe.log import Log

most = 0
with Log(Path(sys.argv[1])) as log:
    words, pipe = [sys.executable, "-c", sys.argv[2]], subprocess.PIPE
    writer = subprocess.Popen(words, stdin=pipe, stdout=log.fileno(), stderr=pipe, text=True)
    for _ in writer.stderr:
        log.bound()
        most = max(most, os.fstat(log.fileno()).st_blocks * 512)
        writer.stdin.write("on\\n")
        writer.stdin.flush()
    print(writer.wait(), most)
"""


def follow(path: Path, *before: str) -> tuple[int, int]:
    """Exit code of a process that prints 20 MB into a log there and aborts; most bytes its log took on the disk."""
    words = [*before, sys.executable, "-c", FOLLOWER, str(path), WRITER]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    code, most = ran.stdout.split()
    return int(code), int(most)


def check_whole(path: Path, *, first: str, last: str) -> None:
    text = path.read_bytes()
    assert TAIL_BYTES + HEAD_BYTES <= len(text) <= MOST
    head, gap, tail = text.partition(b" bytes were left out here ...]\n")
    assert gap
    assert head.startswith(first.encode())
    assert last in tail.decode().splitlines()
    assert b"\0" not in text


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_a_long_log_keeps_its_head_and_its_last_words(place: str, tmp_path: Path) -> None:
    if place == "memory" and not os.access("/dev/shm", os.W_OK):
        pytest.skip("not run: no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if place == "memory" else tmp_path) as folder:
        code, most = follow(Path(folder) / "log")
        assert code == -6
        assert most < 8 * HEAD_BYTES, "while it is written its middle is given back"
        check_whole(Path(folder) / "log", first="line 0 ", last="last words")
        lines = (Path(folder) / "log").read_text().splitlines()
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ") and line.endswith("." * 60)]
    assert numbers == sorted(set(numbers)), "in the order they were printed"


def test_a_file_system_without_holes_bounds_a_log_too(tmp_path: Path) -> None:
    """Memory without pages to give back (ramfs) has none."""
    if shutil.which("unshare") is None:
        pytest.skip("not run: no unshare to mount a file system with")
    keep = f'mount -t ramfs ramfs "$0" && "$@" && cp "$0/log" "{tmp_path}/kept"'
    mount = tmp_path / "mount"
    mount.mkdir()
    before = ["unshare", "-m", "sh", "-c", keep, str(mount)]
    if subprocess.run([*before[:4], 'mount -t ramfs ramfs "$0"', str(mount)], check=False).returncode:
        pytest.skip("not run: a file system cannot be mounted here")
    code, _ = follow(mount / "log", *before)
    assert code == -6
    check_whole(tmp_path / "kept", first="line 0 ", last="last words")


@pytest.mark.parametrize("size", [0, 1, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES])
def test_a_log_of_usual_length_is_left_as_it_is(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    with Log(tmp_path / "log") as log:
        (tmp_path / "log").write_bytes(data)
        log.bound()
    assert (tmp_path / "log").read_bytes() == data


def test_a_talkative_probe_leaves_a_short_log_and_its_last_words_in_the_reply(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    for isolation in ("forkserver", "fresh"):
        folder = tmp_path / isolation
        with SubprocessRunner(folder, isolation=isolation, log_dir=folder / "logs", trust=ANY_CODE) as runner:
            (point,) = runner.run(request("tests.faulty:TalksAndDies", ledger)).points
        assert point.outcome is Outcome.CRASHED
        assert "last words of a talkative process" in point.detail
        assert "in strike" in point.detail
        (kept,) = folder.glob("logs/TalksAndDies-*.log")
        check_whole(kept, first="line 0 ", last="last words of a talkative process")
    assert struck(ledger) == 2


def test_a_module_that_talks_while_it_is_imported_leaves_a_short_log(tmp_path: Path) -> None:
    with SubprocessRunner(tmp_path, log_dir=tmp_path / "logs", trust=ANY_CODE) as runner:
        assert runner.run(request("tests.faulty_talking:Talking")).points[0].outcome is Outcome.OK
    (kept,) = tmp_path.glob("logs/host-*.log")
    check_whole(kept, first="imported 0 ", last=f"imported 99999 {'.' * 60}")

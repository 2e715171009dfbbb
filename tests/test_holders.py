"""What one process may have at a time: given up with its holder's life, however that ends, and told of by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.holders import FilePlace, Holder, Taken

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys
from pathlib import Path
from tuner.holders import FilePlace, Holder
who = Holder.here("tuner optimize -w toy", study="s", alone=sys.argv[2] == "alone")
held = FilePlace(Path(sys.argv[1]), "cpu").take(who)
print("held", flush=True)
sys.stdin.readline()
held.release()
"""
TURNS = """
import sys, time
from pathlib import Path
from tuner.holders import FilePlace, Holder, Taken
folder, inside = Path(sys.argv[1]), Path(sys.argv[1]) / "inside"
sys.stdin.readline()
for _ in range(5):
    while True:
        try:
            held = FilePlace(folder, "cpu").take(Holder.here("toy"))
            break
        except Taken:
            time.sleep(0.001)
    inside.mkdir()  # fails where another one is inside
    inside.rmdir()
    held.release()
"""


def start(program: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *words]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def holding(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    process = start(HOLD, str(folder), how)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def me(*, alone: bool = True) -> Holder:
    return Holder.here("tuner probe -w toy", alone=alone)


def test_who_has_it_is_told_with_what_it_does(tmp_path: Path) -> None:
    place, other = FilePlace(tmp_path, "cpu"), holding(tmp_path)
    with pytest.raises(Taken) as caught:
        place.take(me())
    (holder,) = caught.value.holders
    assert (holder.pid, holder.command, holder.study) == (other.pid, "tuner optimize -w toy", "s")
    assert str(caught.value).startswith(f"process {other.pid} (tuner optimize -w toy, study s, since 20")
    other.communicate("end\n")
    held = place.take(me())
    assert not held.beside
    held.release()
    assert [path.name for path in tmp_path.iterdir()] == [".tuner-gate"], "nothing else is left behind"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_holder_however_that_ends(tmp_path: Path, number: signal.Signals) -> None:
    other = holding(tmp_path)
    other.send_signal(number)
    other.communicate()
    held = FilePlace(tmp_path, "cpu").take(me())
    assert len([*tmp_path.glob("*.held")]) == 1, "the dead one's file is gone"
    held.release()


def test_a_suspended_holder_still_has_it(tmp_path: Path) -> None:
    other = holding(tmp_path)
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(Taken):
        FilePlace(tmp_path, "cpu").take(me())
    other.kill()
    other.communicate()


def test_those_that_need_not_be_alone_share(tmp_path: Path) -> None:
    place, first, second = FilePlace(tmp_path, "cpu"), holding(tmp_path, "beside"), holding(tmp_path, "beside")
    third = place.take(me(alone=False))
    assert {holder.pid for holder in third.beside} == {first.pid, second.pid}
    with pytest.raises(Taken) as caught:
        place.take(me())
    assert {holder.pid for holder in caught.value.holders} == {first.pid, second.pid, os.getpid()}
    third.release()
    for process in (first, second):
        process.kill()
        process.communicate()
    alone = place.take(me())
    with pytest.raises(Taken):
        place.take(me(alone=False))
    alone.release()


def test_eight_that_come_at_once_go_in_one_by_one(tmp_path: Path) -> None:
    workers = [start(TURNS, str(tmp_path)) for _ in range(8)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate(timeout=120)
    assert [worker.returncode for worker in workers] == [0] * 8


def test_what_is_called_otherwise_is_another_thing(tmp_path: Path) -> None:
    names = ("a", "a.b", "a.b.c", "b")
    held = [FilePlace(tmp_path, name).take(me()) for name in names]
    for name in names:
        with pytest.raises(Taken):
            FilePlace(tmp_path, name).take(me())
    for one in held:
        one.release()


def test_files_that_say_nothing_are_no_holders_unless_somebody_locks_them(tmp_path: Path) -> None:
    (tmp_path / "cpu.1-0.held").write_bytes(b"")
    (tmp_path / "cpu.2-0.held").write_bytes(b"\xff{]")
    held = FilePlace(tmp_path, "cpu").take(me())
    (mine,) = tmp_path.glob("*.held")
    mine.write_bytes(b"\xff{]")
    with pytest.raises(Taken, match="another process"):
        FilePlace(tmp_path, "cpu").take(me())
    held.release()


def test_a_folder_of_somebody_else_s_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="no folder of this user's own"):
        FilePlace(tmp_path / "link", "cpu", private=True).take(me())
    held = FilePlace(tmp_path / "new", "cpu", private=True).take(me())
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    held.release()

"""Prepared data is complete or absent, whatever happens while it is made; and trouble is told in words."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tuner import prepared
from tuner.contract.errors import WorkloadError

ABOUT = {"data": "abc", "size": 64}
ROOT = Path(__file__).resolve().parent.parent
NEVER_DONE = """
import sys, time
from pathlib import Path
from tuner import prepared

def make(folder):
    (folder / "half.bin").write_bytes(b"x" * 1000)
    print("half", flush=True)
    time.sleep(600)

prepared.ensure(Path(sys.argv[1]), "job", "latents", {"data": "abc", "size": 64}, make)
"""


def writes(text: str = "whole", calls: list[Path] | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if calls is not None:
            calls.append(folder)
        (folder / "deep").mkdir()
        (folder / "data.txt").write_text(text)
        (folder / "deep" / "more.txt").write_text(text)

    return make


def test_made_once_then_found(tmp_path: Path) -> None:
    calls: list[Path] = []
    first = prepared.ensure(tmp_path, "job", "latents", ABOUT, writes(calls=calls))
    second = prepared.ensure(tmp_path, "job", "latents", dict(reversed(ABOUT.items())), writes(calls=calls))
    assert first == second
    assert len(calls) == 1
    assert (first / "deep" / "more.txt").read_text() == "whole"
    assert first.parent == tmp_path / "job"


def test_whatever_changes_the_content_changes_the_key(tmp_path: Path) -> None:
    folders = {
        prepared.ensure(tmp_path, "job", what, about, writes())
        for what, about in [("latents", ABOUT), ("latents", ABOUT | {"size": 65}), ("tokens", ABOUT)]
    }
    assert len(folders) == 3


def test_a_files_digest_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"a,b\n" * 400_000)
    before = prepared.file_digest(path)
    path.write_bytes(b"a,b\n" * 399_999 + b"a,c\n")
    assert prepared.file_digest(path) != before


def test_killed_in_the_middle_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NEVER_DONE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.rglob("half.bin")), "it was killed in the middle, so something must lie there"
    assert prepared.entries(tmp_path) == []
    folder = prepared.ensure(tmp_path, "job", "latents", ABOUT, writes())
    assert (folder / "data.txt").read_text() == "whole"
    assert not list(tmp_path.rglob("half.bin"))
    assert [path.name for path in (tmp_path / "job").iterdir()] == [folder.name]


def test_an_entry_about_to_be_moved_is_not_listed(tmp_path: Path) -> None:
    """As left by a process that was killed between its last file and the move."""
    folder = prepared.ensure(tmp_path, "job", "latents", ABOUT, writes())
    os.replace(folder, folder.with_name(f"{prepared.PARTIAL}{folder.name}"))
    assert prepared.entries(tmp_path) == []


@pytest.mark.parametrize("harm", ["shorter", "gone", "about"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, harm: str) -> None:
    folder = prepared.ensure(tmp_path, "job", "latents", ABOUT, writes())
    if harm == "shorter":
        os.truncate(folder / "data.txt", 2)
    elif harm == "gone":
        (folder / "deep" / "more.txt").unlink()
    else:
        (folder / prepared.ABOUT).write_text('{"files": 7}')
    calls: list[Path] = []
    assert prepared.ensure(tmp_path, "job", "latents", ABOUT, writes(calls=calls)) == folder
    assert len(calls) == 1
    assert (folder / "data.txt").read_text() == "whole"
    assert (folder / "deep" / "more.txt").read_text() == "whole"


def test_one_entry_may_be_made_from_another(tmp_path: Path) -> None:
    def outer(folder: Path) -> None:
        (folder / "first.txt").write_text("first")
        inner = prepared.ensure(tmp_path, "job", "codec", ABOUT, writes("codec"))
        (folder / "second.txt").write_text((inner / "data.txt").read_text())

    folder = prepared.ensure(tmp_path, "job", "latents", ABOUT, outer)
    assert (folder / "first.txt").read_text() == "first"
    assert (folder / "second.txt").read_text() == "codec"
    assert [entry.what for entry in prepared.entries(tmp_path)] == ["codec", "latents"]


def test_a_failed_preparation_leaves_nothing_and_keeps_its_own_words(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half.bin").write_bytes(b"x")
        raise WorkloadError("--data: rows.csv, row 7, column age: a number is expected (got 'old')")

    with pytest.raises(WorkloadError, match=r"rows\.csv, row 7, column age"):
        prepared.ensure(tmp_path, "job", "latents", ABOUT, fails)
    assert list((tmp_path / "job").iterdir()) == []


def test_a_users_file_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    missing = tmp_path / "pictures" / "cat.png"

    def reads(folder: Path) -> None:
        missing.read_bytes()

    with pytest.raises(FileNotFoundError, match=r"cat\.png"):
        prepared.ensure(tmp_path / "cache", "job", "latents", ABOUT, reads)


def test_a_disk_too_small_is_refused_before_the_work(tmp_path: Path) -> None:
    calls: list[Path] = []
    with pytest.raises(WorkloadError, match=r"needs 1099511627776 MiB, but \d+ MiB are free.*TUNER_CACHE"):
        prepared.ensure(tmp_path, "job", "latents", ABOUT, writes(calls=calls), need_bytes=1 << 60)
    assert not calls


def test_a_disk_that_fills_up_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    def fills(folder: Path) -> None:
        (folder / "some.bin").write_bytes(b"x" * 1000)
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(WorkloadError, match=r"the disk is full; free disk space \(`tuner cache`\)") as caught:
        prepared.ensure(tmp_path, "job", "latents", ABOUT, fills)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list((tmp_path / "job").iterdir()) == []


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder is wanted")
    with pytest.raises(WorkloadError, match=r"cache folder: .*cache.*: Not a directory; .*TUNER_CACHE"):
        prepared.ensure(tmp_path / "cache", "job", "latents", ABOUT, writes())


def test_entries_say_what_they_are_and_can_be_removed(tmp_path: Path) -> None:
    folder = prepared.ensure(tmp_path, "job", "latents", ABOUT, writes("12345678"))
    prepared.ensure(tmp_path, "other-job", "tokens", {"rows": 3}, writes())
    (tmp_path / "logs").mkdir()
    (tmp_path / "job" / "strange").mkdir()
    (tmp_path / "job" / "strange" / prepared.ABOUT).write_text("{}")
    first, second = prepared.entries(tmp_path)
    assert (first.workload, first.what, first.about) == ("job", "latents", ABOUT)
    assert (second.workload, second.what) == ("other-job", "tokens")
    assert first.folder == folder
    assert first.folder.name == f"latents-{first.key}"
    assert first.size_bytes == 16 + (folder / prepared.ABOUT).stat().st_size
    assert json.loads((folder / prepared.ABOUT).read_text())["made_at"] == first.made_at
    prepared.remove(first)
    assert not folder.exists()
    assert [entry.what for entry in prepared.entries(tmp_path)] == ["tokens"]


def test_a_removal_that_was_killed_does_not_stop_the_next_one(tmp_path: Path) -> None:
    folder = prepared.ensure(tmp_path, "job", "latents", ABOUT, writes())
    left = folder.with_name(f"{prepared.PARTIAL}removed-{folder.name}")
    left.mkdir()
    (left / "data.txt").write_text("old")
    prepared.remove(prepared.entries(tmp_path)[0])
    assert list((tmp_path / "job").iterdir()) == []


def test_the_lock_is_held_by_one_process_at_a_time_and_freed_by_its_death(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tuner import prepared\n"
        "with prepared.locked(Path(sys.argv[1]), lambda: None):\n    print('mine', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        waited = []

        def waiting() -> None:
            waited.append(1)
            process.kill()

        with prepared.locked(tmp_path, waiting):
            assert waited, "the lock was held by another process"

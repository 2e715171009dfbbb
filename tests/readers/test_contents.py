"""What files hold: seen whatever names, sizes and times say, and read only once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tuner.readers import contents as room
from tuner.readers.contents import below, contents, together
from tuner.readers.listing import content_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    (made / "sub").mkdir(parents=True)
    for name in ("a.csv", "b.bin", "sub/c.txt"):
        (made / name).write_bytes(b"x,y\n1,2\n3,4")
    return made


class Asked:
    """Reads, and says how many bytes that took."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache

    def __call__(self) -> tuple[str, int]:
        read: list[int] = []
        found = contents(self.folder, list(below(self.folder)), self.cache, read.append)
        return together(found), sum(read)


def test_what_has_not_changed_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "RECENT_NS", -(1 << 62))  # these files are older than a moment
    ask = Asked(folder, tmp_path / "cache")
    digest, read = ask()
    assert read == 33
    assert ask() == (digest, 0)
    os.utime(folder / "a.csv")
    assert ask() == (digest, 11), "touched: read again, and still the same"
    assert ask() == (digest, 0)
    about = (folder / "a.csv").stat()
    (folder / "a.csv").write_bytes(b"x,y\n1,2\n3,5")
    os.utime(folder / "a.csv", ns=(about.st_atime_ns, about.st_mtime_ns))
    changed, read = ask()
    assert changed != digest
    assert read == 11
    (folder / "b.bin").rename(folder / "z.bin")
    assert ask()[0] != changed


def test_a_file_that_was_just_written_is_read_again(folder: Path, tmp_path: Path) -> None:
    """Its times may not tell the next change from this one."""
    ask = Asked(folder, tmp_path / "cache")
    assert ask()[1] == ask()[1] == 33


@pytest.mark.parametrize("broken", ["nothing", "{", '{"files": {"a.csv": 3, "b.bin": [1, 2]}}', '{"files": []}'])
def test_a_damaged_memory_costs_reading_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(room, "RECENT_NS", -(1 << 62))
    ask = Asked(folder, tmp_path / "cache")
    expected = ask()
    (kept,) = (tmp_path / "cache" / room.FOLDER).iterdir()
    kept.write_text(broken)
    assert ask() == expected
    assert Asked(folder, Path(os.devnull))() == expected, "nor does it matter when there is no place for it"


def test_what_is_no_data_is_passed_over(folder: Path, tmp_path: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in below(folder)]
    (folder / ".hidden").write_text("1")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.csv").write_text("1")
    (folder / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "ours").mkdir()
    (folder / "ours" / "metrics.csv").write_text("1")
    found = below(folder, frozenset([(folder / "ours").resolve()]))
    assert [path.relative_to(folder).as_posix() for path in found] == names


def test_links_are_followed_and_lines_counted(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(b"{}\n{}\n")
    (folder / "linked").symlink_to(elsewhere)
    found = {item.name: item for item in contents(folder, list(below(folder)))}
    assert found[os.fsdecode(b"linked/caf\xe9.jsonl")].lines == 2
    assert (found["a.csv"].lines, found["sub/c.txt"].lines, found["b.bin"].lines) == (3, 3, None)
    assert found["a.csv"].head
    assert not found["sub/c.txt"].head


def prepared_key(folder: Path, files: Sequence[Path]) -> str:
    return content_digest(folder, files)


def test_prepared_data_are_keyed_by_content(folder: Path, tmp_path: Path) -> None:
    """A cache must not give the pictures of before for others of the same name, size and times; and not for a copy."""
    files = list(below(folder))
    key, about = prepared_key(folder, files), files[0].stat()
    os.utime(files[0], (5, 5))
    assert prepared_key(folder, files) == key
    moved = folder.rename(tmp_path / "moved")
    files = list(below(moved))
    assert prepared_key(moved, files) == key
    files[0].write_bytes(b"x,y\n1,2\n3,5")
    os.utime(files[0], ns=(about.st_atime_ns, about.st_mtime_ns))
    assert prepared_key(moved, files) != key

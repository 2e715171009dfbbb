"""Files of the tuner's own: replaced whole, swept where a killed writer left a part of one, and never reached through a
link that lies in a run's folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tuner.contract.errors import ConfigError

LOCK, CHECKPOINTS, SAMPLES, TENSORBOARD = ".lock", "checkpoints", "samples", "tensorboard"
PREFIX = "step-"
"""Begins the name of every checkpoint but the best one; the samples follow."""
TABLES = ("metrics.csv", "metrics.jsonl", "evaluations.csv", "assessments.csv", "quality.csv")
PAPERS = (
    "config.yaml",
    "data.json",
    "environment.json",
    "promise.json",
    "confirmed.json",
    "fallback.json",
    "status.json",
)
RUN_FILES = (*TABLES, *PAPERS, "curves.png", "quality.png")
"""What is written and replaced in a run's folder."""
_MARK = ".run-"
"""Begins the name of the file that says which process runs here."""
_PART = re.compile(r"\.?(?P<name>.+?)(?:\.(?P<pid>\d+))?\.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a place beside `path` to write to, moved over it at the end of the block, so that a reader never sees half
    a file; removed where the block raises."""
    aside = path.with_name(f".{path.name[:40]}.{os.getpid()}.part")  # a name may have 255 bytes
    try:
        aside.unlink(missing_ok=True)  # of a killed process of this number, or a link
        yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """`path` holds `text` afterwards, or what it held before; `durable`: after a power cut too. Raises OSError.

    What UTF-8 cannot hold is written as an escape: a result is worth more than a stray letter in it.
    """
    with replacing(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sweep_parts(folder: Path) -> None:
    """Remove parts of a run's files whose writer is gone; the folder's lock must be held."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            found = _PART.fullmatch(path.name)
            if found is None or _writes(found["pid"]):
                continue
            if found["name"] in RUN_FILES or found["name"].startswith(_MARK):
                path.unlink(missing_ok=True)


def _writes(pid: str | None) -> bool:
    """Does another process of this number live?"""
    if pid is None or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def newest_checkpoint(folder: Path) -> str:
    """`checkpoints/step-000000004096` of a run's folder; empty when there is none."""
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        names = [path.name for path in (folder / CHECKPOINTS).glob(f"{PREFIX}*")]
    newest = max((name for name in names if name.removeprefix(PREFIX).isdigit()), default="")
    return f"{CHECKPOINTS}/{newest}" if newest else ""


def refuse_links(folder: Path) -> None:
    """`folder` itself may be a link, what a run writes in it may not: somebody else's files would be overwritten, or
    removed as old checkpoints. Raises ConfigError."""
    samples = folder / SAMPLES
    inside = list(samples.iterdir()) if samples.is_dir() else []
    for path in (*(folder / name for name in (LOCK, CHECKPOINTS, SAMPLES, TENSORBOARD, *RUN_FILES)), *inside):
        if path.is_symlink():
            raise ConfigError(
                f"{path}: is a link to {os.readlink(path)}, and a run writes and removes nothing through links in its "
                "folder; remove it. To keep a run on another disk, name a folder there with --out, or make the whole "
                "folder a link"
            )

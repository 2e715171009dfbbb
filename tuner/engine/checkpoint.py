"""Checkpoints that survive a kill at any instant: written aside, flushed, moved into place; read only if intact.

    <directory>/step-000000004096/   tensors.safetensors  state.json  manifest.json (SHA-256 of the other two)
    <directory>/best/                the same, where a quality metric is named; its manifest says how good it is

The name counts samples. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuner.contract.errors import TunerError
from tuner.engine.tree import put_together, take_apart

FORMAT = 1
PREFIX = "step-"
BEST = "best"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class CheckpointError(TunerError):
    """A checkpoint could not be written or read; the message says which, why, and what still stands."""

    exit_code = 3


class Damaged(CheckpointError):
    """The files of a checkpoint are not what its manifest says."""


class Checkpointer:
    """Keeps the newest `keep` checkpoints of one run in `directory`."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, state: dict[str, Any]) -> Path:
        """Write `state` (it holds `samples`). Raises CheckpointError; earlier checkpoints then stand as they were."""
        final = self._save(f"{PREFIX}{int(state['samples']):012d}", state, {})
        for old in self.all()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def save_best(self, state: dict[str, Any], about: Mapping[str, Any]) -> Path:
        """Write `state` as the best one, in place of the last best one; `about` goes into its manifest."""
        return self._save(BEST, state, about)

    def best(self) -> dict[str, Any] | None:
        """What was said `about` the best checkpoint; None when there is none, or its files are damaged."""
        path = self.directory / BEST
        try:
            self._put_back()
            return dict(_intact(path)["about"]) if path.exists() else None
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            return None

    def _save(self, name: str, state: dict[str, Any], about: Mapping[str, Any]) -> Path:
        final = self.directory / name
        aside = self.directory / f".{PREFIX}{name}.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._put_back()
            self._sweep()
            aside.mkdir()
            _write(aside, state, about)
            _replace(aside, final)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self._explained(error) from error
        return final

    def all(self) -> list[Path]:
        """Newest first; not verified."""
        found = [path for path in self.directory.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def latest(self, notice: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """The newest state that is intact; `notice` is told of each damaged one passed over. None = no checkpoint.

        Raises CheckpointError when there are checkpoints but none is intact: starting over would hide the loss.
        """
        found = self.all()
        for path in found:
            try:
                return load(path)
            except CheckpointError as error:
                notice(str(error))
        if found:
            raise CheckpointError(
                f"{self.directory}: none of the {len(found)} checkpoints is intact; "
                "move them away to start over, or restore them from a copy"
            )
        return None

    def _put_back(self) -> None:
        """A kill between the two moves that replace the best checkpoint leaves it under its other name."""
        final = self.directory / BEST
        if (old := _moved_out(final)).exists() and not final.exists():
            os.replace(old, final)

    def _sweep(self) -> None:
        """Remove what a killed save left behind."""
        for left in self.directory.glob(f".{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    def _explained(self, error: Exception) -> CheckpointError:
        intact = self.all()
        rest = f"the previous one ({intact[0].name}) is intact" if intact else "there is no earlier one"
        if _is_disk_full(error):
            return CheckpointError(
                f"checkpoint: the disk under {self.directory} is full; {rest}. Free some space and run the same command"
            )
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"checkpoint: {self.directory} cannot be written ({first}); {rest}")


def load(path: Path) -> dict[str, Any]:
    """The state in one checkpoint folder, on the CPU. Raises Damaged when a digest or a file is not right."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        _intact(path)
        plain = json.loads((path / _STATE).read_text(encoding="utf-8"))
        state: dict[str, Any] = put_together(load_file(path / _TENSORS), plain)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(
            f"checkpoint {path.name}: cannot be read ({type(error).__name__}: {error}); passed over"
        ) from error
    return state


def _intact(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says. Raises CheckpointError, and what reading raises."""
    manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    for name in (_TENSORS, _STATE):
        if _digest(path / name) != manifest["files"][name]["sha256"]:
            raise Damaged(f"checkpoint {path.name}: {name} is damaged (its SHA-256 does not match); passed over")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path.name}: written in format {manifest['format']}, this reads {FORMAT}")
    return manifest


def _write(folder: Path, state: dict[str, Any], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors, plain = take_apart(state)
    save_file(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps(plain), encoding="utf-8")
    files = {
        name: {"sha256": _digest(folder / name), "bytes": (folder / name).stat().st_size} for name in (_TENSORS, _STATE)
    }
    manifest = {"format": FORMAT, "samples": int(state["samples"]), "files": files, "about": dict(about)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (_TENSORS, _STATE, _MANIFEST):
        _flush(folder / name)
    _flush(folder)


def _replace(aside: Path, final: Path) -> None:
    """Move `aside` into place. One of the same name is moved out first: it may be damaged."""
    if final.exists():
        old = _moved_out(final)
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(aside, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(aside, final)
    _flush(final.parent)


def _moved_out(final: Path) -> Path:
    return final.with_name(f".{PREFIX}{final.name}.old")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _is_disk_full(error: Exception) -> bool:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(mark in text for mark in ("no space left", "os error 28", "code: 28", "storagefull", "quota exceeded"))

"""Checkpoints that survive a kill at any instant: written aside, flushed, moved into place; read only if intact.

    <directory>/step-000000004096/   tensors.safetensors  state.json  manifest.json (SHA-256 of the other two)

The name counts samples. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuner.contract.errors import TunerError
from tuner.engine.tree import put_together, take_apart

FORMAT = 1
PREFIX = "step-"
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
        final = self.directory / f"{PREFIX}{int(state['samples']):012d}"
        aside = self.directory / f".{final.name}.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            aside.mkdir()
            _write(aside, state)
            _replace(aside, final)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self._explained(error) from error
        for old in self.all()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
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
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_TENSORS, _STATE):
            if _digest(path / name) != manifest["files"][name]["sha256"]:
                raise Damaged(f"checkpoint {path.name}: {name} is damaged (its SHA-256 does not match); passed over")
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path.name}: written in format {manifest['format']}, this reads {FORMAT}"
            )
        plain = json.loads((path / _STATE).read_text(encoding="utf-8"))
        state: dict[str, Any] = put_together(load_file(path / _TENSORS), plain)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(
            f"checkpoint {path.name}: cannot be read ({type(error).__name__}: {error}); passed over"
        ) from error
    return state


def _write(folder: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors, plain = take_apart(state)
    save_file(tensors, folder / _TENSORS)
    (folder / _STATE).write_text(json.dumps(plain), encoding="utf-8")
    files = {
        name: {"sha256": _digest(folder / name), "bytes": (folder / name).stat().st_size} for name in (_TENSORS, _STATE)
    }
    manifest = {"format": FORMAT, "samples": int(state["samples"]), "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (_TENSORS, _STATE, _MANIFEST):
        _flush(folder / name)
    _flush(folder)


def _replace(aside: Path, final: Path) -> None:
    """Move `aside` into place. One of the same name is moved out first: it may be damaged."""
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(aside, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(aside, final)
    _flush(final.parent)


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

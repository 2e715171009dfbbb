"""Checkpoints that survive a kill at any instant: written aside, flushed, moved into place; read only if intact.

    <directory>/step-000000004096/   tensors.safetensors  state.json  manifest.json (SHA-256 of the others and itself)
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tuner.contract.errors import TunerError
from tuner.contract.own_files import PREFIX
from tuner.engine.tensor_file import Written, read_tensors, write_bytes, write_tensors
from tuner.engine.tree import put_together, take_apart

FORMAT = 2
BEST = "best"
_ASIDE = "best-before-"
_HIDDEN = f".{PREFIX}"
_OLD, _GONE = ".old", ".gone"
"""Ends of hidden names: moved out to be replaced, and moved out to be removed."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_SEAL = "sha256"


class CheckpointError(TunerError):
    """A checkpoint could not be written or read; the message says which, why, and what still stands."""

    exit_code = 3


class Damaged(CheckpointError):
    """The files of a checkpoint are not what its manifest says."""


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run, taken apart: its tensors by name, and the JSON that names them."""

    samples: int
    tensors: dict[str, Tensor]
    text: bytes

    @classmethod
    def of(cls, state: dict[str, Any]) -> Snapshot:
        """The tensors are the state's own: write it before the state changes. Raises TypeError for other objects."""
        tensors, plain = take_apart(state)
        return cls(int(state["samples"]), tensors, json.dumps(plain).encode())

    @classmethod
    def copy_of(cls, state: dict[str, Any], buffers: Mapping[str, Tensor]) -> Snapshot:
        """Copies on the CPU, into `buffers` of an earlier one where they fit. Raises TypeError for other objects."""
        live = cls.of(state)
        return cls(live.samples, {name: _copied(t, buffers.get(name)) for name, t in live.tensors.items()}, live.text)


def _copied(value: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is not None and (buffer.shape, buffer.dtype) == (value.shape, value.dtype):
        return buffer.copy_(value)
    return value.to("cpu", copy=True)


class Checkpointer:
    """Keeps the newest `keep` checkpoints of one run in `directory`; fewer where the disk has no room for a new one."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self.keep = keep
        self.given_up: list[str] = []
        """Names of those removed for want of space since somebody last looked."""

    def save(self, state: dict[str, Any] | Snapshot) -> Path:
        """Write `state` (it holds `samples`). Raises CheckpointError; earlier checkpoints then stand as they were."""
        samples = state.samples if isinstance(state, Snapshot) else int(state["samples"])
        final = self._save(f"{PREFIX}{samples:012d}", state, {})
        self._trim(final)
        return final

    def save_best(self, state: dict[str, Any], about: Mapping[str, Any]) -> Path:
        """Write `state` as the best one, in place of the last best one; `about` goes into its manifest."""
        return self._save(BEST, state, about)

    def best(self, notice: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """What was said `about` the best checkpoint; None when there is none, or it is damaged: `notice` is told."""
        path = self.directory / BEST
        try:
            self._put_back()
            return dict(_intact(path)["about"]) if path.exists() else None
        except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
            known = isinstance(error, CheckpointError)
            notice(str(error) if known else f"checkpoint {BEST}: cannot be read ({error}); passed over")
            return None

    def put_best_aside(self, samples: int) -> str:
        """The best checkpoint under a name of its own, under which it stays; its new name."""
        name = f"{_ASIDE}{samples}"
        with contextlib.suppress(OSError):
            shutil.rmtree(self.directory / name, ignore_errors=True)
            os.replace(self.directory / BEST, self.directory / name)
        return name

    def all(self) -> list[Path]:
        """Newest first; not verified."""
        found = [path for path in self.directory.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdigit()]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def latest(self, notice: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """The newest state that is intact; `notice` is told of each damaged one passed over. None = no checkpoint.

        Raises CheckpointError when there are checkpoints but none is intact: starting over would hide the loss.
        """
        with contextlib.suppress(OSError):
            self._put_back()
        found = [*self.all(), *self._misnamed()]
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

    def _misnamed(self) -> list[Path]:
        """Folders that hold a checkpoint but are not called like one: what they are cannot be trusted."""
        known = {BEST, *(path.name for path in self.all())}
        return sorted(
            path.parent
            for path in self.directory.glob(f"*/{_MANIFEST}")
            if path.parent.name not in known and not path.parent.name.startswith((_HIDDEN, _ASIDE))
        )

    def _save(self, name: str, state: dict[str, Any] | Snapshot, about: Mapping[str, Any]) -> Path:
        final = self.directory / name
        try:
            snapshot = state if isinstance(state, Snapshot) else Snapshot.of(state)
            while not self._written(final, snapshot, about):
                pass
        except CheckpointError:
            raise
        except Exception as error:
            raise self._explained(error) from error
        return final

    def _written(self, final: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> bool:
        """False where the disk is full, and an older one was given up for another try."""
        aside = self.directory / f"{_HIDDEN}{final.name}.{os.getpid()}"
        try:
            self._make_directory()
            self._put_back()
            self._sweep()
            aside.mkdir()
            _write(aside, snapshot, about)
            _replace(aside, final)
        except Exception as error:
            _erase(aside)
            with contextlib.suppress(OSError):
                self._put_back()
            if getattr(error, "errno", None) in _FULL and self._give_up_oldest(final):
                return False
            raise
        return True

    def _give_up_oldest(self, final: Path) -> bool:
        """Remove the oldest one that a newer intact one stands for; False when there is none. Never the best one."""
        newest_first = [path for path in self.all() if path != final]
        intact = next((place for place, path in enumerate(newest_first) if _is_intact(path)), len(newest_first))
        if not newest_first[intact + 1 :]:
            return False
        oldest = newest_first[-1]
        _remove(oldest)
        if os.path.lexists(oldest):
            return False
        self.given_up.append(oldest.name)
        return True

    def sweep(self) -> None:
        """At the start of a run that has the folder to itself: nothing is left of a save that was killed."""
        with contextlib.suppress(OSError):
            self._put_back()
            self._sweep()

    def _make_directory(self) -> None:
        if self.directory.is_symlink():
            raise CheckpointError(f"checkpoint: {self.directory} is a link, and nothing is written through one")
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            _flush_folder(self.directory.parent)

    def _trim(self, saved: Path) -> None:
        """Keep `saved` and those before it, `keep` in all. What is newer was passed over as damaged."""
        older = [path for path in self.all() if path.name < saved.name]
        newer = [path for path in self.all() if path.name > saved.name]
        for path in (*newer, *older[self.keep - 1 :]):
            _remove(path)

    def _put_back(self) -> None:
        """A kill between the two moves that replace a checkpoint leaves the old one under its other name."""
        for old in self.directory.glob(f"{_HIDDEN}*{_OLD}"):
            final = self.directory / old.name.removeprefix(_HIDDEN).removesuffix(_OLD)
            if not os.path.lexists(final):
                os.replace(old, final)

    def _sweep(self) -> None:
        """Remove what a killed save left behind."""
        if not self.directory.is_symlink():
            for left in self.directory.glob(f"{_HIDDEN}*"):
                _erase(left)

    def _explained(self, error: Exception) -> CheckpointError:
        intact = self.all()
        rest = f"the previous one ({intact[0].name}) is intact" if intact else "there is no earlier one"
        number = getattr(error, "errno", None)
        if number in _FULL:
            return CheckpointError(
                f"checkpoint: the disk under {self.directory} is full; {rest}. Free some space and run the same command"
            )
        if number == errno.EIO:
            return CheckpointError(
                f"checkpoint: the disk under {self.directory} cannot be written (input/output error); {rest}. "
                "Look at the disk, or go on with a copy of the folder on another one (--out)"
            )
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return CheckpointError(f"checkpoint: {self.directory} cannot be written ({first}); {rest}")


def load(path: Path) -> dict[str, Any]:
    """The state in one checkpoint folder, on the CPU. Raises Damaged when a digest, a file or its name is not right."""
    from safetensors import SafetensorError

    try:
        samples = _intact(path)["samples"]
        if path.name not in (BEST, f"{PREFIX}{samples:012d}"):
            raise Damaged(
                f"checkpoint {path.name}: its name is wrong, rename it to {PREFIX}{samples:012d}; passed over"
            )
        plain = json.loads((path / _STATE).read_bytes())
        state: dict[str, Any] = put_together(read_tensors(path / _TENSORS), plain)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(
            f"checkpoint {path.name}: cannot be read ({type(error).__name__}: {error}); passed over"
        ) from error
    return state


def _intact(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what it says. Raises CheckpointError, and what reading raises."""
    data = (path / _MANIFEST).read_bytes()
    manifest: dict[str, Any] = json.loads(data)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path.name}: written in format {manifest['format']}, this reads {FORMAT}")
    if _sealed({key: value for key, value in manifest.items() if key != _SEAL}) != data:
        raise Damaged(f"checkpoint {path.name}: {_MANIFEST} is damaged (its SHA-256 does not match); passed over")
    for name in (_TENSORS, _STATE):
        if _digest(path / name) != manifest["files"][name]["sha256"]:
            raise Damaged(f"checkpoint {path.name}: {name} is damaged (its SHA-256 does not match); passed over")
    return manifest


def _is_intact(path: Path) -> bool:
    try:
        _intact(path)
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _remove(path: Path) -> None:
    """A kill meanwhile must not leave half a checkpoint under its name. What cannot be removed stays."""
    gone = path.with_name(f"{_HIDDEN}{path.name}{_GONE}")
    with contextlib.suppress(OSError):
        os.replace(path, gone)
    _erase(gone)


def _erase(path: Path) -> None:
    """A folder with all that is in it, but of a link the link alone. What cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as its file holds it, byte for byte, with the digest of everything else in it."""
    plain = json.dumps(manifest, sort_keys=True)
    seal = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps({**manifest, _SEAL: seal}, indent=1, sort_keys=True).encode()


def _write(folder: Path, snapshot: Snapshot, about: Mapping[str, Any]) -> None:
    written = {
        _TENSORS: write_tensors(folder / _TENSORS, snapshot.tensors),
        _STATE: write_bytes(folder / _STATE, iter([snapshot.text])),
    }
    manifest = {"format": FORMAT, "samples": snapshot.samples, "files": _as_plain(written), "about": dict(about)}
    write_bytes(folder / _MANIFEST, iter([_sealed(manifest)]))
    _flush_folder(folder)


def _as_plain(written: Mapping[str, Written]) -> dict[str, dict[str, str | int]]:
    return {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in written.items()}


def _replace(aside: Path, final: Path) -> None:
    """Move `aside` into place. One of the same name is moved out first: it may be damaged."""
    old = final.with_name(f"{_HIDDEN}{final.name}{_OLD}")
    _erase(old)
    if os.path.lexists(final):
        os.replace(final, old)
    os.replace(aside, final)
    _flush_folder(final.parent)
    _erase(old)


def _flush_folder(path: Path) -> None:
    """So that names survive a power cut, on file systems that can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()

"""Who holds what must be used by one process at a time: a device, a study. It ends with its holder, however that ends.

Every holder keeps a small file under the operating system's lock, which says who it is. A file that nobody locks any
more is a dead process's: whoever looks next removes it. Nothing here waits for a holder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tuner.contract.base import Frozen, Words, parse_json
from tuner.contract.errors import ConfigError

GATE = ".tuner-gate"
"""Locked for the moment in which a folder's holders are looked at or become more."""
_ENDING = ".held"
_GATE_S, _LOOK_S = 5.0, 0.01
_MOST_BYTES = 1 << 14


class Holder(Frozen):
    """One process, and what it does with what it holds."""

    pid: int
    host: str
    command: Words
    """Without what may be secret: never the whole command line."""
    study: str = ""
    since: str
    """Local time, ISO 8601."""
    alone: bool = True
    """False = beside others that need not be alone either."""

    @classmethod
    def here(cls, command: str, *, study: str = "", alone: bool = True) -> Holder:
        """This process, from now on."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(pid=os.getpid(), host=socket.gethostname(), command=command, study=study, since=since, alone=alone)

    def __str__(self) -> str:
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        study = f", study {self.study}" if self.study else ""
        since = f", since {self.since[:19].replace('T', ' ')}" if self.since else ""
        return f"process {self.pid}{where} ({self.command}{study}{since})" if self.pid else self.command


UNKNOWN = Holder(pid=0, host="", command="another process", since="")


class Taken(Exception):
    """Somebody else has it."""

    def __init__(self, holders: Sequence[Holder]) -> None:
        super().__init__(", ".join(map(str, holders)))
        self.holders = tuple(holders) or (UNKNOWN,)


class Hold(Protocol):
    """What was taken."""

    @property
    def beside(self) -> Sequence[Holder]:
        """Who has it too; empty for one who is alone."""
        ...

    def release(self) -> None: ...


class Place(Protocol):
    """Where one thing is held."""

    def take(self, who: Holder) -> Hold:
        """Raises Taken, and OSError where nothing can be locked there."""
        ...


@dataclass(frozen=True)
class FilePlace:
    """One thing, called `key`, whose holders keep their files in `folder`."""

    folder: Path
    key: str
    private: bool = False
    """The folder must be this user's own, and is made where it is not there."""

    def take(self, who: Holder) -> FileHold:
        if self.private:
            _make_own(self.folder)
        with _gate(self.folder):
            others = [*self._living()]
            if in_the_way := [other for other in others if other.alone or who.alone]:
                raise Taken(in_the_way)
            return self._sign(who, others)

    def _living(self) -> Iterator[Holder]:
        """The files of the dead are removed."""
        for path in sorted(self.folder.iterdir()):
            middle = path.name.removeprefix(f"{self.key}.").removesuffix(_ENDING)
            if path.name == f"{self.key}.{middle}{_ENDING}" and "." not in middle:
                with contextlib.suppress(FileNotFoundError):
                    yield from _living_in(path)

    def _sign(self, who: Holder, others: Sequence[Holder]) -> FileHold:
        path = self.folder / f"{self.key}.{who.pid}-{secrets.token_hex(4)}{_ENDING}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, who.to_json().encode())
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return FileHold(path, descriptor, tuple(others))


class FileHold:
    def __init__(self, path: Path, descriptor: int, beside: Sequence[Holder]) -> None:
        self.beside = beside
        self._path = path
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def _living_in(path: Path) -> Iterator[Holder]:
    descriptor = _opened(path)
    try:
        if _locked(descriptor):
            with contextlib.suppress(PermissionError):
                path.unlink(missing_ok=True)
            return
        text = os.pread(descriptor, _MOST_BYTES, 0).decode("utf-8", "replace")
        try:
            yield parse_json(Holder, text, str(path))
        except ConfigError:
            yield UNKNOWN
    finally:
        os.close(descriptor)


def _make_own(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is no folder of this user's own")


@contextlib.contextmanager
def _gate(folder: Path) -> Iterator[None]:
    descriptor = _opened(folder / GATE, os.O_CREAT)
    try:
        deadline = time.monotonic() + _GATE_S
        while not _locked(descriptor):
            if time.monotonic() > deadline:
                raise Taken(())
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path, flags: int = 0) -> int:
    """For locking; a file of another user's is only read, which some file systems do not let be locked."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _locked(descriptor: int) -> bool:
    """False when another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True

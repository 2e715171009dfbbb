"""Where a command will write: tried before anything is measured, so that no work ends at a place that cannot take it.
And where a result goes that its place did not take after all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tuner.commands.setup import cache_dir
from tuner.contract.errors import ConfigError
from tuner.contract.own_files import replace_text

TRIED_BYTES = 64 << 10
"""A document of ours fits into this."""
OPTION = "--out"
OF_A_RUN = (".lock", "checkpoints", "environment.json", "confirmed.json")
"""A folder in which one of these lies is a run's."""
WRITTEN_BY_A_RUN = (
    "config.yaml", "promise.json", "status.json", "data.json", "metrics.csv", "metrics.jsonl", "evaluations.csv",
    "assessments.csv", "quality.csv", "quality.png", "curves.png", "samples", "tensorboard",
)  # fmt: skip


def check_file(path: Path, ours: tuple[str, ...] = (), option: str = OPTION) -> None:
    """Raises ConfigError unless a file can be written at `path`, in place of one that is there.

    `ours`: how a file of this kind begins; another one that is not empty is somebody else's, and stays.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{option}: the path of a file is expected, and {path} is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ConfigError(f"{option}: the path of a file is expected, and {path} is a device or a pipe")
    _try_folder(path.parent, path, option)
    if not os.path.lexists(path):
        return
    try:
        begins = _beginning(path)
        _refuse_fixed(path)
    except OSError as error:
        raise _refusal(path, option, error) from None
    if ours and begins.strip() and not begins.startswith(ours):
        raise ConfigError(
            f"{option}: {path} is there already and was not written by the tuner; name another file, or remove it first"
        )


def check_folder(path: Path, option: str = OPTION) -> None:
    """Raises ConfigError unless files can be written in the folder, or it can be made."""
    _try_folder(path, path, option)


def make_folder(path: Path, option: str = OPTION) -> None:
    """The folder is there, and can be written. Raises ConfigError."""
    check_folder(path, option)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(path, option, error) from None


def refuse_foreign(out: Path, option: str = OPTION) -> None:
    """Raises ConfigError where a run would replace files that no run has written."""
    if any(os.path.lexists(out / name) for name in OF_A_RUN):
        return
    for name in WRITTEN_BY_A_RUN:
        if os.path.lexists(out / name):
            raise ConfigError(
                f"{option}: {out} is no run's folder, and its {name} would be replaced; name a folder of its own"
            )


def _try_folder(folder: Path, target: Path, option: str) -> None:
    """Write into `folder`, or the nearest one above it that is there, and take it away again. Raises ConfigError."""
    whole = Path(os.path.abspath(folder))
    try:
        place = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
        if not place.is_dir():
            raise ConfigError(
                f"{option}: {target} cannot be written: {place} is no folder; name another place with {option}"
            )
        _write_and_remove(place)
    except OSError as error:
        raise _refusal(target, option, error) from None


def _write_and_remove(folder: Path) -> None:
    handle, name = tempfile.mkstemp(dir=folder, prefix=".tuner-")
    try:
        left = os.urandom(TRIED_BYTES)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)
        os.unlink(name)


def _beginning(path: Path) -> str:
    """What stands at the top of the file; empty for a link that leads nowhere, which is replaced."""
    if not os.path.isfile(path):
        return ""
    with path.open("rb") as file:
        return file.read(256).decode("utf-8", "replace")


def _refuse_fixed(path: Path) -> None:
    """Raises OSError for a file that may not be replaced, though its folder can be written: an immutable or mounted
    one, or somebody else's in a folder like /tmp."""
    about, folder = path.lstat(), path.parent.stat()
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, about.st_uid, folder.st_uid):
        raise PermissionError(errno.EPERM, "it belongs to somebody else")
    if not stat.S_ISREG(about.st_mode):
        return
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EROFS):
            raise


def _refusal(path: Path, option: str, error: OSError) -> ConfigError:
    why = error.strerror or type(error).__name__
    what = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    return ConfigError(f"{option}: {path} cannot be written: {why}; {what}, or name another place with {option}")


def write_beside(name: str, text: str) -> Path | None:
    """Keep a finished result that could not be written where it belongs: the first place that takes it, or None."""
    for folder in _other_places():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle, made = tempfile.mkstemp(dir=folder, prefix="", suffix=f".{name[-100:]}")
            os.close(handle)
            try:
                replace_text(Path(made), text)
            except OSError:
                os.unlink(made)
                raise
            return Path(made)
    return None


def _other_places() -> Iterator[Path]:
    yield cache_dir() / "results"
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())
    yield Path.cwd()
    with contextlib.suppress(RuntimeError):
        yield Path.home()

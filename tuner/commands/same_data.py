"""Is the data what it was when a study or a run was begun? Known by content, wherever it lies; what has changed is
refused unless the user says how to go on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands.setup import cache_dir
from tuner.contract.base import Scalar, printable
from tuner.contract.documents import load_json
from tuner.contract.errors import ConfigError, WorkloadError
from tuner.contract.fingerprint import (
    DATA_FILE,
    MOST_KEPT,
    MOST_PARTS,
    Compared,
    Fingerprint,
    Part,
    RunData,
    compare,
    placed,
)
from tuner.contract.probe import Listener, ProbeReply, ProbeRequest, ProbeRunner
from tuner.contract.study import StudySpec
from tuner.contract.tuned import TunedConfig
from tuner.readers.contents import Content, below, contents, together

if TYPE_CHECKING:
    from rich.console import Console

DATA = "data"
"""The option behind --data."""
DERIVED = ("horizon_samples", "cadence", "schedule", "ema")
"""Parts of a baseline that may follow from the number of samples."""
TOLD_BYTES = 1 << 30
"""Reading more than this is announced."""
MOST_FILES, MOST_BYTES = 2000, 16 << 30
"""Of a folder that an option besides --data names; a larger one is not looked into."""
_WRITTEN = ("out", "log", "cache", "tmp", "temp", "save", "work")
"""Parts of the names of options that say where something goes, and not what is learned from."""
_WAYS = (
    "start {what} anew beside the old one with --fresh, or go on knowingly with --accept-new-data; "
    "with the old data in place again it goes on as before"
)


def fingerprints(options: Mapping[str, Scalar], console: Console, ours: Sequence[Path] = ()) -> tuple[Fingerprint, ...]:
    """Of every file and folder that the workload's options name. `ours`: places we write to, which are no data though
    they may lie among it. Raises WorkloadError for data that cannot be read."""
    aside = frozenset(place.resolve() for place in (cache_dir(), Path("runs"), Path("studies"), *ours))
    named = {name: str(value) for name, value in options.items() if _is_path(name, value)}
    read = {name: path for name, path in named.items() if Path(path).resolve() not in aside}
    found = (_fingerprint(name, path, console, aside) for name, path in read.items())
    return tuple(item for item in found if item is not None)


def _is_path(option: str, value: Scalar) -> bool:
    """A word such as `/` or `.` may mean a sign, a preset is a word, and some places are written to."""
    if not isinstance(value, str) or "\0" in value or not os.path.exists(value):
        return False
    told = option == "preset" or any(part in option.lower() for part in _WRITTEN)
    return option == DATA or (not told and any(letter.isalnum() for letter in value))


def _fingerprint(option: str, path: str, console: Console, aside: frozenset[Path]) -> Fingerprint | None:
    root = Path(path)
    bounded = None if option == DATA else MOST_FILES

    def reading(count: int) -> None:
        if count > TOLD_BYTES:
            console.print(f"reading {printable(root)} once ({speak.size(count)}), to know it again", style="dim")

    try:
        whole = root.is_dir()
        files = list(itertools.islice(below(root, aside), bounded + 1 if bounded else None)) if whole else [root]
        if bounded and (len(files) > bounded or sum(file.stat().st_size for file in files) > MOST_BYTES):
            return None
        found = contents(root if whole else root.parent, files, cache_dir(), reading)
    except OSError as error:
        raise WorkloadError(f"{option}: {printable(root)} cannot be read: {error.strerror or error}") from None
    return _of_folder(option, path, found) if whole else _of_file(option, path, found[0])


def _of_file(option: str, path: str, found: Content) -> Fingerprint | None:
    """None for what is no regular file, or cannot be read: the workload will say so."""
    if not found.digest:
        return None
    return Fingerprint(
        option=option, path=path, sha256=found.digest, bytes=found.bytes, lines=found.lines, head=found.head
    )


def _of_folder(option: str, path: str, found: Sequence[Content]) -> Fingerprint:
    parts = [Part(name=item.name, bytes=item.bytes, sha256=item.digest[:16]) for item in found]
    counted = [item.lines for item in found if item.lines is not None]
    return Fingerprint(
        option=option,
        path=path,
        sha256=together(found),
        bytes=sum(item.bytes for item in found),
        files=len(found),
        lines=sum(counted) if counted else None,
        parts=tuple(parts) if len(parts) <= MOST_PARTS else (),
    )


# -- a production run


def check_run(out: Path, options: Mapping[str, Scalar], data: Sequence[Fingerprint], *, accept: bool) -> None:
    """Raises ConfigError where the run in `out` has learned from other data, unless it is to go on knowingly."""
    kept = load_json(RunData, out / DATA_FILE, MOST_KEPT) if holds_checkpoints(out) else None
    changes = compare(kept.data if kept else (), data, options).changes
    if changes and not accept:
        ways = _WAYS.format(what="the run")
        raise ConfigError(f"{out}: its checkpoints were trained on other data. {'; '.join(changes)}. Either {ways}")


def holds_checkpoints(out: Path) -> bool:
    return any(not name.startswith(".") for name in _inside(out / "checkpoints"))


def fresh_folder(out: Path) -> Path:
    """`out` where no run is in it, or else the first of OUT-2, OUT-3 ... that is free."""
    beside = (out.with_name(f"{out.name}-{number}") for number in itertools.count(2))
    free = (place for place in itertools.chain([out], beside) if not os.path.lexists(place) or _inside(place) == [])
    return next(free)


def _inside(folder: Path) -> list[str]:
    """Empty for an empty folder, and for what cannot be read too: whoever writes there will say so."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def tell_of_tuning(tuned: TunedConfig, data: Sequence[Fingerprint], console: Console) -> None:
    """A configuration may be used with other data than it was tuned on; its promise is another matter."""
    if tuned.provenance is not None:
        for change in compare(tuned.provenance.data, data).changes:
            console.print(f"tuned on other data, so its promise may not hold: {change}", style="yellow")


# -- a study


def check_study(stored: StudySpec, asked: StudySpec, *, accept: bool) -> Compared:
    """Raises ConfigError where the study's figures are of other data than those asked for, unless accepted."""
    found = compare(stored.data, asked.data, asked.options)
    if found.changes and not accept:
        changes, ways = "; ".join(found.changes), _WAYS.format(what="the study")
        raise ConfigError(f"--study {stored.name}: it was measured on other data. {changes}. Either {ways}")
    return found


def check_unchanged(spec: StudySpec, options: Mapping[str, Scalar], console: Console, ours: Sequence[Path]) -> None:
    """Raises ConfigError when the data were changed while the study measured: nobody could say of which its figures
    are."""
    data = {DATA: options[DATA]} if DATA in options else {}  # what other options name a workload may write to
    found = compare(spec.data, fingerprints(data, console, ours), data)
    if found.changes:
        raise ConfigError(
            f"the data were changed while study {spec.name} was measured, so nothing is shipped. "
            f"{'; '.join(found.changes)}. Either {_WAYS.format(what='the study')}"
        )


def as_asked_before(asked: StudySpec, stored: StudySpec, compared: Compared) -> StudySpec:
    """`asked` with the paths under which `stored` knows its data; where other data were accepted, with what a workload
    derives from them too (how long an epoch is): the study goes on from where it began."""
    known = {name: stored.options[name] for name in compared.same if name in stored.options}
    changed = compared.changes or stored.data_changes
    derived = {name: getattr(stored.baseline, name) for name in DERIVED} if changed else {}
    baseline = asked.baseline.model_copy(update={**derived, "options": {**asked.baseline.options, **known}})
    return asked.model_copy(update={"options": {**asked.options, **known}, "baseline": baseline})


class MovedData:
    """A ProbeRunner in front of another: probes find the data where they lie now. The rows go on naming them as they
    did when the study began, so that the study knows its own configurations."""

    def __init__(self, runner: ProbeRunner, spec: StudySpec) -> None:
        self._runner = runner
        self._spec = spec

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        points = tuple(self._spec.in_place(point) for point in request.points)
        options = placed(request.options, self._spec.options, self._spec.data)
        return self._runner.run(request.model_copy(update={"points": points, "options": options}), listener)

    def close(self) -> None:
        self._runner.close()

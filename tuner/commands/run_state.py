"""What a run's folder tells of its state: is it still going on, who wrote its status, can it be resumed.

While `tuner train` runs, its folder holds `.run-ID.json`, the name of its process; left behind, it tells of a death.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tuner.contract.base import Frozen
from tuner.contract.documents import load_json
from tuner.contract.errors import ConfigError
from tuner.contract.liveness import Writer
from tuner.contract.measurement import Outcome
from tuner.contract.own_files import newest_checkpoint, replace_text
from tuner.contract.probe import STOPPED_EARLY, ProbeReply
from tuner.contract.production import STATUS_FILE, LiveStatus, ProductionRun, RunStatus
from tuner.contract.result import plain_json

_Model = TypeVar("_Model", bound=Frozen)


@contextlib.contextmanager
def marked(out: Path, run_id: str) -> Iterator[None]:
    """Within: the folder says that this process runs `run_id` in it. What cannot be written does no harm."""
    path = _mark(out, run_id)
    _sweep(out)
    with contextlib.suppress(OSError):
        replace_text(path, plain_json(Writer.here()) + "\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def close_status(out: Path, run_id: str, reply: ProbeReply) -> None:
    """A worker that was killed could not say so in status.json: say it in its place."""
    status = read_status(out)
    if status is None or status.run != run_id or status.status is not RunStatus.RUNNING:
        return
    point = reply.points[0] if reply.points else None
    reason = f"{point.outcome.value}: {point.message}" if point else "no answer"
    update = {"status": RunStatus.FAILED, "reason": reason, "eta_s": None, "updated_at": _now().isoformat()}
    with contextlib.suppress(OSError):
        replace_text(out / STATUS_FILE, plain_json(status.model_copy(update=update)) + "\n")


def with_kept(reply: ProbeReply, out: Path) -> ProbeReply:
    """What ended a run without a word of its own, with the checkpoint that is left of it."""
    point = reply.points[0]
    silent = reply.train_result is None and point.environment is None and not point.message.startswith(STOPPED_EARLY)
    if not silent or point.outcome is Outcome.BAD_INPUT:
        return reply
    told = point.model_copy(update={"message": f"{point.message.rstrip('.')}. {_kept(out)}."})
    return reply.model_copy(update={"points": (told, *reply.points[1:])})


def read_status(out: Path) -> LiveStatus | None:
    """The folder's status.json; None when there is none that can be read."""
    return _read(LiveStatus, out / STATUS_FILE)


def state_of(run: ProductionRun) -> RunStatus:
    """The stored state, but `died` where that says `running` and the process is gone.

    A folder that is not on this machine, or a process of another host, is believed until its status is silent for
    longer than a worker may be.
    """
    out = Path(run.out_dir)
    if run.status is not RunStatus.RUNNING or not os.path.isdir(out):  # unlike Path.is_dir it raises for nothing
        return run.status
    writer = _read(Writer, _mark(out, run.id))
    if writer is None or writer.alive() is False:
        return RunStatus.DIED
    status = read_status(out)
    if writer.alive() is None and status is not None and status.run == run.id and _silent(status):
        return RunStatus.DIED
    return RunStatus.RUNNING


def kept_words(out: Path, again: str) -> str:
    """What a run that was ended has left, and the command that goes on from there."""
    return f"{_kept(out)}; go on with: {again}"


def _kept(out: Path) -> str:
    newest = newest_checkpoint(out)
    return f"The checkpoint {Path(newest).name} is kept" if newest else "There is no checkpoint yet"


def _silent(status: LiveStatus) -> bool:
    try:
        since = _now() - datetime.fromisoformat(status.updated_at)
    except (ValueError, TypeError):  # no time, or one of no zone
        return False
    return since.total_seconds() > status.silent_s


def _sweep(out: Path) -> None:
    """Forget processes that are gone."""
    for path in out.glob(".run-*.json"):
        writer = _read(Writer, path)
        if writer is None or writer.alive() is False:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _mark(out: Path, run_id: str) -> Path:
    return out / f".run-{run_id}.json"


def _read(cls: type[_Model], path: Path) -> _Model | None:
    with contextlib.suppress(ConfigError):
        return load_json(cls, path)
    return None


def _now() -> datetime:
    return datetime.now(UTC)

"""The probes' door: the process that runs torch and the workload's code. It knows neither Optuna nor any store.

    python -m tuner.worker --serve --control-fd N [--preload WORKLOAD]   fork a child per request (see tuner.zygote)
    python -m tuner.worker --request FILE|- [--reply-fd N]               answer one request in this very process

Events leave as JSON lines on the reply descriptor (by default 1); whatever the workload prints goes to the log.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tuner import importing, ranks, registry, stopping, zygote
from tuner.contract.allowance import usable_cores
from tuner.contract.base import parse_json
from tuner.contract.errors import ConfigError, TunerError, WorkloadError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, Finished, PhaseEvent, PointReply, ProbeRequest

COMMON = ("torch", "torch._dynamo", "torch.utils.data", "tuner.engine.tasks")
"""Imported once for all probes; any optimizer imports torch._dynamo at its first step, which costs more than torch."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Emitter:
    """Writes events to the reply descriptor, a whole line at a time, and notes which points are answered."""

    def __init__(self, reply: int) -> None:
        self._reply = reply
        self._lock = threading.Lock()
        self.answered: set[int] = set()
        self.finished = False
        self._phase = ("start", time.monotonic())
        self._phases_s: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        line = event.model_dump_json().encode() + b"\n"
        with self._lock:
            if isinstance(event, PointReply):
                self.answered.add(event.index)
            if isinstance(event, PhaseEvent):
                self._enter(event.phase)
            self.finished |= isinstance(event, Finished)
            while line:
                line = line[os.write(self._reply, line) :]

    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        name, since = self._phase
        self._phases_s[name] = self._phases_s.get(name, 0.0) + now - since
        self._phase = (phase, now)

    def finish(self) -> None:
        if not self.finished:
            self._enter("end")
            self(Finished(phases_s=self._phases_s))


def answer(request_fd: int, reply_fd: int) -> int:
    """Run the request read from `request_fd`; whatever goes wrong in Python is a reply. Returns the exit code."""
    emit = Emitter(reply_fd)
    request: ProbeRequest | None = None
    try:
        with os.fdopen(request_fd, "rb") as source:
            request = parse_json(ProbeRequest, source.read(), "request")
        if ranks.wanted(request) > 1 and request.kind in ranks.TOGETHER:
            ranks.lead(request, emit, run_rank, reply_fd)
        else:
            _work(ranks.alone(request), emit)
    except BrokenPipeError:
        return 1
    except (Exception, SystemExit) as error:
        emit(_failure(error, first_unanswered(request, emit.answered)))
    emit.finish()
    return 0


def _work(request: ProbeRequest, emit: Emitter) -> None:
    emit(PhaseEvent(phase="import"))
    workload_class = registry.load(request.workload) if request.workload else None
    *_, tasks = [importlib.import_module(name) for name in COMMON]
    set_up(request)
    tasks.run(request, workload_class, emit)


class RankEmitter(Emitter):
    """Rank 0 tells everything to its leader, the others only why they failed. Raises RankFailed after a failure."""

    def __init__(self, index: int, folder: Path) -> None:
        super().__init__(os.open(os.devnull if index else folder / "events", os.O_WRONLY))
        self._note = folder / f"rank-{index}.json" if index else None

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, PointReply) and event.outcome is not Outcome.OK:
            if self._note is not None:
                aside = self._note.with_suffix(".part")
                aside.write_text(event.to_json(), encoding="utf-8")
                aside.replace(self._note)
            raise ranks.RankFailed


def run_rank(request: ProbeRequest, index: int, folder: Path) -> int:
    """This process's part of a request that several ranks answer together. Returns the exit code."""
    zygote.dump_stacks()
    if index:
        stopping.pass_on(int(os.environ[ranks.LEADER]))  # but not torchrun's, when another rank is gone
    else:
        stopping.by_default()
    (folder / f"rank-{index}.pid").write_text(str(os.getpid()), encoding="utf-8")
    emit = RankEmitter(index, folder)
    try:
        try:
            _work(request, emit)
        except (Exception, SystemExit) as error:
            emit(_failure(error, first_unanswered(request, emit.answered)))
        emit.finish()
    except (ranks.RankFailed, BrokenPipeError):
        return ranks.FAILED
    (folder / f"rank-{index}.done").touch()
    return 0


def set_up(request: ProbeRequest) -> None:
    """Threads and seeds. A forked child has its siblings' random state, so every seed is set anew."""
    import torch

    point = request.points[0] if request.points else None
    threads = (point.threads if point else 0) or max(1, usable_cores() // (point.world_size if point else 1))
    for variable in THREAD_VARIABLES:  # for what this process starts itself, e.g. compilers
        os.environ[variable] = str(threads)
    torch.set_num_threads(threads)
    seed = point.seed if point else 0
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def first_unanswered(request: ProbeRequest | None, answered: Iterable[int]) -> int:
    done = set(answered)
    total = max(1, len(request.points)) if request else 1
    return next((index for index in range(total) if index not in done), 0)


def _failure(error: BaseException, index: int) -> PointReply:
    """What the engine did not classify: the user's own words, and the traceback where those do not say it all."""
    outcome = Outcome.OOM_HOST if isinstance(error, MemoryError) else Outcome.CRASHED
    if isinstance(error, TunerError):
        detail = error.detail if isinstance(error, registry.WorkloadImportError) else ""
        outcome = Outcome.BAD_INPUT if isinstance(error, WorkloadError | ConfigError) else outcome
        return PointReply(index=index, outcome=outcome, message=str(error), detail=detail)
    detail = "".join(traceback.format_exception(error))
    return PointReply(index=index, outcome=outcome, message=f"{type(error).__name__}: {error}", detail=detail)


def preload(workload: str) -> dict[str, Any]:
    """Import what every probe of `workload` needs: its own module, torch, the engine, and the modules it names.

    A workload that cannot be imported is no problem yet: the probe imports it again and tells its user why, at once,
    so nothing else is imported for it.
    """
    loaded: list[str] = []
    problems: dict[str, str] = {}
    try:
        wanted: Sequence[str] = tuple(getattr(registry.load(workload), "preload", ()))
    except TunerError:
        return {"preloaded": loaded, "problems": problems, "unsafe": ""}
    for name in [*COMMON, *wanted]:
        try:
            importlib.import_module(name)
            loaded.append(name)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {error}"[:300]
    return {"preloaded": loaded, "problems": problems, "unsafe": _why_not_fork()}


def _why_not_fork() -> str:
    """Empty, or what the imports have done that a forked child could not live with."""
    if (threads := zygote.thread_count()) != 1:
        return f"starts threads ({threads - 1})"
    import torch

    if (child := os.fork()) == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(child, 0)
    return "touches CUDA" if status else ""


def main(arguments: Sequence[str] | None = None) -> int:
    words = _parser().parse_args(arguments)
    importing.named_before_last()
    if words.serve:
        control = socket.socket(fileno=words.control_fd)
        nothing: dict[str, Any] = {"preloaded": [], "problems": {}, "unsafe": ""}
        zygote.Zygote(control, answer).serve(lambda: preload(words.preload) if words.preload else nothing)
        return 0
    reply = os.dup(words.reply_fd)
    if words.reply_fd == 1:
        os.dup2(2, 1)  # what the workload prints must not mix with the events
    if folder := os.environ.get(ranks.FOLDER):
        request = parse_json(ProbeRequest, Path(words.request).read_bytes(), "request")
        return run_rank(request, int(os.environ[ranks.INDEX]), Path(folder))
    source = sys.stdin.fileno() if words.request == "-" else os.open(Path(words.request), os.O_RDONLY)
    return answer(source, reply)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuner.worker", description="Runs probes; started by the tuner.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--serve", action="store_true", help="fork a child per request received on --control-fd")
    way.add_argument("--request", metavar="FILE", help="one ProbeRequest as JSON; - reads standard input")
    parser.add_argument("--control-fd", type=int, default=0, help="Unix socket the tuner speaks on")
    parser.add_argument("--preload", default="", metavar="WORKLOAD", help="import this workload before serving")
    parser.add_argument("--reply-fd", type=int, default=1, help="where events are written, one JSON object a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())

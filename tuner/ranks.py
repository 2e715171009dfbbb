"""Leads the ranks of one data-parallel request: starts them, passes rank 0's events on, and says which rank failed.

A leader that has imported what the ranks need forks them; one that has not lets torchrun start fresh interpreters. It
owns all of them: whatever happens to one ends the others. Like the zygote it never runs a tensor operation.

Ranks and leader share a folder:
    request.json  events (a named pipe: what rank 0 says)  store (forked ranks find each other by it)
    rank-N.pid    rank-N.done at a good end                rank-N.json: the reply of a rank that failed
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from tuner import stopping, zygote
from tuner.contract.awake import AwakeClock
from tuner.contract.base import parse_json
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import EVENT, Event, Finished, PointReply, ProbeKind, ProbeRequest

INDEX, LOCAL_INDEX, SIZE, FOLDER, LEADER = "RANK", "LOCAL_RANK", "WORLD_SIZE", "TUNER_RANKS", "TUNER_LEADER"
"""Environment of a rank; the first three as torchrun sets them."""
TOGETHER = frozenset(
    {ProbeKind.TRAIN, ProbeKind.END_TO_END, ProbeKind.COMPUTE, ProbeKind.LOADER, ProbeKind.LR, ProbeKind.QUALITY}
)
"""Kinds of probe that every rank has a part in; the others are answered by one process."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--max-restarts=0")
"""One machine, a free port of 127.0.0.1."""
FAILED = 1
SETTLE_S = 1.0
"""From the first sign of trouble to the verdict: the others' signs come within it."""
FAREWELL_S = 10.0
"""How long the ranks may take to end after rank 0."""
LOOK_S = 0.1
_PREFIX = "tuner-ranks-"
_OLD_S = 3600.0
_PEER = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|Dist\w*Error|recvValue", re.IGNORECASE
)
"""In the message of a rank that only noticed that another one is gone."""


class RankFailed(BaseException):
    """This rank has told of its failure and must end now: the others cannot go on without it."""


RunRank = Callable[[ProbeRequest, int, Path], int]
"""(request, rank, shared folder) -> exit code; runs in a forked rank."""
Emit = Callable[[Event], None]


def alone(request: ProbeRequest) -> ProbeRequest:
    """The request as one process answers it: the same effective batch size, accumulated."""
    points = tuple(
        point.model_copy(update={"world_size": 1, "accumulation_steps": point.accumulation_steps * point.world_size})
        for point in request.points
    )
    return request.model_copy(update={"points": points})


def wanted(request: ProbeRequest) -> int:
    """How many ranks the request is for. Raises ConfigError when its points disagree."""
    sizes = {point.world_size for point in request.points} or {1}
    if len(sizes) > 1:
        raise ConfigError(f"world_size: the points of one request must agree (got {sorted(sizes)})")
    return sizes.pop()


def lead(request: ProbeRequest, emit: Emit, run_rank: RunRank, reply: int) -> None:
    """Answer `request` with its ranks. A point at which they fail costs the points after it nothing."""
    zygote.process_control(zygote.SUBREAPER, 1)
    _sweep()
    done = 0
    while done < len(request.points):
        left = request.model_copy(update={"points": request.points[done:]})
        with _folder() as folder:
            crew = Crew(left, folder, emit, first=done)
            crew.start(run_rank, reply)
            answered = crew.attend()
        done += answered
        if not answered or request.kind is ProbeKind.TRAIN:
            return


@dataclass
class _State:
    """What is known about one rank."""

    pid: int | None = None
    status: int | None = None
    """As from waitpid; None = not known, or not ended."""
    gone: bool = False
    stopped_since: float | None = None


@dataclass
class Crew:
    """One start of all ranks."""

    request: ProbeRequest
    folder: Path
    emit: Emit
    first: int
    """Index, in the whole request, of this one's first point."""
    _ranks: list[_State] = field(default_factory=list)
    _launcher: subprocess.Popen[bytes] | None = None
    _events: int = -1
    _buffer: bytes = b""
    _answered: int = 0
    _held: PointReply | None = None
    """Rank 0's own account of a failure; another rank may be the cause."""
    _finished: bool = False
    _asked: bool = False
    _untold: int | None = None
    """A request to stop that came before rank 0 was there."""
    _clock: AwakeClock = field(default_factory=AwakeClock)

    def start(self, run_rank: RunRank, reply: int) -> None:
        """Forks the ranks, or has torchrun start them."""
        os.mkfifo(self.folder / "events")
        self._events = os.open(self.folder / "events", os.O_RDWR | os.O_NONBLOCK)
        self._ranks = [_State() for _ in range(wanted(self.request))]
        if "torch" in sys.modules:
            for index, rank in enumerate(self._ranks):
                rank.pid = self._fork(index, run_rank, reply)
        else:
            self._launcher = self._torchrun()
        for number in (*stopping.SIGNALS, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def _fork(self, index: int, run_rank: RunRank, reply: int) -> int:
        leader = os.getpid()
        if pid := os.fork():
            return pid
        code = FAILED
        try:
            zygote.process_control(zygote.PDEATHSIG, signal.SIGKILL)
            if os.getppid() != leader:
                os._exit(code)
            stopping.by_default()
            os.close(reply)
            os.close(self._events)
            size = str(len(self._ranks))
            place = {INDEX: str(index), LOCAL_INDEX: str(index), SIZE: size}
            os.environ.update({**place, FOLDER: str(self.folder), LEADER: str(leader)})
            code = run_rank(self.request, index, self.folder)
        except BaseException:
            traceback.print_exc()
        finally:
            _leave(code)

    def _torchrun(self) -> subprocess.Popen[bytes]:
        file = self.folder / "request.json"
        file.write_text(self.request.to_json(), encoding="utf-8")
        ranks = f"--nproc-per-node={len(self._ranks)}"
        with stopping.held_back():  # torchrun would end the ranks; they are asked through us
            return subprocess.Popen(
                [sys.executable, *TORCHRUN, ranks, "-m", "tuner.worker", "--request", str(file)],
                env={**os.environ, FOLDER: str(self.folder), LEADER: str(os.getpid())},
            )

    def attend(self) -> int:
        """Until all ranks have ended, or one has failed and the others were ended; how many points are answered."""
        end = math.inf
        try:
            self._clock.begin()
            while not all(rank.gone for rank in self._ranks) and self._clock.turn() < end:
                select.select([self._events], [], [], LOOK_S)
                self._read()
                self._look()
                end = min(end, self._clock() + self._patience_s())
            self._read()
            self._look()
            self._judge()
        finally:
            zygote.end_descendants()
            os.close(self._events)
        return self._answered

    def _patience_s(self) -> float:
        """How much longer the ranks may run."""
        if self._troubled():
            return SETTLE_S
        return FAREWELL_S if self._ranks[0].gone else math.inf

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._events, 1 << 16):
                *lines, self._buffer = (self._buffer + data).split(b"\n")
                for line in lines:
                    self._take(EVENT.validate_json(line))

    def _take(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finished = True
            return
        if isinstance(event, PointReply):
            event = event.model_copy(update={"index": event.index + self.first})
            if event.outcome is not Outcome.OK:
                self._held = event
                return
            self._answered += 1
        self.emit(event)

    def _look(self) -> None:
        """Who is still there?"""
        now = self._clock()
        launched = self._launcher is None or self._launcher.poll() is None
        if self._launcher is not None and launched and not self._asked:
            for number in stopping.has_pending(self._launcher.pid)[:1]:
                self._pass_on(number, None)
        for index, rank in enumerate(self._ranks):
            if rank.gone:
                continue
            if self._launcher is not None:
                rank.pid = rank.pid or _number(self.folder / f"rank-{index}.pid")
                rank.gone = not launched if rank.pid is None else not _alive(rank.pid)
                if index == 0 and rank.pid is not None and self._untold is not None:
                    self._pass_on(self._untold, None)
            else:
                assert rank.pid is not None
                pid, status = os.waitpid(rank.pid, os.WNOHANG)
                rank.gone, rank.status = bool(pid), status if pid else None
            stopped = not rank.gone and rank.pid is not None and _is_stopped(rank.pid)
            rank.stopped_since = (rank.stopped_since or now) if stopped else None

    def _troubled(self) -> bool:
        if self._held is not None or self._given_up() is not None:
            return True
        return any(rank.gone and not self._well(index) for index, rank in enumerate(self._ranks))

    def _well(self, index: int) -> bool:
        return (self.folder / f"rank-{index}.done").exists()

    def _given_up(self) -> int | None:
        """A rank that was stopped for too long."""
        for index, rank in enumerate(self._ranks):
            if rank.stopped_since and self._clock() - rank.stopped_since > self.request.limits.peer_s:
                return index
        return None

    def _judge(self) -> None:
        """Say how it ended, where that was not well."""
        if self._asked and self._ranks[0].gone and not self._well(0) and self._held is None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # stopped before it could save anything: as asked
            zygote.end_descendants()
            shutil.rmtree(self.folder, ignore_errors=True)
            os.kill(os.getpid(), signal.SIGTERM)
        reply = self._blamed()
        if reply is not None:
            self._answered += 1
            self.emit(reply)

    def _blamed(self) -> PointReply | None:
        """The reply of the rank that failed first of its own accord; None = all is well."""
        index = self.first + self._answered
        if (stopped := self._given_up()) is not None:
            text = f"{self._name(stopped)} was stopped and did not go on within {self.request.limits.peer_s:g} s"
            return PointReply(index=index, outcome=Outcome.CRASHED, message=self._and_now(text))
        told = {number: reply for number in range(len(self._ranks)) if (reply := self._told(number))}
        lost = [n for n, rank in enumerate(self._ranks) if rank.gone and not self._well(n) and n not in told]
        own = {number: reply for number, reply in told.items() if not _PEER.search(reply.message)}
        if lost and not own:
            text = f"{self._name(lost[-1])} {_ending(self._ranks[lost[-1]].status)}"
            return PointReply(index=index, outcome=Outcome.CRASHED, message=self._and_now(text))
        number, reply = next(iter((own or told).items()), (0, None))
        if reply is None or number == 0:
            return reply
        return reply.model_copy(update={"index": index, "message": self._and_now(f"rank {number}: {reply.message}")})

    def _told(self, number: int) -> PointReply | None:
        if number == 0:
            return self._held
        with contextlib.suppress(OSError):
            return parse_json(PointReply, (self.folder / f"rank-{number}.json").read_text(encoding="utf-8"))
        return None

    def _name(self, index: int) -> str:
        return f"rank {index} of {len(self._ranks)} (process {self._ranks[index].pid})"

    def _and_now(self, text: str) -> str:
        if self.request.kind is not ProbeKind.TRAIN:
            return f"{text}; the other ranks were ended"
        return f"{text}; the other ranks were ended. The same command goes on from the newest checkpoint"

    def _pass_on(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A request to stop goes to rank 0, which tells the others; a request for stacks goes to all."""
        if number != signal.SIGUSR2:
            self._asked, self._untold = True, number if self._ranks[0].pid is None else None
        for rank in self._ranks[: None if number == signal.SIGUSR2 else 1]:
            if rank.pid is not None and not rank.gone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text(encoding="utf-8"))
    return None


def _alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _ending(status: int | None) -> str:
    if status is None:
        return "is gone: it was killed, or crashed in native code"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {known.value: known.name for known in signal.Signals}
        return f"was ended by signal {number} ({names.get(number, 'real-time')})"
    return f"ended with exit code {os.waitstatus_to_exitcode(status)}"


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for one start of the ranks, named after this process."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """Remove what leaders left behind that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = left.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            old = time.time() - left.stat().st_mtime > _OLD_S
            if old and pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(left, ignore_errors=True)

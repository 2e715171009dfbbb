"""Runs each request in a process of its own: start, watch, end, and say what became of it.

`forkserver` forks probes from a process that has done nothing but import; `fresh` gives every probe a new interpreter.
Either way a host process stands between (see `tuner.zygote`), so that no descendant outlives its probe, nor the tuner.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import selectors
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tuner import stopping
from tuner.contract.allowance import usable_cores
from tuner.contract.awake import TURN_S
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, Listener, NoticeEvent, ProbeKind, ProbeReply, ProbeRequest
from tuner.contract.trust import REGISTERED, Trust
from tuner.probe.capacity import check_capacity
from tuner.probe.device_memory import CleanDevice, DeviceMemory, NvmlMemory
from tuner.probe.launch import Exited, Host, HostLost, worker_environment
from tuner.probe.log import Log
from tuner.probe.verdict import Ending, kernel_oom_kills, log_tail
from tuner.probe.watch import Watch

Isolation = Literal["forkserver", "fresh"]
LOGS_KEPT = 200
DUMP_S = 0.5
"""How long a hung process gets to write its stacks into its log."""
KILLED_S = 10.0
"""How long the kernel may take to end what was killed."""
STOP_GRACE_S = 20.0
"""How long a training run that was asked to stop may be silent before it is ended (Slurm and Kubernetes kill after
30 s). While it writes a checkpoint it may take as long as ever."""


@dataclass(frozen=True)
class _Files:
    """One probe's request, open, and its log."""

    request: int
    log: Log
    log_path: Path


class SubprocessRunner:
    """A `ProbeRunner` over real processes.

    trust: which workloads may be imported; by default the registered ones alone.
    cache_dir: prepared data and compiled kernels. log_dir: a log and the request of each of the last 200 probes.
    start_s: longest start-up (interpreter and imports). grace_s: between asking a hung probe to end and killing it.
    device_memory: who to ask whether the GPU is clean (default NVML); settle_s: how long to wait until it is.
    """

    def __init__(
        self,
        cache_dir: Path,
        *,
        isolation: Isolation = "forkserver",
        log_dir: Path,
        start_s: float = 120.0,
        grace_s: float = 2.0,
        device_memory: DeviceMemory | None = None,
        settle_s: float = 15.0,
        trust: Trust = REGISTERED,
    ) -> None:
        self.isolation: Isolation = isolation
        self._cache_dir = cache_dir.resolve()
        self._log_dir = log_dir.resolve()
        self._start_s = start_s
        self._grace_s = grace_s
        self._device = CleanDevice(device_memory or NvmlMemory(), settle_s)
        self._trust = trust
        self._host: Host | None = None
        self._preloaded = ""
        _forget_old(self._log_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        """Run one request; whatever its process does becomes the reply. A single point that something from outside
        disturbed is measured once more.

        Interrupted (a signal to stop) and what the listener raises end the probe and are passed on; a training run is
        asked to save and end first. Raises ConfigError for a request that `admit` refuses.
        """
        self.admit(request)
        stopping.check()
        listener = listener or _ignore
        if dirty := self._device.wait() if request.device != "cpu" else "":
            return Watch(request, listener, self._start_s).reply(Ending(refused=dirty))
        reply = self._once(request, listener)
        if [point.outcome for point in reply.points] != [Outcome.CONTENDED]:
            return reply
        listener(NoticeEvent(level="warning", text=f"{reply.points[0].message}; once more"))
        return self._once(request, listener)

    def _once(self, request: ProbeRequest, listener: Listener) -> ProbeReply:
        watch = Watch(request, listener, self._start_s)
        self._device.note()
        saves = stopping.listening() if request.kind is ProbeKind.TRAIN else contextlib.nullcontext()
        try:
            with saves:
                return watch.reply(self._attend(request, watch))
        except BaseException:
            self.close()
            raise
        finally:
            if self.isolation == "fresh":
                self.close()

    def admit(self, request: ProbeRequest) -> None:
        """The one door to a process that imports code. Raises ConfigError for code that nobody asked for, and for more
        processes than this machine can run."""
        for name in {request.workload, *(point.workload for point in request.points)}:
            self._trust.check(name)
        check_capacity(request.points, usable_cores())

    def close(self) -> None:
        """End the host process and whatever still runs under it."""
        host, self._host = self._host, None
        if host is not None:
            host.close()

    def _attend(self, request: ProbeRequest, watch: Watch) -> Ending:
        kills_before = kernel_oom_kills()
        try:
            with self._files(request) as files:
                ending = self._launch_and_follow(request, watch, files)
        except OSError as error:
            return Ending(lost=f"the probe could not be started: {error}")
        watch.end_of_input()
        return Ending(
            status=ending.status,
            timed_out=ending.timed_out,
            lost=ending.lost,
            asked_to_stop=ending.asked_to_stop,
            kernel_oom=kernel_oom_kills() > kills_before,
            garbage=watch.garbage,
            log=log_tail(files.log_path),
        )

    def _launch_and_follow(self, request: ProbeRequest, watch: Watch, files: _Files) -> Ending:
        reply_r, reply_w = os.pipe()
        try:
            try:
                host = self._begin(request, watch, files, reply_w)
            finally:
                os.close(reply_w)
            watch.restart_clock()
            with stopping.attended():
                exited, why = self._follow(request, host, watch, reply_r, files.log)
        except HostLost as error:
            self._drop_host()
            return Ending(lost=str(error))
        finally:
            _drain(reply_r, watch)
            os.close(reply_r)
        if exited is not None and not why and (by := stopping.ended_by(exited.status)) is not None:
            stopping.note(by)  # somebody else sent it: to the probe, or to one of its loader workers
        if request.kind is not ProbeKind.TRAIN:
            stopping.check()
        asked = stopping.asked() is not None
        return Ending(status=exited.status if exited else None, timed_out=why, asked_to_stop=asked)

    def _follow(
        self, request: ProbeRequest, host: Host, watch: Watch, reply_r: int, log: Log
    ) -> tuple[Exited | None, str]:
        """Read events until the process has ended or is overdue; how it ended, and why we ended it. Raises HostLost,
        and Interrupted where nothing is to be saved."""
        os.set_blocking(reply_r, False)
        told = False
        with selectors.DefaultSelector() as watched:
            watched.register(reply_r, selectors.EVENT_READ)
            watched.register(host.control, selectors.EVENT_READ)
            for descriptor in stopping.descriptors():
                watched.register(descriptor, selectors.EVENT_READ)
            while True:
                ready = watched.select(max(0.0, min(TURN_S, watch.seconds_left())))
                watch.turn()
                for key, _ in ready:
                    if key.fileobj is host.control:
                        if exited := host.exited():
                            return exited, ""
                    elif key.fileobj in stopping.descriptors():
                        stopping.take_wake_up()
                    elif data := os.read(reply_r, 1 << 16):
                        watch.feed(data)
                    else:
                        watched.unregister(reply_r)
                if (number := stopping.asked()) is not None and not told:
                    if request.kind is not ProbeKind.TRAIN:
                        stopping.check()
                    told = True
                    host.signal(number, group=False)
                    watch.expect_end(STOP_GRACE_S, stopping.name_of(number))
                if stopping.insisted():
                    raise stopping.Interrupted(stopping.farewell())
                log.bound()
                if why := watch.overdue():
                    return self._put_down(host, watch), why

    def _put_down(self, host: Host, watch: Watch) -> Exited | None:
        """End a hung probe: first its stacks into its log, then the request to end, then the end. Raises HostLost."""
        watch.close()
        host.signal(signal.SIGUSR2, group=False)
        exited = host.await_exit(DUMP_S)
        for number, patience in ((signal.SIGTERM, self._grace_s), (signal.SIGKILL, KILLED_S)):
            if exited is None:
                host.signal(number, group=True)
                exited = host.await_exit(patience)
        if exited is None:
            self._drop_host()
        return exited

    def _begin(self, request: ProbeRequest, watch: Watch, files: _Files, reply_w: int) -> Host:
        """A host with the probe running in it. A lost host is replaced once; then every probe gets a fresh one."""
        for attempt in (1, 2):
            if self.isolation == "fresh":
                break
            try:
                return self._fork(self._ready_host(request, watch), files, reply_w)
            except HostLost as error:
                unborn = self._host is None
                self._drop_host()
                if unborn or attempt == 2:
                    self._fall_back(str(error), watch)
        self.close()
        self._host = self._start_host(request, preload="")
        return self._fork(self._host, files, reply_w)

    @staticmethod
    def _fork(host: Host, files: _Files, reply_w: int) -> Host:
        os.lseek(files.request, 0, os.SEEK_SET)  # a host lost before may have read it
        host.begin(files.request, reply_w, files.log.fileno())
        return host

    def _ready_host(self, request: ProbeRequest, watch: Watch) -> Host:
        module = request.workload.partition(":")[0]
        if self._host is not None and self._preloaded == module:
            return self._host
        self.close()
        host = self._start_host(request, preload=request.workload)
        if host.unsafe:
            host.kill()
            raise HostLost(f"importing {request.workload} {host.unsafe}, and forking is not safe after that")
        self._host, self._preloaded = host, module if host.preloaded else ""
        for name, problem in host.problems.items():
            watch.tell(NoticeEvent(level="warning", text=f"preload: {name} could not be imported ({problem})"))
        return host

    def _start_host(self, request: ProbeRequest, *, preload: str) -> Host:
        threads = (request.points[0].threads if request.points else 0) or usable_cores()
        environment = worker_environment(os.environ, self._cache_dir, threads)
        log = self._log_dir / f"host-{os.getpid()}.log"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        return Host.start(environment, log, preload=preload, timeout_s=max(self._start_s, request.limits.deadline_s))

    def _fall_back(self, reason: str, watch: Watch) -> None:
        self.isolation = "fresh"
        text = f"probes start in fresh interpreters from now on, which takes seconds longer each: {reason}"
        watch.tell(NoticeEvent(level="warning", text=text))

    def _drop_host(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.kill()

    @contextlib.contextmanager
    def _files(self, request: ProbeRequest) -> Iterator[_Files]:
        """The request written beside an empty log, both open; anyone can run the request again by hand."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        base = self._log_dir / f"{_file_name(request.id)}-{os.getpid()}"
        log_path, request_path = base.with_suffix(".log"), base.with_suffix(".json")
        request_path.write_text(request.to_json(), encoding="utf-8")
        with request_path.open("rb") as source, Log(log_path) as log:
            yield _Files(request=source.fileno(), log=log, log_path=log_path)


def _drain(reply_r: int, watch: Watch) -> None:
    """Take what the ended process had still written."""
    os.set_blocking(reply_r, False)
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reply_r, 1 << 16):
            watch.feed(data)


def _ignore(event: Event) -> None:
    pass


def _file_name(request_id: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,80}", request_id):
        return request_id
    return hashlib.sha256(request_id.encode()).hexdigest()[:16]


def _forget_old(log_dir: Path) -> None:
    """Keep the newest logs and requests."""
    with contextlib.suppress(OSError):
        files = sorted(log_dir.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[2 * LOGS_KEPT :]:
            path.unlink()

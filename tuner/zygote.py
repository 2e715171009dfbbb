"""The process probes are forked from: it has imported, and done nothing else, so that a fork is safe and cheap.

It serves one probe at a time over a Unix socket and owns what the probe leaves behind: as subreaper it inherits every
orphan, and ends them all before it reports the exit. When the socket closes (the tuner is gone, however that came)
it ends its probe and itself. It knows nothing of requests and replies, and never runs a tensor operation.

Words on the socket, one JSON object a packet:
    to it     {"do": "probe"} with the descriptors of request, reply pipe and log; {"do": "signal", "signal", "group"}
    from it   {"said": "ready", "preloaded", "problems", "unsafe"}; "started" with "pid"; "refused" with "reason";
              "exited" with "pid" and "status" (as from waitpid), said when nothing of the probe is left; "signalled"
              with "signal": it was asked to stop, which is the tuner's to decide
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import psutil

from tuner import stopping

PACKET = 1 << 16
CLEANUP_S = 5.0
"""Longest time spent on ending what a probe left behind."""
PDEATHSIG, SUBREAPER = 1, 36
"""Options of `process_control`: a signal when the parent dies; being the parent of orphaned descendants."""

Probe = Callable[[int, int], int]
"""(request descriptor, reply descriptor) -> exit code; runs in the forked child."""


class Zygote:
    """Serves `control` until it closes. `probe` is what a child runs."""

    def __init__(self, control: socket.socket, probe: Probe) -> None:
        self._control = control
        self._probe = probe
        self._leader: int | None = None
        self._wake_r, self._wake_w = socket.socketpair()
        for end in (self._wake_r, self._wake_w):
            end.setblocking(False)

    def serve(self, preload: Callable[[], Mapping[str, Any]]) -> None:
        """Import, say `ready`, then fork a child per request."""
        process_control(PDEATHSIG, signal.SIGKILL)  # a tuner killed while we import must not leave us behind
        process_control(SUBREAPER, 1)
        stopping.listen()
        report = preload()
        process_control(PDEATHSIG, 0)  # from here on the socket tells, and what was started can be ended
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as watched, contextlib.suppress(ConnectionError):
            self._say(said="ready", **report)
            watched.register(self._control, selectors.EVENT_READ)
            watched.register(self._wake_r, selectors.EVENT_READ)
            for descriptor in stopping.descriptors():
                watched.register(descriptor, selectors.EVENT_READ)
            while self._turn({key.fileobj for key, _ in watched.select()}):
                pass
        self._end_probe()

    def _turn(self, ready: set[Any]) -> bool:
        """Handle what is ready; False when the tuner has closed its end."""
        if self._wake_r in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_r.recv(4096)
            self._reap()
        if (asked := stopping.asked()) is not None:
            stopping.forget()
            self._say(said="signalled", signal=int(asked))
        if self._control not in ready:
            return True
        packet, descriptors, _, _ = socket.recv_fds(self._control, PACKET, 3)
        if not packet:
            return False
        order = json.loads(packet)
        if order["do"] == "probe":
            self._start(descriptors)
        elif self._leader is not None:
            self._signal(int(order["signal"]), group=bool(order["group"]))
        return True

    def _start(self, descriptors: list[int]) -> None:
        threads = thread_count()
        if self._leader is not None or threads != 1:
            busy = "a probe is running already" if self._leader is not None else f"{threads} threads, only one may fork"
            self._say(said="refused", reason=busy)
        else:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            self._fork(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _fork(self, request: int, reply: int, log: int) -> None:
        parent = os.getpid()
        with stopping.held_back():
            try:
                pid = os.fork()
            except OSError as error:
                self._say(said="refused", reason=f"fork failed: {error.strerror}")
                return
            if pid == 0:
                self._become_probe(parent, request, reply, log)
        self._leader = pid
        self._say(said="started", pid=pid)

    def _become_probe(self, parent: int, request: int, reply: int, log: int) -> NoReturn:
        """The child's whole life. Nothing of the zygote's may run in it afterwards."""
        code = 1
        try:
            os.setsid()
            process_control(PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(code)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            stopping.by_default()
            for end in (self._control, self._wake_r, self._wake_w):
                end.close()
            log_to(log)
            code = self._probe(request, reply)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)

    def _signal(self, number: int, *, group: bool) -> None:
        assert self._leader is not None
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self._leader, number)

    def _reap(self) -> None:
        """Collect what has ended. The leader is peeked at first: its number stays its own until its group is gone."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid == self._leader:
                self._finish()
            else:
                os.waitpid(ended.si_pid, 0)

    def _finish(self) -> None:
        leader, self._leader = self._leader, None
        assert leader is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        _, status = os.waitpid(leader, 0)
        end_descendants()
        self._say(said="exited", pid=leader, status=status)

    def _end_probe(self) -> None:
        if self._leader is not None:
            self._signal(signal.SIGKILL, group=True)
        end_descendants()

    def _say(self, **words: Any) -> None:
        self._control.send(json.dumps(words).encode())


def end_descendants() -> None:
    """Kill and collect every descendant of this process, also those that orphaned themselves."""
    deadline = time.monotonic() + CLEANUP_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def log_to(log: int) -> None:
    """Send this process's output to descriptor `log`, and the stacks of all threads too: on a crash, and on SIGUSR2."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    dump_stacks()


def dump_stacks() -> None:
    """Write the stacks of all threads to standard error on a crash, and on SIGUSR2 whatever answered it before."""
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.unregister(signal.SIGUSR2)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)


def thread_count() -> int:
    """Threads of this process, those of native libraries included."""
    return psutil.Process().num_threads()


def process_control(option: int, value: int) -> None:
    """prctl(2), where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)

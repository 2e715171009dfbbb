"""Starts the process that probes are forked from, speaks with it, and ends it. It knows nothing of requests."""

from __future__ import annotations

import contextlib
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tuner import stopping
from tuner.contract.allowance import usable_cores
from tuner.contract.awake import TURN_S, AwakeClock
from tuner.importing import worker_paths
from tuner.probe.log import Log
from tuner.probe.verdict import log_tail
from tuner.zygote import CLEANUP_S, PACKET

MARK = "TUNER_WORKER_HOST"
"""Environment variable every descendant carries, so that it is found even when its parents are gone."""
LOOK_S = 0.5
FARE_WELL_S = 8.0
"""How long a closed host may take to end its probe and itself before it is killed."""

LONGEST_WORDS = 400
"""Letters of a host's last words."""

_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b|Fatal Python error")
_SECRET = re.compile(r"PASSW|SECRET|PGPASS|MYSQL_PWD|^TUNER_STORAGE|^OPTUNA_STORAGE|^DATABASE_URL", re.IGNORECASE)
_URL_WITH_PASSWORD = re.compile(r"^[a-z][a-z0-9+.-]*://(\S*:\S+@|\S*[?&][^=\s]*pass[^=\s]*=)", re.IGNORECASE)


class HostLost(Exception):
    """The host process is gone, cannot fork, or does not answer; the message says which."""


@dataclass(frozen=True)
class Exited:
    """A probe's process has ended, and everything it left behind was ended too."""

    status: int
    """As from waitpid."""


def worker_environment(base: Mapping[str, str], cache_dir: Path, threads: int) -> dict[str, str]:
    """The environment of worker processes, made from `base`.

    Store URLs and passwords are left out. glibc's malloc thresholds are raised, so that a large batch is not mapped
    and unmapped at every step; they decide up to a third of a step's time on a CPU. OpenBLAS gets one thread: its
    pool would start at import, and only a process with one thread may fork. Asking whether there is a GPU goes
    through NVML, as CUDA itself must not be touched before a fork. The current directory is not on Python's path
    (see `tuner.importing`); `tuner.registry.load` adds it, as the last one, for `module:Class`. Inductor knows of no
    CPU quota and would compile in a process per core of the host.
    """
    kept = {
        key: value for key, value in base.items() if not _SECRET.search(key) and not _URL_WITH_PASSWORD.match(value)
    }
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "TORCHINDUCTOR_CACHE_DIR": base.get("TORCHINDUCTOR_CACHE_DIR") or str(cache_dir / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": base.get("TORCHINDUCTOR_COMPILE_THREADS") or str(min(32, usable_cores())),
        "TUNER_CACHE": str(cache_dir),
        "HF_HUB_OFFLINE": base.get("HF_HUB_OFFLINE", "1"),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **worker_paths(base),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # of the log; what a workload prints must not end its run
        "MPLBACKEND": "Agg",
    }


class Host:
    """One serving process: with `preload` it has imported the workload's modules, without it nothing."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, mark: str, log: Path) -> None:
        self._process = process
        self.control = control
        self._mark = mark
        self._log = log
        self.preloaded: list[str] = []
        self.problems: dict[str, str] = {}
        self.unsafe = ""
        self.leader: int | None = None

    @classmethod
    def start(cls, environment: Mapping[str, str], log: Path, *, preload: str, timeout_s: float) -> Host:
        """Start a host and wait until it is ready. Raises HostLost and Interrupted; nothing is left running then."""
        with Log(log) as output:
            host = cls._started(environment, output.fileno(), preload, log)
            try:
                ready = host._await("ready", timeout_s, output.bound)
            except BaseException:
                host.kill()
                raise
        host.preloaded, host.problems, host.unsafe = ready["preloaded"], ready["problems"], ready["unsafe"]
        return host

    @classmethod
    def _started(cls, environment: Mapping[str, str], output: int, preload: str, log: Path) -> Host:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "tuner.worker", "--serve", "--control-fd", str(theirs.fileno())]
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            with stopping.held_back():
                process = subprocess.Popen(
                    [*command, *(["--preload", preload] if preload else [])],
                    env={**environment, MARK: mark},
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            on_failure.pop_all()
        return cls(process, ours, mark, log)

    def begin(self, request: int, reply: int, log: int, timeout_s: float = 30.0) -> int:
        """Fork a probe that reads descriptor `request` and writes `reply` and `log`; its pid. Raises HostLost and
        Interrupted."""
        try:
            socket.send_fds(self.control, [json.dumps({"do": "probe"}).encode()], [request, reply, log])
        except OSError as error:
            raise HostLost(f"the worker host cannot be reached: {error.strerror}{self._last_words()}") from None
        self.leader = int(self._await("started", timeout_s)["pid"])
        return self.leader

    def signal(self, number: signal.Signals, *, group: bool) -> None:
        """Send a signal to the probe's process, or to its whole process group; nothing when it has ended."""
        order = {"do": "signal", "signal": int(number), "group": group}
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(order).encode())

    def exited(self) -> Exited | None:
        """What the host says next, its socket being readable. Raises HostLost when it is gone."""
        word = self._receive()
        if word["said"] == "signalled":
            stopping.note(int(word["signal"]))
        if word["said"] != "exited":
            return None
        self.leader = None
        return Exited(status=int(word["status"]))

    def await_exit(self, timeout_s: float) -> Exited | None:
        """Wait for the probe's end; None when it has not come in time. Raises HostLost."""
        try:
            word = self._await("exited", timeout_s)
        except TimeoutError:
            return None
        self.leader = None
        return Exited(status=int(word["status"]))

    def close(self) -> None:
        """End the host and its probe; returns when both are gone."""
        self.control.close()
        try:
            self._process.wait(FARE_WELL_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """The hard end: host, probe, and every process that carries this host's mark."""
        self.control.close()
        self._process.kill()
        self._process.wait()
        deadline = time.monotonic() + CLEANUP_S
        while (left := marked_processes(self._mark)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)
        while self.leader is not None and is_alive(self.leader) and time.monotonic() < deadline:
            time.sleep(0.01)  # a process that is being torn down has lost its mark already

    def _await(self, said: str, timeout_s: float, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """`meanwhile` is called now and then."""
        clock = AwakeClock()
        deadline = clock() + timeout_s
        ending = said == "exited"
        while (left := deadline - clock.turn()) > 0:
            meanwhile()
            heard: list[Any] = [self.control, *([] if ending else stopping.descriptors())]
            ready = select.select(heard, [], [], min(TURN_S, left))[0]
            if self.control in ready:
                word = self._receive()
                if word["said"] == said:
                    return word
                if word["said"] == "refused":
                    raise HostLost(f"the worker host cannot fork: {word['reason']}")
                if word["said"] == "signalled":
                    stopping.note(int(word["signal"]))
            elif ready:
                stopping.check()
                stopping.take_wake_up()
        if ending:
            raise TimeoutError
        raise HostLost(f"the worker host did not become {said!r} within {timeout_s:g} s")

    def _receive(self) -> dict[str, Any]:
        try:
            packet = self.control.recv(PACKET)
        except OSError as error:
            raise HostLost(f"the worker host cannot be reached: {error.strerror}{self._last_words()}") from None
        if not packet:
            raise HostLost(f"the worker host has ended{self._last_words()}")
        word: dict[str, Any] = json.loads(packet)
        return word

    def _last_words(self) -> str:
        """How the host ended, and the line of its log that says most; empty where it has said nothing and lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.returncode
        lines = [line.strip() for line in log_tail(self._log).splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        told = "" if code is None else f" ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
        return told + "".join(f": {line[:LONGEST_WORDS]}" for line in (errors or lines)[-1:])


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that descend from the host of this mark, wherever they hang in the process tree now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def is_alive(pid: int) -> bool:
    """Is there a process of this number that has not ended yet?"""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False

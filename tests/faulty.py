"""Workloads that go wrong, each in its own way. Refer to them as `tests.faulty:Hangs`.

Every fault writes a line into the file named by the option `ledger` at the moment it strikes, so that a test can tell
a fault that was survived from one that never came.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from tests.toys import Rows, Toy
from tuner.contract.base import Scalar
from tuner.contract.workload import Batch, Split, Term


class Faulty(Toy):
    """A toy until the third loss call on a batch of at least `strike_batch`; then `strike` decides."""

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        own = dict(options)
        self.ledger = Path(str(own.pop("ledger", os.devnull)))
        self.strike_batch = int(own.pop("strike_batch", 1) or 1)
        self.due = 3
        super().__init__(own)

    def note(self, *words: object) -> None:
        with self.ledger.open("a", encoding="utf-8") as ledger:
            ledger.write(" ".join(map(str, [type(self).__name__, os.getpid(), *words])) + "\n")

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        self.due -= len(batch["x"]) >= self.strike_batch
        if not self.due:
            self.note()
            self.strike()
        return terms

    def strike(self) -> None:
        raise NotImplementedError


class Notes(Faulty):
    """Goes well, and tells that it has begun."""

    def strike(self) -> None:
        pass


class Hangs(Faulty):
    def strike(self) -> None:
        while True:
            time.sleep(3600)


class IgnoresSigterm(Hangs):
    def strike(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        super().strike()


class StopsItself(Faulty):
    """Stopped, not sleeping: no handler of its own runs any more."""

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


class Segfaults(Faulty):
    def strike(self) -> None:
        ctypes.string_at(0)


class Aborts(Faulty):
    def strike(self) -> None:
        os.abort()


class ExitsZero(Faulty):
    def strike(self) -> None:
        os._exit(0)


class ExitsWithCode(Faulty):
    def strike(self) -> None:
        print("last words of a lost process", flush=True)  # noqa: T201
        os._exit(42)


class KillsItself(Faulty):
    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class HalfReply(Faulty):
    """Writes half an event into every pipe it holds, the reply's among them, and is gone."""

    def strike(self) -> None:
        for name in os.listdir("/proc/self/fd"):
            try:
                if stat.S_ISFIFO(os.fstat(int(name)).st_mode):
                    os.write(int(name), b'{"event": "point", "index": 0, "outc')
            except OSError:
                continue
        os._exit(0)


class Chatty(Faulty):
    """Prints what looks like events, and a lot of it."""

    def strike(self) -> None:
        for _ in range(5000):
            print('{"event": "point", "index": 0, "outcome": "crashed", "message": "not from the engine"}')  # noqa: T201
        print('{"event": "finished"}', file=sys.stderr, flush=True)  # noqa: T201


class TalksAndDies(Faulty):
    """Fills its log with numbered lines, and crashes with a last word."""

    def strike(self) -> None:
        for number in range(200_000):
            print(f"line {number} {'.' * 60}")  # noqa: T201
        print("last words of a talkative process", flush=True)  # noqa: T201
        ctypes.string_at(0)


class ForksOrphans(Faulty):
    """Leaves two processes in sessions of their own, one of them without a parent, and goes on as if nothing were."""

    def strike(self) -> None:
        child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        self.note("child", child.pid)
        if os.fork() == 0:
            os.setsid()
            orphan = os.fork()
            if orphan:
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.note("orphan", os.getpid())
            time.sleep(3600)
        os.wait()
        while self.ledger.read_text().count("\n") % 3:
            time.sleep(0.01)


class OrphansThenHangs(ForksOrphans):
    def strike(self) -> None:
        super().strike()
        while True:
            time.sleep(3600)


class NanAtOnce(Faulty):
    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        if not self.calls:
            self.note()
        terms = super(Faulty, self).loss(model, batch)
        return {name: Term(sum=term.sum * float("nan"), weight=term.weight) for name, term in terms.items()}


class RaisesInModel(Faulty):
    def model(self) -> nn.Module:
        self.note()
        raise ValueError("a width of 7 does not fit 2 heads")


class WorkersDie(Faulty):
    """The loader's workers are killed, as by the kernel when memory is short."""

    def dataset(self, split: Split) -> Dataset[Mapping[str, object]]:  # type: ignore[override]
        return _DeadlyRows(self.options["samples"], 0, self.options, self.ledger)


class _DeadlyRows(Rows):
    def __init__(self, samples: int, seed: int, options: Mapping[str, object], ledger: Path) -> None:
        super().__init__(samples, seed, options)
        self._ledger, self._pid = ledger, os.getpid()

    def __getitem__(self, index: int) -> Mapping[str, object]:  # type: ignore[override]
        if os.getpid() != self._pid:
            with self._ledger.open("a", encoding="utf-8") as ledger:
                ledger.write(f"WorkersDie {os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class WantsMissingModule(Toy):
    preload = ("json", "no_such_module_anywhere")

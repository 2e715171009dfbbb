"""A toy that dies without a word, in the way its option `death` names, at its loss call number `at`."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Mapping

from torch import nn

from tests.toys import Toy
from tuner.contract.base import Scalar
from tuner.contract.workload import Batch, Term

NAME = "tests.commands.dying_toys:Dies"


class Dies(Toy):
    def __init__(self, options: Mapping[str, Scalar]) -> None:
        own = dict(options)
        self.death, self.at = str(own.pop("death", "")), int(own.pop("at", 0) or 0)
        super().__init__(own)

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        if self.calls == self.at:
            die(self.death)
        return super().loss(model, batch)


def die(how: str) -> None:
    if how == "segfault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "abort":
        os.abort()
    if how == "host":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # this process goes with it
    if how == "raise":
        raise ValueError("told to fail")
    os._exit(int(how.removeprefix("exit")))

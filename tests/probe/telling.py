"""A workload that writes down what its process is like."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.toys import Toy
from tuner.contract.base import Scalar


class Tells(Toy):
    def __init__(self, options: Mapping[str, Scalar]) -> None:
        own = dict(options)
        self.out = Path(str(own.pop("out")))
        super().__init__(own)

    def model(self) -> nn.Module:
        told = {
            "pid": os.getpid(),
            "session_leader": os.getsid(0) == os.getpid() == os.getpgrp(),
            "threads": torch.get_num_threads(),
            "draws": [random.random(), float(np.random.rand()), float(torch.rand(()))],
            "cuda_initialized": torch.cuda.is_initialized(),
            "environment": dict(os.environ),
            "stdin": sys.stdin.read(),
            "stdout": os.readlink("/proc/self/fd/1"),
        }
        self.out.write_text(json.dumps(told), encoding="utf-8")
        return super().model()

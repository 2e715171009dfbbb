"""A workload whose module touches CUDA when imported. There is no GPU here, so what torch would say is a mock."""

from __future__ import annotations

import torch

from tests.toys import Toy


def _mock_bad_fork() -> bool:
    return True


torch.cuda._is_in_bad_fork = _mock_bad_fork


class TouchesMockCuda(Toy):
    pass

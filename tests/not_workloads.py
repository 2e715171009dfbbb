"""What a user may name by mistake: no class, and a class that is no workload. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.contract.base import Scalar

NOT_A_CLASS = 3


class LacksMethods:
    def __init__(self, options: Mapping[str, Scalar]) -> None: ...

    def model(self) -> None: ...

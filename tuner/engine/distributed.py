"""The place of data-parallel training: today one rank, and a clear word where more are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.contract.config import RunConfig
from tuner.engine.failure import Unsupported


@dataclass(frozen=True)
class Rank:
    """Which part of the global batch this process takes."""

    index: int = 0
    world_size: int = 1


def this_rank(config: RunConfig) -> Rank:
    """Raises Unsupported for more than one rank."""
    if config.world_size != 1:
        raise Unsupported(
            f"world_size: {config.world_size} was asked for; this version trains on one device. Set it to 1"
        )
    return Rank()

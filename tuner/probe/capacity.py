"""What one machine can be asked to start: ranks, loader processes and threads. A configuration for a bigger machine is
a good configuration; it is held against this machine where its processes are about to be started, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError

RANKS_PER_CORE = 2
LOADERS_PER_CORE = 32
"""Loader processes may all wait for a network or a disk: a core serves many of them."""
THREADS_PER_CORE = 4
MIN_LOADERS, MIN_THREADS = 64, 16
"""What any machine may be asked for."""


def check_capacity(points: Iterable[RunConfig], cores: int) -> None:
    """Raises ConfigError for what `cores` cores cannot run; nothing was started then."""
    for point in points:
        ranks, workers = point.world_size, point.loader.num_workers
        most = RANKS_PER_CORE * cores
        if ranks > most:
            raise ConfigError(
                f"world_size: {ranks} ranks on {_cores(cores)} (at most {most} run here); "
                f"share the same effective batch among fewer with --nproc {most} or less"
            )
        most = max(MIN_LOADERS, LOADERS_PER_CORE * cores) // ranks
        if workers > most:
            each = f" for each of {ranks} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"loader.num_workers: {workers} loader processes{each} on {_cores(cores)} (at most {most} run here); "
                "write a smaller number into the configuration"
            )
        most = max(MIN_THREADS, THREADS_PER_CORE * cores)
        if point.threads > most:
            raise ConfigError(
                f"threads: {point.threads} threads on {_cores(cores)} (at most {most} run here); "
                "write 0 for all cores, or a smaller number"
            )


def _cores(cores: int) -> str:
    return f"{cores} core{'s' if cores > 1 else ''}"

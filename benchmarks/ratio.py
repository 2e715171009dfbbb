"""Two ways of doing the same thing, timed side by side: calls in turn, paired ratios, one table.

A shared host drifts by tens of percent within a minute, so ways are never timed one after the other: every round calls
each of them once, and the ratio is formed within the round.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.machine import print_machine, table
from tuner.contract.statistics import paired_gain


@dataclass(frozen=True)
class Ratio:
    """How many times slower one way is, with its 95 % interval; without one (a single round) 0 to infinity."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not math.isfinite(self.high):
            return f"{self.value:.2f} (one round: no interval)"
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleaved(ways: Mapping[str, Callable[[], None]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, by way, in the order of the rounds; `warmup` calls of each way come first, untimed.

    The way that begins rotates from round to round, so that none always follows the same other.
    Raises ValueError without ways or with less than one round.
    """
    if not ways or rounds < 1:
        raise ValueError(f"at least one way and one round are needed (got {len(ways)} ways, rounds={rounds})")
    for _ in range(warmup):
        for call in ways.values():
            call()
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def paired_ratio(slow_s: Sequence[float], fast_s: Sequence[float]) -> Ratio:
    """slow / fast: geometric mean of the ratios within the rounds, with its 95 % interval (t, of the logarithms).

    Raises ValueError for lists of different lengths, empty ones, or seconds that are not positive.
    """
    if len(slow_s) != len(fast_s) or not slow_s:
        raise ValueError(f"as many seconds of one way as of the other are needed (got {len(slow_s)} and {len(fast_s)})")
    if min(*slow_s, *fast_s) <= 0:
        raise ValueError("seconds must be positive")
    found = paired_gain(slow_s, fast_s)
    return Ratio(found.value, found.low, found.high)


def print_table(
    title: str,
    seconds: Mapping[str, Sequence[float]],
    naive: str,
    *,
    units_per_call: float = 1.0,
    unit: str = "call",
    machine: bool = True,
) -> None:
    """The machine, the versions and this process's command line, then each way's median time and its gain over `naive`.

    `units_per_call`: how many units (samples, batches) one call handled; times are told per `unit`. `machine` False:
    the table alone, for a second table of the same program. Raises ValueError when `naive` is not among the ways.
    """
    if naive not in seconds:
        raise ValueError(f"naive: {naive!r} is not among the ways {', '.join(seconds)}")
    if machine:
        print_machine(_command_line())
    rows = [
        _row(name, times, seconds[naive], units_per_call, is_naive=name == naive) for name, times in seconds.items()
    ]
    print(f"{title}\n")
    print(table(("way", f"ms / {unit} (median)", "rounds", f"times faster than {naive} (95 %)"), rows))
    print(flush=True)


def _row(
    name: str, times: Sequence[float], naive: Sequence[float], units_per_call: float, *, is_naive: bool
) -> tuple[str, ...]:
    middle = 1e3 * statistics.median(times) / units_per_call
    return name, f"{middle:.3g}", str(len(times)), "1" if is_naive else str(paired_ratio(naive, times))


def _command_line() -> str:
    """`python -m benchmarks.NAME WORDS` where the program was started as a module, else what was typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec is not None else sys.argv[0]
    return " ".join(["python", program, *sys.argv[1:]])

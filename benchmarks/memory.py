"""Does the memory model foretell sizes it has not seen? Played on recorded ladders of micro-batch sizes.

python -m benchmarks.memory                                  # from benchmarks/grids/memory.jsonl.gz, in seconds
python -m benchmarks.memory --workload gpt2 --json
python -m benchmarks.memory --record FILE --workload gpt2    # measures what FILE lacks: about five minutes a workload

Of each ladder a study has seen one process at the smallest sizes and at one in the middle; every other size is foretold
and held against all its processes. Growth is what the process took above its imports. The model's constants are chosen
on the other workloads, never on the one reported. `seen` compares with a straight line through the same rows and with
the trace alone; `borrowed` foretells recomputing from rows without it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import print_machine, table
from benchmarks.memory_ladder import FILE, Cell, read_cells, record
from tuner.contract.config import CompileMode, Precision
from tuner.search.memory import HOST, Grown, GrowthModel, Spread, affine, affine_upper
from tuner.search.points import Variant

WORKLOADS = ("latent_cfg", "gpt2", "graph", "sd_kanji")
PLAIN = Variant(Precision.FP32, CompileMode.EAGER, False, False, False)
LEAST_GROWTH = 100_000_000
"""Cells that grow less are left out: imports and threads move them by tens of megabytes."""
CHOSEN = ("scale", "scale_sd", "local", "length", "noise")
"""Constants chosen by likelihood. The others are as shipped: how far another job's fixed part, or recomputing, may lie
from what these four show, four examples cannot tell."""
ROUNDS = 800
_MIB = 1 << 20


@dataclass(frozen=True)
class Rung:
    """One size of a ladder: its trace, and the growth of each of its processes."""

    variant: Variant
    micro: int
    live: float
    """Bytes of live tensors in the trace."""
    traced: float
    """What the model takes of it: on a host what its heap needs for them."""
    grown: tuple[float, ...]

    def row(self, repeat: int) -> Grown:
        return Grown(self.variant, self.traced, self.grown[repeat % len(self.grown)])


@dataclass(frozen=True)
class Guess:
    """One foretold cell."""

    rung: Rung
    value: float
    upper: float

    @property
    def error(self) -> float:
        """Relative to the mean of the processes."""
        return abs(self.value - self._mean) / self._mean

    @property
    def beyond(self) -> float:
        """The same beyond the spread of repeats: 0 between the least and the most that was measured."""
        low, high = min(self.rung.grown), max(self.rung.grown)
        return max(0.0, low - self.value, self.value - high) / self._mean

    @property
    def above(self) -> bool:
        """Some process grew beyond the error bar."""
        return max(self.rung.grown) > self.upper

    @property
    def _mean(self) -> float:
        return fmean(self.rung.grown)


@dataclass(frozen=True)
class Figures:
    """What came of one way to foretell, over the cells of a workload or of all."""

    workload: str
    method: str
    cells: int
    median_error: float
    max_error: float
    median_beyond: float
    max_beyond: float
    above_bar: float
    """Share of the cells in which a process grew beyond the error bar."""
    bar: float
    """Median width of the error bar above the value foretold, relative to it."""


def rungs_of(cells: Iterable[Cell], workload: str) -> list[Rung]:
    """Sizes that were both traced and measured, smallest first."""
    own = [cell for cell in cells if cell.workload == workload and cell.bytes]
    traced = {(cell.micro, cell.checkpointing): cell for cell in own if cell.kind == "trace"}
    grown: dict[tuple[int, bool], list[float]] = {}
    for cell in own:
        if cell.kind == "compute":
            grown.setdefault((cell.micro, cell.checkpointing), []).append(float(cell.bytes))
    return [
        Rung(
            PLAIN._replace(gradient_checkpointing=key[1]),
            key[0],
            live=float(traced[key].bytes),
            traced=float(traced[key].heap or traced[key].bytes),
            grown=tuple(grown[key]),
        )
        for key in sorted(grown)
        if key in traced
    ]


def seen_sizes(rungs: Sequence[Rung]) -> set[int]:
    """The smallest third of a ladder, and the middle of what is above it."""
    sizes = sorted({rung.micro for rung in rungs})
    third = math.ceil(len(sizes) / 3)
    return {*sizes[:third], sizes[(third + len(sizes)) // 2]} if len(sizes) > third else set(sizes)


Foretell = Callable[[Sequence[Rung], int, Rung], tuple[float, float]]
"""(rungs seen, which repeat of them, the rung asked for) -> growth and its upper error bar."""


def by_model(spread: Spread) -> Foretell:
    def foretell(seen: Sequence[Rung], repeat: int, asked: Rung) -> tuple[float, float]:
        found = GrowthModel([rung.row(repeat) for rung in seen], spread).predict(asked.variant, asked.traced)
        return found.value, found.upper

    return foretell


def by_line(seen: Sequence[Rung], repeat: int, asked: Rung) -> tuple[float, float]:
    same = {rung.micro: rung.row(repeat).growth for rung in seen if rung.variant == asked.variant}
    return affine(same, asked.micro), affine_upper(same, asked.micro)


def by_trace(seen: Sequence[Rung], repeat: int, asked: Rung) -> tuple[float, float]:  # noqa: ARG001
    return asked.live, asked.live


def play(rungs: Sequence[Rung], foretell: Foretell, *, borrowed: bool = False) -> Iterator[Guess]:
    """Once for each repeat that the study may have seen. `borrowed`: nothing that recomputes was measured."""
    sizes = seen_sizes(rungs)
    seen = [rung for rung in rungs if rung.micro in sizes and not (borrowed and rung.variant != PLAIN)]
    for repeat in range(max((len(rung.grown) for rung in rungs), default=0)):
        for asked in rungs:
            if asked in seen or (borrowed and asked.variant == PLAIN) or fmean(asked.grown) < LEAST_GROWTH:
                continue
            yield Guess(asked, *foretell(seen, repeat, asked))


def chosen_on(ladders: Sequence[Sequence[Rung]]) -> Spread:
    """The constants under which these ladders are likeliest (Nelder-Mead over their logarithms)."""
    from scipy.optimize import minimize

    rows = [[rung.row(repeat) for rung in rungs for repeat in range(len(rung.grown))] for rungs in ladders]

    def spread_of(logs: NDArray[np.float64]) -> Spread:
        return replace(HOST, **{name: math.exp(log) for name, log in zip(CHOSEN, logs.tolist(), strict=True)})

    def unlikely(logs: NDArray[np.float64]) -> float:
        spread = spread_of(logs)
        return -sum(GrowthModel(found, spread).log_likelihood() for found in rows)

    start = np.log([getattr(HOST, name) for name in CHOSEN])
    found = minimize(unlikely, start, method="Nelder-Mead", options={"maxfev": ROUNDS, "xatol": 0.02, "fatol": 0.05})
    return spread_of(np.asarray(found.x, dtype=np.float64))


def figures(workload: str, method: str, guesses: Sequence[Guess]) -> Figures:
    return Figures(
        *(workload, method, len({(guess.rung.variant, guess.rung.micro) for guess in guesses})),
        median_error=median(guess.error for guess in guesses),
        max_error=max(guess.error for guess in guesses),
        median_beyond=median(guess.beyond for guess in guesses),
        max_beyond=max(guess.beyond for guess in guesses),
        above_bar=fmean(guess.above for guess in guesses),
        bar=median(guess.upper / guess.value - 1 for guess in guesses),
    )


def judged(cells: Sequence[Cell], workloads: Sequence[str]) -> list[Figures]:
    """Every method on every workload, then over all of these. Constants: of the other recorded workloads."""
    ladders = {name: rungs for name in sorted({cell.workload for cell in cells}) if (rungs := rungs_of(cells, name))}
    by_method: dict[str, list[Guess]] = {}
    found = []
    for name in [name for name in workloads if name in ladders]:
        model = by_model(chosen_on([rungs for other, rungs in ladders.items() if other != name]))
        played = {
            "trace + residual": list(play(ladders[name], model)),
            "straight line": list(play(ladders[name], by_line)),
            "trace alone": list(play(ladders[name], by_trace)),
            "borrowed": list(play(ladders[name], model, borrowed=True)),
        }
        for method, guesses in played.items():
            if guesses:
                found.append(figures(name, method, guesses))
                by_method.setdefault(method, []).extend(guesses)
    return found + [figures("all", method, guesses) for method, guesses in by_method.items()]


def print_figures(found: Sequence[Figures]) -> None:
    heads = ("workload", "method", "cells", "error: median", "max", "beyond the spread: median", "max",
             "above the bar", "bar")  # fmt: skip
    rows = [
        (f.workload, f.method, f.cells,
         *(f"{100 * part:.1f} %" for part in (f.median_error, f.max_error, f.median_beyond, f.max_beyond,
                                              f.above_bar, f.bar)))
        for f in found
    ]  # fmt: skip
    print(table(heads, rows))


def print_ladder(rungs: Sequence[Rung]) -> None:
    spread = max(((max(rung.grown) - min(rung.grown)) / fmean(rung.grown) for rung in rungs), default=0.0)
    for recomputes in (False, True):
        own = [rung for rung in rungs if rung.variant.gradient_checkpointing is recomputes]
        print(f"  {'recomputing' if recomputes else 'plain':<12}" + ", ".join(_told(rung) for rung in own))
    print(f"  widest spread of repeats {100 * spread:.1f} %")


def _told(rung: Rung) -> str:
    grown = "/".join(f"{grown / _MIB:.0f}" for grown in rung.grown)
    return f"{rung.micro}: {rung.live / _MIB:.0f} ({rung.traced / _MIB:.0f}) {grown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--record", type=Path, metavar="FILE", help="measure into FILE what it lacks, then judge it")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    file: Path = words.record or FILE
    if words.record is not None:
        for name in words.workload:
            record(name, file)
    cells = read_cells(file)
    missing = [name for name in words.workload if not rungs_of(cells, name)]
    if missing:
        parser.error(f"{file} holds no ladder of {', '.join(missing)}; measure it with --record FILE")
    found = judged(cells, words.workload)
    if words.json:
        print(json.dumps([asdict(part) for part in found], indent=1))
        return
    print_machine("python -m benchmarks.memory" + (f" --record {words.record}" if words.record else ""))
    machines = sorted({f"{cell.cpu}, torch {cell.torch}" for cell in cells})
    print(f"ladders recorded on: {'; '.join(machines)}")
    print("micro-batch size: live tensors of the trace (heap they need) and growth of each process, MiB\n")
    for name in words.workload:
        print(name)
        print_ladder(rungs_of(cells, name))
    print()
    print_figures(found)


if __name__ == "__main__":
    main()

"""The decision against other searchers, on recorded grids: regret, seconds, out-of-memories; every seed is fixed.

python -m benchmarks.search --grid graph --seeds 100 --jobs 2
python -m benchmarks.search --searchers ours,tpe --json search.json
python -m benchmarks.search --kill-test 50

A search sees half of the repeats of every cell and is judged by the other half. Regret: 1 - worth / best worth, where
worth is the horizon over the total production time. Noise floor: the regret of the cell best by the search's half.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import print_machine, table
from benchmarks.replaying import Figure, Job, find_grids, in_processes, load, scenes, search, spec_of
from benchmarks.scoring import (
    LEAST_TARGET,
    P90_TARGET,
    Range,
    Scene,
    counts,
    median,
    ninth_tenth,
    ranged,
    ratio_of_medians,
    split,
    target_regret,
)
from benchmarks.searchers import SEARCHERS, SLOW, TRIALS
from tuner.contract.probe import ProbeRow
from tuner.contract.study import Objective
from tuner.probe.replay import ReplayRunner
from tuner.search.offline import run_study

CHOSEN_ON: tuple[str, ...] = ("gpt2", "graph", "latent_cfg", "sd_kanji")
"""Grids that constants of tuner/search were chosen on: shown, and never the figure."""
OURS, LEADER, RIVAL = "ours", "ours before the gate", "TPE"
HALF = 0.5
CUTS = 2
"""Random places at which each study of the kill test is cut."""


@dataclass(frozen=True)
class Summary:
    """One searcher on one grid, over the seeds."""

    searcher: str
    seeds: int
    regret: Range
    regret_p90: Range
    behind: Range
    """Median regret against the oracle that sees all of the search's half: its noise is the searcher's noise too."""
    score: float
    seconds: float
    seconds_to_2: float | None
    """Median seconds until it would have named a cell within 2 %; null = not in half of the searches."""
    seconds_to_target: float | None
    reached: float
    """Share of searches that reached the target."""
    ooms: float
    ooms_most: int
    shipped_ooms: int
    probes: float


@dataclass(frozen=True)
class Report:
    """One grid: what it is like, and every searcher on it."""

    grid: str
    cells: int
    repeats: int
    counts: bool
    why_not: str
    floor: float
    baseline: float
    unfit: float
    target: float
    summaries: tuple[Summary, ...]
    ratio: Range | None
    """Our seconds to the target over TPE's; a search of TPE that never got there counts with all its seconds."""
    whole_ratio: Range | None
    """All seconds of our search, the gate apart, over all seconds of TPE."""


def main() -> None:
    words = parse()
    grids = find_grids(words.grid)
    print_machine(f"python -m benchmarks.search {' '.join(sys.argv[1:])}".rstrip())
    if words.kill_test:
        kill_test([str(path) for path in grids], Objective(words.objective), words.kill_test, words.jobs)
        return
    names = searcher_names(words.searchers)
    reports, figures = [], []
    for path in grids:
        found = searched(path, Objective(words.objective), names, words)
        reports.append(report(path, Objective(words.objective), words.seeds, found))
        figures += found
        print(text_of(reports[-1]), flush=True)
    print(verdict(reports))
    if words.json:
        told = {"chosen_on": CHOSEN_ON, "grids": reports, "searches": figures}
        Path(words.json).write_text(json.dumps(told, default=_fields, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", nargs="+", default=[], help="names in benchmarks/grids, or files; all by default")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--gp-seeds", type=int, default=20, help="of the GP, which takes ten seconds a search")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--searchers", default=",".join(SEARCHERS), help="words, comma-separated: %(default)s")
    parser.add_argument("--objective", choices=("time", "throughput"), default="time")
    parser.add_argument("--json", help="also write every search here")
    parser.add_argument("--kill-test", type=int, default=0, metavar="N", help="only this: cut N studies and go on")
    words = parser.parse_args()
    for option in ("seeds", "gp_seeds", "jobs"):
        if getattr(words, option) < 1:
            parser.error(f"--{option.replace('_', '-')}: at least 1 (got {getattr(words, option)})")
    return words


def searcher_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SEARCHERS]
    if unknown or not names:
        raise SystemExit(f"--searchers: unknown {', '.join(unknown) or '(none given)'}; known: {', '.join(SEARCHERS)}")
    return names


def searched(path: Path, objective: Objective, names: Sequence[str], words: argparse.Namespace) -> list[Figure]:
    """Every search on one grid; the slow ones first, so that no process is left with a long one at the end."""
    order = sorted(names, key=lambda name: name not in SLOW)
    jobs = [
        Job(str(path), objective, name, seed)
        for name in order
        for seed in range(min(words.seeds, words.gp_seeds) if name in SLOW else words.seeds)
    ]
    return [figure for found in in_processes(search, jobs, words.jobs, path.name) for figure in found]


def report(path: Path, objective: Objective, seeds: int, figures: Sequence[Figure]) -> Report:
    grid = load(str(path))
    around = scenes(str(path), objective, seeds)
    target = target_regret(around)
    by_name = {name: [f for f in figures if f.searcher == name] for name in dict.fromkeys(f.searcher for f in figures)}
    good, why_not = counts(around)
    return Report(
        grid=grid.name,
        cells=len(grid.cells),
        repeats=len(grid.repeats),
        counts=good,
        why_not=why_not,
        floor=middle([s.floor for s in around]),
        baseline=middle([s.baseline for s in around]),
        unfit=around[0].unfit,
        target=target,
        summaries=tuple(summary(name, found, target, around) for name, found in by_name.items()),
        ratio=_ratio(by_name, target),
        whole_ratio=_whole_ratio(by_name),
    )


def middle(values: Sequence[float]) -> float:
    return float(np.median(values))


def summary(name: str, figures: Sequence[Figure], target: float, around: Sequence[Scene]) -> Summary:
    regrets = [f.regret for f in figures]
    reached = [f.seconds_to(target) for f in figures]
    return Summary(
        searcher=name,
        seeds=len(figures),
        regret=ranged(regrets, median),
        regret_p90=ranged(regrets, ninth_tenth),
        behind=ranged([1 - (1 - f.regret) / (1 - around[f.seed].floor) for f in figures], median),
        score=middle([f.score for f in figures]),
        seconds=middle([f.seconds for f in figures]),
        seconds_to_2=_typical([f.seconds_to(LEAST_TARGET) for f in figures]),
        seconds_to_target=_typical(reached),
        reached=sum(seconds is not None for seconds in reached) / len(reached),
        ooms=middle([f.ooms for f in figures]),
        ooms_most=max(f.ooms for f in figures),
        shipped_ooms=sum(f.overflows for f in figures),
        probes=middle([f.probes for f in figures]),
    )


def _typical(seconds: Sequence[float | None]) -> float | None:
    """The median, with what was never reached beyond any other."""
    value = float(median(np.asarray([math.inf if s is None else s for s in seconds])))
    return value if math.isfinite(value) else None


def _ratio(by_name: dict[str, list[Figure]], target: float) -> Range | None:
    if LEADER not in by_name or RIVAL not in by_name:
        return None
    own = [math.inf if (s := f.seconds_to(target)) is None else s for f in by_name[LEADER]]
    other = [f.seconds if (s := f.seconds_to(target)) is None else s for f in by_name[RIVAL]]
    return ratio_of_medians(own, other)


def _whole_ratio(by_name: dict[str, list[Figure]]) -> Range | None:
    if LEADER not in by_name or RIVAL not in by_name:
        return None
    return ratio_of_medians([f.seconds for f in by_name[LEADER]], [f.seconds for f in by_name[RIVAL]])


def text_of(found: Report) -> str:
    heads = (
        "searcher", "seeds", "regret, median", "regret, p90", "behind the oracle", "score", "search s",
        "s to within 2 %", f"s to {100 * found.target:.1f} %", "reached", "OOMs (most)", "shipped OOM", "probes",
    )  # fmt: skip
    rows = [
        (
            s.searcher, s.seeds, s.regret.percent(), s.regret_p90.percent(), s.behind.percent(), f"{s.score:.2f}",
            f"{s.seconds:.0f}", _seconds(s.seconds_to_2), _seconds(s.seconds_to_target), f"{s.reached:.0%}",
            f"{s.ooms:g} ({s.ooms_most})", s.shipped_ooms, f"{s.probes:g}",
        )
        for s in found.summaries
    ]  # fmt: skip
    held = "" if found.counts else f"\nThis grid does not count: {found.why_not}."
    return (
        f"## {found.grid}\n\n{found.cells} cells x {found.repeats} repeats; {found.unfit:.0%} do not fit; the "
        f"baseline's regret {100 * found.baseline:.1f} %; noise floor {100 * found.floor:.1f} %; target "
        f"{100 * found.target:.1f} %.{held}\n\n{table(heads, rows)}\n{_ratios(found)}"
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _ratios(found: Report) -> str:
    if found.ratio is None or found.whole_ratio is None:
        return ""
    near, whole = found.ratio, found.whole_ratio
    reached = "never" if math.isinf(near.value) else f"{near.value:.2f} ({near.low:.2f}-{near.high:.2f})"
    return (
        f"\nOur seconds over those of TPE with {TRIALS} trials, medians: to the target {reached}; the whole search, "
        f"the gate apart, {whole.value:.2f} ({whole.low:.2f}-{whole.high:.2f}).\n"
    )


def verdict(reports: Sequence[Report]) -> str:
    """The goals, by the grids that no constant was chosen on."""
    heads = ("grid", "regret, median", "goal", "p90", "goal", "seconds / TPE's", "goal", "OOMs", "shipped OOM", "goal")
    rows = [_judged(found, own) for found in reports if (own := _of(found, OURS)) is not None]
    if not rows:
        return ""
    where = ", ".join(CHOSEN_ON) or "none of the grids"
    return f"## Goals\n\nConstants of the search were chosen on: {where}.\n\n{table(heads, rows)}\n"


def _of(found: Report, name: str) -> Summary | None:
    return next((s for s in found.summaries if s.searcher == name), None)


def _judged(found: Report, own: Summary) -> tuple[object, ...]:
    notes = ["does not count"] * (not found.counts) + ["constants chosen here"] * (found.grid in CHOSEN_ON)
    name = f"{found.grid} ({', '.join(notes)})" if notes else found.grid
    ratio = found.ratio.value if found.ratio is not None else None
    goals = (
        _met(own.regret.value <= found.target, f"<= {100 * found.target:.1f} %"),
        _met(own.regret_p90.value <= P90_TARGET, f"<= {100 * P90_TARGET:.0f} %"),
        "-" if ratio is None else _met(ratio <= HALF, f"<= {HALF:g}"),
        _met(own.ooms == 0 and own.shipped_ooms == 0, "0 and 0"),
    )
    regret, tail, seconds, memory = goals if found.counts else ("-",) * len(goals)
    faster = "-" if ratio is None else f"{ratio:.2f}"
    return (
        name, own.regret.percent(), regret, own.regret_p90.percent(), tail, faster, seconds,
        f"{own.ooms:g} ({own.ooms_most})", own.shipped_ooms, memory,
    )  # fmt: skip


def _met(holds: bool, goal: str) -> str:
    return f"{goal}: {'met' if holds else 'MISSED'}"


def kill_test(paths: Sequence[str], objective: Objective, number: int, jobs: int) -> None:
    """Studies cut at random borders between probes and gone on with: the store keeps a reply whole or not at all."""
    items = [Job(paths[seed % len(paths)], objective, OURS, seed) for seed in range(number)]
    same = sum(in_processes(survives, items, jobs, "studies"))
    print(f"decision and rows after a kill at {CUTS} random points of each study: {same} of {number} identical")
    if same != number:
        raise SystemExit(1)


def survives(job: Job) -> bool:
    """Does a study that goes on from its first rows come to the same rows and the same decision?"""
    grid = load(job.grid)
    spec, seen = spec_of(grid, job.objective), split(grid, job.seed).search
    rows, decision = run_study(spec, ReplayRunner(grid, seed=job.seed, repeats=seen))
    for cut in cuts(rows, job.seed):
        runner = ReplayRunner(grid, seed=job.seed, repeats=seen)
        runner.remember(rows[:cut])
        again = run_study(spec, runner, rows[:cut])
        if again != (rows, decision):
            return False
    return True


def cuts(rows: Sequence[ProbeRow], seed: int) -> list[int]:
    """Random numbers of rows after which a request had just ended."""
    borders = [0, *(place for place in range(1, len(rows)) if rows[place].request_id != rows[place - 1].request_id)]
    return [int(cut) for cut in np.random.default_rng([seed, 4]).choice(borders, size=CUTS)]


def _fields(value: Any) -> Any:
    if isinstance(value, Range) and math.isinf(value.high):
        return {"value": None if math.isinf(value.value) else value.value, "low": None, "high": None}
    return dataclasses.asdict(value)


if __name__ == "__main__":
    main()

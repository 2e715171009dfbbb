"""Searches replayed on recorded grids, many at a time: the grids there are, one search scored, a pool of processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from benchmarks.scoring import Scale, Scene, Split, scene, split
from benchmarks.searchers import SEARCHERS, Course, Trail
from tuner.contract.study import Objective, StudySpec
from tuner.probe.replay import Grid, ReplayRunner

FOLDER = Path(__file__).parent / "grids"
ENDING = ".jsonl.gz"
TOLD_EVERY_S = 10.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Job:
    """One search to replay."""

    grid: str
    """Path of the recording."""
    objective: Objective
    searcher: str
    seed: int


@dataclass(frozen=True)
class Figure:
    """What one search came to, judged by the repeats it did not see."""

    grid: str
    searcher: str
    seed: int
    chosen: str
    regret: float
    score: float
    overflows: bool
    """It named a configuration that does not fit."""
    seconds: float
    ooms: int
    probes: int
    path: tuple[tuple[float, float], ...]
    """After so many seconds: the regret of what it would have named."""

    def seconds_to(self, regret: float) -> float | None:
        """Seconds until what it would have named was first this good; None = never."""
        return next((seconds for seconds, reached in self.path if reached <= regret), None)


def find_grids(names: Sequence[str]) -> list[Path]:
    """Recordings by name or by path; all of benchmarks/grids without names. Raises SystemExit when one is missing."""
    found = {path.name.removesuffix(ENDING): path for path in sorted(FOLDER.glob(f"*{ENDING}"))}
    if not names and not found:
        raise SystemExit(f"--grid: no recording in {FOLDER}; make one: python -m benchmarks.grids.record NAME")
    missing = [name for name in names if name not in found and not Path(name).is_file()]
    if missing:
        known = ", ".join(found) or "none"
        raise SystemExit(f"--grid: no recording {', '.join(missing)}; known: {known}; or give the path of a file")
    return [found.get(name, Path(name)) for name in names] or list(found.values())


@cache
def load(path: str) -> Grid:
    return Grid.load(Path(path))


def spec_of(grid: Grid, objective: Objective) -> StudySpec:
    return grid.spec.model_copy(update={"objective": objective})


@cache
def scale(path: str, objective: Objective, repeats: tuple[int, ...]) -> Scale:
    grid = load(path)
    return Scale(grid, spec_of(grid, objective), repeats)


def scenes(path: str, objective: Objective, seeds: int) -> list[Scene]:
    """What holds at each seed's split, whoever searches."""
    grid = load(path)
    spec = spec_of(grid, objective)
    known: dict[Split, Scene] = {}
    for halves in (split(grid, seed) for seed in range(seeds)):
        if halves not in known:
            known[halves] = scene(grid, spec, halves)
    return [known[split(grid, seed)] for seed in range(seeds)]


def search(job: Job) -> list[Figure]:
    """Run one search on its half of the repeats, score it on the other."""
    grid = load(job.grid)
    halves = split(grid, job.seed)
    course = Course(
        spec=spec_of(grid, job.objective),
        cells=tuple(grid.cells),
        runner=ReplayRunner(grid, seed=job.seed, repeats=halves.search),
        seed=job.seed,
    )
    judge = scale(job.grid, job.objective, halves.held_back)
    return [figure(grid.name, course, trail, judge) for trail in SEARCHERS[job.searcher](course)]


def figure(grid: str, course: Course, trail: Trail, judge: Scale) -> Figure:
    regret = judge.regret(trail.chosen)
    return Figure(
        grid=grid,
        searcher=trail.searcher,
        seed=course.seed,
        chosen=course.spec.label(trail.chosen),
        regret=regret,
        score=judge.score(regret),
        overflows=judge.overflows(trail.chosen),
        seconds=trail.seconds,
        ooms=trail.ooms,
        probes=trail.probes,
        path=tuple((seconds, judge.regret(config)) for seconds, config in trail.steps),
    )


def in_processes(work: Callable[[_Item], _Result], items: Sequence[_Item], jobs: int, what: str) -> list[_Result]:
    """`work` on every item, in the items' order; progress on stderr. `work` must be a function of a module."""
    if jobs == 1:
        return [_told(work(item), place, len(items), what) for place, item in enumerate(items, start=1)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has one core
    began, told = time.monotonic(), 0.0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, item) for item in items]
        for done, _ in enumerate(as_completed(futures), start=1):
            spent = time.monotonic() - began
            if spent - told >= TOLD_EVERY_S or done == len(items):
                print(f"{what}: {done} of {len(items)} after {spent:.0f} s", file=sys.stderr, flush=True)
                told = spent
        return [future.result() for future in futures]


def _told(result: _Result, done: int, total: int, what: str) -> _Result:
    if done == total or done % 10 == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
    return result

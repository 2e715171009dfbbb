"""A/A: the baseline tuned against itself must come out as "no gain". Replayed by the thousand, and live.

python -m benchmarks.aa --grid graph --searches 1000 --jobs 2
python -m benchmarks.aa --searches 0 --live 10 --workload latent_cfg

Beside it: what a tuner would claim that ships the best single figure of its search.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import Called, print_machine, table, tuner
from benchmarks.replaying import find_grids, in_processes, load
from tuner.probe.replay import ReplayRunner
from tuner.search.offline import run_study

GOAL = 0.05
CLAIMED = 0.01
"""A single figure this much above the baseline's would be claimed as a gain."""


@dataclass(frozen=True)
class Search:
    """One replayed A/A search."""

    grid: str
    seed: int
    decision: str
    gain: float | None
    """What the ship gate measured; the truth is 1."""
    best: float
    """The best figure of the search over the baseline's own there: what picking the maximum would claim."""
    seconds: float


@dataclass(frozen=True)
class Item:
    grid: str
    seed: int


def main() -> None:
    words = parse()
    print_machine(f"python -m benchmarks.aa {' '.join(sys.argv[1:])}".rstrip())
    found: list[Search] = []
    if words.searches:
        paths = [str(path) for path in find_grids(words.grid)]
        items = [Item(paths[number % len(paths)], number) for number in range(words.searches)]
        found = in_processes(replayed, items, words.jobs, "A/A searches")
        print(text_of(found))
    real = live(words) if words.live else []
    if real:
        print(f"live: {counted(real)}")
    if words.json:
        told = json.dumps({"searches": found, "live": real}, default=dataclasses.asdict, indent=1)
        Path(words.json).write_text(told + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", nargs="+", default=[], help="names in benchmarks/grids, or files; all by default")
    parser.add_argument("--searches", type=int, default=1000, help="replayed, over all grids together; 0 = none")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--live", type=int, default=0, help="so many real ones: tuner optimize --aa")
    parser.add_argument("--workload", default="latent_cfg", help="of the live ones")
    parser.add_argument("--preset", default="tiny", help="of the live ones")
    parser.add_argument("--gpu", default="cpu", help="of the live ones")
    parser.add_argument("--budget", default="120s", help="of each live one's search")
    parser.add_argument("--json", help="also write every result here")
    words = parser.parse_args()
    for option, least in (("searches", 0), ("live", 0), ("jobs", 1)):
        if getattr(words, option) < least:
            parser.error(f"--{option}: at least {least} (got {getattr(words, option)})")
    return words


def replayed(item: Item) -> Search:
    """A whole study on a runner that answers everything with the baseline's recorded noise."""
    grid = load(item.grid)
    runner = ReplayRunner(grid, seed=item.seed, repeats=tuple(grid.repeats), only_baseline=True)
    rows, decision = run_study(grid.spec, runner)
    return Search(
        grid=grid.name,
        seed=item.seed,
        decision=decision.kind,
        gain=decision.gain.value if decision.gain is not None else None,
        best=decision.search_maximum or 1.0,
        seconds=sum(row.seconds for row in rows),
    )


def text_of(found: Sequence[Search]) -> str:
    heads = (
        "grid", "searches", "false gains", "95 % upper bound", "claims of the search's maximum",
        "its median claim", "gate's gain, median",
    )  # fmt: skip
    names = list(dict.fromkeys(search.grid for search in found))
    groups = [(name, [search for search in found if search.grid == name]) for name in names]
    rows = [_row(name, group) for name, group in [*groups, ("all", list(found))]]
    bound = upper_bound(_false(found), len(found))
    goal = f"Goal: the bound at most {GOAL:.0%}: {'met' if bound <= GOAL else 'MISSED'}."
    failed = sum(search.decision == "failed" for search in found)
    return f"{table(heads, rows)}\n\n{goal}" + (f" {failed} searches failed." if failed else "") + "\n"


def _row(name: str, group: Sequence[Search]) -> tuple[object, ...]:
    claims = sum(search.best > 1 + CLAIMED for search in group)
    gains = [search.gain for search in group if search.gain is not None]
    return (
        name,
        len(group),
        _false(group),
        f"{100 * upper_bound(_false(group), len(group)):.2f} %",
        f"{claims / len(group):.0%}",
        f"{statistics.median(search.best for search in group):.3f}x",
        f"{statistics.median(gains):.3f}x" if gains else "-",
    )


def _false(found: Sequence[Search]) -> int:
    return sum(search.decision == "winner" for search in found)


def upper_bound(events: int, tries: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of a probability (Clopper and Pearson, Biometrika 26, 1934); 1 where nothing was tried."""
    from scipy.stats import beta

    if events >= tries:
        return 1.0
    bound = float(beta.ppf(confidence, events + 1, tries - events))
    assert math.isfinite(bound)
    return bound


def live(words: argparse.Namespace) -> list[Search]:
    """Real A/A studies, each with a store of its own."""
    found = []
    for number in range(words.live):
        with tempfile.TemporaryDirectory(prefix="tuner-aa-") as folder:
            called = tuner(
                "optimize", "--aa", "--workload", words.workload, "--preset", words.preset, "--gpu", words.gpu,
                "--budget", words.budget, "--seed", str(number), "--json",
                "--storage", f"sqlite:///{folder}/studies.db",
            )  # fmt: skip
        if not called.result:
            raise SystemExit(f"live search {number + 1} gave no result (exit code {called.code}):\n{called.log}")
        found.append(as_search(words.workload, number, called))
        gain = "nothing was compared" if found[-1].gain is None else f"compared: {found[-1].gain:.3f}x"
        told = f"live {number + 1} of {words.live}: {found[-1].decision}, {gain}, {called.seconds:.0f} s"
        print(told, file=sys.stderr, flush=True)
    return found


def as_search(workload: str, seed: int, called: Called) -> Search:
    """The same figures, from what `tuner optimize --aa --json` told."""
    gain, told = called.result["gain"], called.result["aa"] or {}
    return Search(
        grid=workload,
        seed=seed,
        decision=str(called.result["decision"]),
        gain=None if gain is None else float(gain["value"]),
        best=float(told.get("search_maximum") or 1.0),
        seconds=called.seconds,
    )


def counted(found: Sequence[Search]) -> str:
    wins, failed = _false(found), sum(search.decision == "failed" for search in found)
    claims = sum(search.best > 1 + CLAIMED for search in found)
    compared = sum(search.gain is not None for search in found)
    return (
        f"{wins} false gains in {len(found)}, of which {compared} came to a comparison (95 % upper bound "
        f"{100 * upper_bound(wins, compared):.0f} % of those), {failed} failed; the maximum of the search would "
        f"have claimed {claims}"
    )


if __name__ == "__main__":
    main()

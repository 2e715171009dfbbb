"""What training loops cost: the tuner's against a bare PyTorch loop, other trainers, and each workload's own peer.

python -m benchmarks.loops                               # everything that is installed: about half an hour
python -m benchmarks.loops --only null --rounds 10
python -m benchmarks.loops --only peers --case gpt2 --json loops.json

Contenders take turns block by block (see `loops_pace`). A ratio is formed within each round; told are the median and a
95 % bootstrap interval, of the seconds on the wall and of those of the CPU. The others come with
`pip install -e .[benchmarks] -c constraints.txt`; one that is missing is told and left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import loops_null, loops_peers
from benchmarks.loops_pace import SAME_WEIGHTS, Contender, Find, Job, Times, installed, measure, ratio_to
from benchmarks.machine import print_machine, table
from benchmarks.ratio import Ratio

NULL_STEPS, PEER_STEPS = 1000, 8
GOAL = 1.05


@dataclass(frozen=True)
class Race:
    """Contenders of one case; every ratio is to `base`."""

    title: str
    case: str
    find: Find
    contenders: Mapping[str, Contender]
    base: str
    ours: str
    steps: int


def races(only: str, cases: list[str], steps: int | None) -> list[Race]:
    null, peer = steps or NULL_STEPS, steps or PEER_STEPS
    own, features = loops_null.CONTENDERS, loops_null.FEATURES
    known = [
        *(
            Race(f"null model, {case}", case, loops_null.find, own, loops_null.BARE, loops_null.OURS, null)
            for case in loops_null.CASES
        ),
        Race(
            "what the engine's features cost",
            loops_null.GOAL_CASE,
            loops_null.find_feature,
            features,
            loops_null.BARE,
            "no hooks",
            null,
        ),
    ]
    if only == "null":
        known = known[: len(loops_null.CASES)]
    elif only == "features":
        known = known[len(loops_null.CASES) :]
    elif only == "peers":
        known = []
    if only in ("", "peers"):
        known += [
            Race(f"{case} and its peer", case, loops_peers.find, own, loops_peers.BARE, loops_peers.OURS, peer)
            for case, own in loops_peers.PEERS.items()
        ]
    return [race for race in known if not cases or race.case in cases]


def main() -> None:
    words = parse()
    print_machine(" ".join(["python -m benchmarks.loops", *sys.argv[1:]]))
    found = [run(race, words.rounds, words.sets) for race in races(words.only, words.case, words.steps)]
    if words.json:
        Path(words.json).write_text(json.dumps(found, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("null", "features", "peers"), default="")
    cases = (*loops_null.CASES, *loops_peers.PEERS)
    parser.add_argument("--case", action="append", default=[], choices=cases, help="repeatable; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="measured blocks of each process")
    parser.add_argument("--sets", type=int, default=3, help="how many times all processes are started anew")
    parser.add_argument("--steps", type=int, help=f"steps in a block (default {NULL_STEPS}, of peers {PEER_STEPS})")
    parser.add_argument("--json", help="also write all blocks here")
    words = parser.parse_args()
    if min(words.rounds, words.sets, words.steps or 1) < 1:
        parser.error("--rounds, --sets and --steps must be at least 1")
    return words


def run(race: Race, rounds: int, sets: int) -> dict[str, object]:
    """Measure one race and print its table; returns what --json writes of it."""
    ready = {name: one for name, one in race.contenders.items() if not one.missing}
    jobs = {name: Job(race.case, name, race.steps, rounds) for name in ready}
    times = measure(race.find, jobs, sets)
    print(f"{race.title}: {sets} sets of processes, {rounds} rounds of {race.steps} steps\n")
    print(table(("loop", "µs / step", f"x {race.base} (95 %)", "of the CPU's time"), rows(race, times)))
    for name, one in race.contenders.items():
        if one.missing:
            print(f"{name}: not run: {one.missing}")
    others = sorted({need for one in ready.values() for need in one.needs})
    print(f"\n{verdict(race, times)}")
    print("with " + ", ".join(f"{name} {installed(name)}" for name in others) + "\n" if others else "", flush=True)
    blocks = {name: [[asdict(block) for block in one] for one in found] for name, found in times.blocks.items()}
    return {"case": race.case, "title": race.title, "steps": race.steps, "blocks": blocks, "weights": times.weights}


def rows(race: Race, times: Times) -> list[tuple[str, ...]]:
    made: list[tuple[str, ...]] = []
    for name in times.blocks:
        middle = statistics.median(value for one in walls(times, name) for value in one)
        is_base = name == race.base
        ratios = (
            ("1", "1")
            if is_base
            else (shown(wall_ratio(times, name, race.base)), shown(cpu_ratio(times, name, race.base)))
        )
        made.append((name, f"{1e6 * middle / race.steps:.4g}", *ratios))
    return made


def shown(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"


def walls(times: Times, name: str) -> list[list[float]]:
    return [[block.wall_s for block in one] for one in times.blocks[name]]


def wall_ratio(times: Times, name: str, base: str) -> Ratio:
    return ratio_to(walls(times, name), walls(times, base))


def cpu_ratio(times: Times, name: str, base: str) -> Ratio:
    cpu = [[[block.cpu_s for block in one] for one in times.blocks[which]] for which in (name, base)]
    return ratio_to(*cpu)


def verdict(race: Race, times: Times) -> str:
    """Is ours the fastest of the trainers, and did all train the same?"""
    peers = [name for name in times.blocks if race.contenders[name].needs]
    lines = [
        f"{race.ours} to {name}: {shown(wall_ratio(times, race.ours, name))}, "
        f"of the CPU's time {shown(cpu_ratio(times, race.ours, name))}"
        for name in peers
    ]
    return "\n".join([*lines, same_training(race, times)])


def same_training(race: Race, times: Times) -> str:
    """The contenders that saw the same batches must end with the same weights."""
    weights = {name: value for name, value in times.weights.items() if race.contenders[name].same_data}
    base = times.weights[race.base]
    apart = {name: abs(value / base - 1) for name, value in weights.items()}
    if race.case.startswith("loader"):
        return "weights are not compared: every loader shuffles in its own way"
    wrong = [f"{name} {value:.1e}" for name, value in apart.items() if value > SAME_WEIGHTS]
    if wrong:
        return f"NOT THE SAME TRAINING: weights end apart (relative): {', '.join(wrong)}"
    return f"all end with the same weights, within {max(apart.values()):.0e} (relative)"


if __name__ == "__main__":
    main()

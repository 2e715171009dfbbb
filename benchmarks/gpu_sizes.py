"""Part 8: the batch that Lightning's and accelerate's rules find, on this device, against what the tuner ships.

The rules are restated in `benchmarks.searchers` and measured live; then both configurations run in turn, in fresh
processes, and the ratio is formed within each round.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check import LEAST_S, Check, Finding, Status, Table, worth_doing
from benchmarks.gpu_studies import Studied, studied
from benchmarks.gpu_tuned import plain, spread
from benchmarks.searchers import Course, Trail, doubling, halving
from tuner.commands import setup
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRunner, Stage
from tuner.contract.space import Knob, grid
from tuner.contract.statistics import paired_gain, throughput
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner
from tuner.search.requests import limits_for

RULES = {"Lightning": doubling, "accelerate": halving}
LEAST_ROUNDS, MOST_ROUNDS = 2, 8
USEFUL_S = 30.0
"""With less for a workload, fewer have a turn."""


def sizes(check: Check) -> Finding:
    known = check.data_of(2).get("workloads", {})
    ready = [name for name in check.workloads if known.get(name, {}).get("finished")]
    if not ready:
        return Finding(Status.NOT_RUN, notes=("part 2 has finished no study to compare with yet",))
    data: dict[str, Any] = dict(check.before.get("workloads", {}))
    names = worth_doing(ready, data, check.clock.turn_s, USEFUL_S)
    folder = setup.cache_dir()
    with SubprocessRunner(folder, log_dir=check.work / "logs", trust=ANY_CODE) as runner:
        for place, name in enumerate(names):
            share_s = check.clock.turn_s / (len(names) - place)
            state = studied(check, known[name]["study"])
            if state is None or share_s < LEAST_S:
                continue
            data[name] = compare(state, runner, folder=str(folder), share_s=share_s)
    heads = ("workload", "rule", "it names", "probes", "seconds", "OOM", "ours", "ours over it (interval)", "rounds")
    notes = [f"{name}: not run: no finished study, or no time left" for name in check.workloads if name not in data]
    notes.append("the rules keep the effective batch here, so it bounds them; the tools themselves would change it")
    rows = tuple(row for name, item in data.items() for row in as_rows(name, item))
    status = Status.DONE if check.is_whole(data) else Status.PARTIAL if data else Status.FAILED
    return Finding(status, (Table("sizes found by others", heads, rows),), {"workloads": data}, tuple(notes))


def compare(state: Studied, runner: ProbeRunner, *, folder: str, share_s: float) -> dict[str, Any]:
    """Both rules, then ours against each configuration that they name."""
    spec = state.spec
    cached = Cached(runner, folder)
    cells = tuple(grid(spec.space, spec.baseline, (Knob.MICRO_BATCH_SIZE,)))
    trails = {name: rule(Course(spec, cells, cached, 0))[0] for name, rule in RULES.items()}
    ours = state.decision.winner.config if state.decision.winner is not None else spec.baseline
    rivals = {trail.chosen.digest(): trail.chosen for trail in trails.values()}
    spent = sum(trail.seconds for trail in trails.values())
    against = {
        digest: duel(state, cached, ours, config, (share_s - spent) / len(rivals)) for digest, config in rivals.items()
    }
    return {name: told(state, trail, ours, against[trail.chosen.digest()]) for name, trail in trails.items()}


class Cached:
    """A runner whose requests find the prepared data."""

    def __init__(self, inner: ProbeRunner, folder: str) -> None:
        self._inner = inner
        self._folder = folder

    def run(self, request: ProbeRequest, listener: Any = None) -> Any:
        return self._inner.run(request.model_copy(update={"cache_dir": self._folder}), listener)

    def close(self) -> None:
        self._inner.close()


def duel(state: Studied, runner: ProbeRunner, ours: RunConfig, other: RunConfig, share_s: float) -> list[list[float]]:
    """Samples/s of both, round by round, the order turning; as many rounds as the time allows, at least two.

    Nothing is measured where both are the same.
    """
    rates: list[list[float]] = [[], []]
    if ours == other:
        return rates
    spent = 0.0
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and spent * (number + 1) / number > share_s:
            break
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            seconds, rate = one(state, runner, (ours, other)[side], f"{number}-{side}")
            spent += seconds
            rates[side].append(rate)
    both = [pair for pair in zip(*rates, strict=True) if min(pair) > 0]
    return [list(side) for side in zip(*both, strict=True)] or [[], []]


def one(state: Studied, runner: ProbeRunner, config: RunConfig, place: str) -> tuple[float, float]:
    """Seconds of the probe, and samples/s; 0 where it did not run."""
    request = ProbeRequest(
        id=f"duel-{config.digest()}-{place}",
        kind=ProbeKind.END_TO_END,
        stage=Stage.GATE,
        workload=config.workload,
        options=config.options,
        points=(config,),
        limits=limits_for(state.spec, ProbeKind.END_TO_END, Stage.GATE),
        device=state.spec.device.kind,
    )
    reply = runner.run(request)
    point = reply.points[0]
    good = point.outcome is Outcome.OK and point.measurement is not None
    return reply.seconds, throughput(point.measurement).value if good and point.measurement is not None else 0.0


def told(state: Studied, trail: Trail, ours: RunConfig, rates: list[list[float]]) -> dict[str, Any]:
    gain = paired_gain(rates[0], rates[1]) if rates[0] else None
    return {
        "chosen": state.spec.label(trail.chosen),
        "probes": trail.probes,
        "seconds": trail.seconds,
        "ooms": trail.ooms,
        "ours": state.spec.label(ours),
        "same": trail.chosen == ours,
        "gain": plain(gain),
        "rounds": len(rates[0]),
    }


def as_rows(name: str, data: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    for rule, item in data.items():
        gain = "the same configuration" if item["same"] else spread(item["gain"], 3)
        yield (
            name, rule, item["chosen"], item["probes"], f"{item['seconds']:.0f}", item["ooms"], item["ours"], gain,
            item["rounds"],
        )  # fmt: skip

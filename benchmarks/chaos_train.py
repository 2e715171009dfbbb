"""Production runs that are killed again and again must end as the run that nobody touched, bit for bit.

python -m benchmarks.chaos_train --kills 200 --flips 300
python -m benchmarks.chaos_train --workloads gpt2 --kills 20 --json chaos.json   # goes on where that file ends

Each workload at its tiny size: a run that is left alone, then runs that are killed (-9, or SIGTERM) at random moments,
some within microseconds of a checkpoint being written, and started again by the same request until they are finished.
After every kill the checkpoints are read back. Then single bits of a checkpoint's files are flipped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.chaos_blows import BLOWS, Blow, Moments, Striker
from benchmarks.chaos_judging import differences, flips_found, unloadable
from benchmarks.machine import print_machine, table
from tuner.commands.setup import cache_dir
from tuner.contract.config import Cadence, LoaderConfig, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import DescribeEvent, Event, ProbeKind, ProbeReply, ProbeRequest, Stage, TrainPlan
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner

WORKLOADS = ("sd_kanji", "latent_cfg", "gpt2", "graph")
WORKERS = {"gpt2": 2, "graph": 2}
"""Loader workers; 0 for the others."""
LOG_STEPS, CHECKPOINT_STEPS = 3, 4
"""Lines of the log and checkpoints fall together at every twelfth step alone."""
EVALUATIONS = {"sd_kanji": 0}
"""In a whole run, where they are not 2: one of sd_kanji takes longer than all its steps here."""


@dataclass
class Tally:
    """What became of one workload, kept in --json after every blow."""

    workload: str
    steps: int
    kills: dict[str, int] = field(default_factory=dict)
    """Blow -> how often it struck a run that had not ended."""
    missed: int = 0
    runs: int = 0
    mismatches: list[str] = field(default_factory=list)
    unloadable: list[str] = field(default_factory=list)
    flips: int = 0
    found: int = 0
    seconds: float = 0.0

    @property
    def struck(self) -> int:
        return sum(self.kills.values())


@dataclass(frozen=True)
class Job:
    """One workload's short run."""

    config: RunConfig
    background: bool

    def request(self, out: Path) -> ProbeRequest:
        plan = TrainPlan(out_dir=str(out), reference_every_s=1e6, background_checkpoints=self.background)
        return ProbeRequest(
            id="chaos",
            kind=ProbeKind.TRAIN,
            stage=Stage.PRODUCTION,
            workload=self.config.workload,
            options=self.config.options,
            points=(self.config,),
            cache_dir=str(cache_dir()),
            device="cpu",
            train=plan,
        )


def main() -> None:
    words = parse()
    print_machine(f"python -m benchmarks.chaos_train {' '.join(sys.argv[1:])}".rstrip())
    tallies = earlier(words.json, words.steps)
    until = time.monotonic() + words.seconds if words.seconds else None
    with tempfile.TemporaryDirectory(prefix="tuner-chaos-") as folder:
        for number, name in enumerate(words.workloads):
            if until is not None and time.monotonic() >= until:
                break
            tally = tallies.setdefault(name, Tally(name, words.steps))
            share = len(words.workloads)
            for _ in attack(
                tally,
                Path(folder) / name.replace(":", "_"),
                kills=_part(words.kills, number, share),
                flips=_part(words.flips, number, share),
                chance=random.Random(f"{words.seed} {name} {tally.struck}"),
                background=words.background_checkpoints,
            ):
                keep(words.json, tallies)
                if until is not None and time.monotonic() >= until:
                    break
    shown = [tallies[name] for name in words.workloads if name in tallies]
    print(text_of(shown))
    sys.exit(any(tally.mismatches or tally.unloadable or tally.found < tally.flips for tally in shown))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--kills", type=int, default=200, help="that strike, over all workloads")
    parser.add_argument("--flips", type=int, default=300, help="single bits, over all workloads")
    parser.add_argument("--steps", type=int, default=36, help="of each run")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after this time; 0 = when all is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--background-checkpoints", action="store_true", help="write checkpoints beside the training")
    parser.add_argument("--json", help="keep the counts here, and go on from them")
    return parser.parse_args()


def attack(
    tally: Tally, folder: Path, *, kills: int, flips: int, chance: random.Random, background: bool
) -> Iterator[None]:
    """Until `kills` have struck and `flips` bits were flipped; yields after everything that was counted."""
    if tally.struck >= kills and tally.flips >= flips:
        return
    with SubprocessRunner(cache_dir(), log_dir=folder / "logs", trust=ANY_CODE) as runner:
        config = short_run(tally.workload, tally.steps, runner, EVALUATIONS.get(tally.workload, 2))
        job = Job(config, background)
        moments = Moments()
        whole = folder / "whole"
        reply = runner.run(job.request(whole), moments)
        if reply.train_result is None:
            raise SystemExit(f"{tally.workload}: the run that nobody touched failed: {reply.points[0].message}")
        while tally.struck < kills:
            out = folder / f"run-{tally.runs}"
            yield from until_finished(job, runner, out, tally, kills, moments, chance)
            tally.runs += 1
            tally.mismatches += [f"run {tally.runs}: {what}" for what in differences(whole, out)]
            yield
        if tally.flips < flips:
            tally.found += flips_found(whole / "checkpoints", flips - tally.flips, chance)
            tally.flips = flips
            yield


def until_finished(
    job: Job,
    runner: SubprocessRunner,
    out: Path,
    tally: Tally,
    kills: int,
    moments: Moments,
    chance: random.Random,
) -> Iterator[None]:
    """One run, killed and started again until it has reached its end."""
    had_one = False
    while True:
        blow = Blow.drawn(chance, moments) if tally.struck < kills else None
        striker = Striker(blow)
        began = time.monotonic()
        reply = runner.run(job.request(out), striker)
        striker.close()
        tally.seconds += time.monotonic() - began
        problem, had_one = unloadable(out / "checkpoints", had_one)
        tally.unloadable += [f"run {tally.runs + 1}: {problem}"] if problem else []
        if striker.blind:
            raise SystemExit(f"{tally.workload}: its worker was not found among this process's children")
        if reply.train_result is not None and reply.train_result.finished:
            tally.missed += blow is not None
            return
        if blow is None or not striker.struck:
            raise SystemExit(f"{tally.workload}: a run failed that nobody had hit: {failure(reply)}")
        tally.kills[blow.name] = tally.kills.get(blow.name, 0) + 1
        yield


def failure(reply: ProbeReply) -> str:
    (point,) = reply.points
    return "" if point.outcome is Outcome.OK else f"{point.outcome.value}: {point.message}\n{point.detail}"


def short_run(workload: str, steps: int, runner: SubprocessRunner, evaluations: int) -> RunConfig:
    """The workload's baseline at its tiny size, `steps` long, with log lines, checkpoints and evaluations."""
    options = {} if ":" in workload else {"preset": "tiny"}
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)

    request = ProbeRequest(id="chaos", kind=ProbeKind.DESCRIBE, workload=workload, options=dict(options), device="cpu")
    reply = runner.run(request, hear)
    info = next((event.info for event in heard if isinstance(event, DescribeEvent)), None)
    if info is None:
        raise SystemExit(f"{workload}: {reply.points[0].message}")
    baseline = info.baseline
    step = baseline.effective_batch_size
    cadence = Cadence(
        log_samples=LOG_STEPS * step,
        checkpoint_samples=CHECKPOINT_STEPS * step,
        evaluate_samples=steps * step // evaluations if evaluations else 0,
    )
    return baseline.model_copy(
        update={
            "horizon_samples": steps * step,
            "cadence": cadence,
            "quality": baseline.quality if evaluations else None,
            "loader": LoaderConfig(num_workers=WORKERS.get(workload, 0)),
            "threads": 1,
        }
    )


def _part(total: int, number: int, share: int) -> int:
    return total * (number + 1) // share - total * number // share


def earlier(path: str | None, steps: int) -> dict[str, Tally]:
    if path is None or not Path(path).exists():
        return {}
    found = [Tally(**plain) for plain in json.loads(Path(path).read_text(encoding="utf-8"))]
    return {tally.workload: tally for tally in found if tally.steps == steps}


def keep(path: str | None, tallies: dict[str, Tally]) -> None:
    if path is not None:
        aside = Path(f"{path}.part")
        aside.write_text(json.dumps([asdict(tally) for tally in tallies.values()], indent=1), encoding="utf-8")
        aside.replace(path)


def text_of(tallies: Sequence[Tally]) -> str:
    heads = (
        "workload", "steps", *BLOWS, "kills", "missed", "runs finished", "mismatches", "unloadable", "flips found",
        "s per start",
    )  # fmt: skip
    lines = [table(heads, [row(tally) for tally in tallies])]
    lines += [f"{tally.workload}: {what}" for tally in tallies for what in (*tally.mismatches, *tally.unloadable)]
    struck, runs = sum(tally.struck for tally in tallies), sum(tally.runs for tally in tallies)
    wrong = sum(len(tally.mismatches) for tally in tallies)
    lost = sum(len(tally.unloadable) for tally in tallies)
    flips, found = sum(tally.flips for tally in tallies), sum(tally.found for tally in tallies)
    lines.append(
        f"\n{struck} kills struck in {runs} finished runs: {wrong} mismatches, {lost} unloadable states; "
        f"{found} of {flips} flipped bits found"
    )
    return "\n".join(lines)


def row(tally: Tally) -> tuple[object, ...]:
    starts = tally.struck + tally.missed + tally.runs
    return (
        tally.workload,
        tally.steps,
        *(tally.kills.get(name, 0) for name in BLOWS),
        tally.struck,
        tally.missed,
        tally.runs,
        len(tally.mismatches),
        len(tally.unloadable),
        f"{tally.found} of {tally.flips}",
        f"{tally.seconds / max(1, starts):.1f}",
    )


if __name__ == "__main__":
    main()

"""Evaluations that keep something of every batch: promised peak memory against the one production reaches.

python -m benchmarks.honest.hungry
python -m benchmarks.honest.hungry --keep 100 300 500 900 --joined 100 300 --pause 0.005 --json hungry.json

Each job is probed as the ship gate and the soak do it, once with time for the whole evaluation and once with so little
that most of it must be extrapolated; the promise is made as `tuner optimize` makes it. Then `tuner train` runs the job
through two evaluations in a process of its own. The bar is the range that the promise gives.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.honest.hungry_job import BATCHES, Hungry
from benchmarks.machine import print_machine, table, tuner
from tuner.contract.config import RunConfig
from tuner.contract.measurement import MemoryPeak
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.tuned import TunedConfig
from tuner.export.tuned import write
from tuner.probe.runner import SubprocessRunner
from tuner.search.selection import expected_peak, peak_words

MIB = 1 << 20
STEPS_S = 1.0
WHOLE_S = 60.0
WITHIN = 0.05


@dataclass(frozen=True)
class Result:
    """One promise and what became of it, in MiB."""

    job: str
    promised: float
    low: float
    high: float
    stands_on: str
    reached: float
    outcome: str

    @property
    def deviation(self) -> float:
        return self.reached / self.promised - 1

    @property
    def kept(self) -> str:
        if abs(self.deviation) <= WITHIN:
            return "within 5 %"
        return "inside the bar" if self.low <= self.reached <= self.high else "NO"


def main() -> None:
    words = parse()
    asked = " ".join(map(str, ["--keep", *words.keep, "--joined", *words.joined, "--pause", words.pause]))
    print_machine(f"python -m benchmarks.honest.hungry {asked}")
    print(
        f"{BATCHES} evaluation batches, {words.pause:g} s pause each; whole: {WHOLE_S:g} s are enough; part: of about a"
    )
    print("third of the seconds that the whole evaluation takes\n", flush=True)
    results: list[Result] = []
    jobs = [(keep, False) for keep in words.keep] + [(keep, True) for keep in words.joined]
    with tempfile.TemporaryDirectory(prefix="tuner-hungry-") as folder:
        for keep, join in jobs:
            results += measured(Hungry({"keep_mib": keep, "join": join, "pause_s": words.pause}), Path(folder))
            print(text_of(results[-2:]).split("\n\n")[0] + "\n", flush=True)
    print(text_of(results))
    if words.json:
        Path(words.json).write_text(json.dumps([asdict(result) for result in results], indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="*", type=int, default=[100, 300, 500, 900], help="MiB kept over the split")
    parser.add_argument(
        "--joined", nargs="*", type=int, default=[100, 300], help="the same, joined by torch.cat at the end"
    )
    parser.add_argument("--pause", type=float, default=0.005, help="seconds that each evaluation batch waits")
    parser.add_argument("--json", help="write the results here")
    return parser.parse_args()


def measured(job: Hungry, folder: Path) -> list[Result]:
    """Two promises, with the whole evaluation and with a part of it, and one production run for both."""
    config = job.info().baseline
    runner = SubprocessRunner(folder / "cache", log_dir=folder / "logs")
    try:
        steps = peak(runner, config, soak=False, evaluate_s=WHOLE_S)
        whole = peak(runner, config, soak=True, evaluate_s=WHOLE_S)
        assert whole.evaluation is not None
        part = peak(runner, config, soak=True, evaluate_s=whole.evaluation.seconds / 3)
    finally:
        runner.close()
    reached, outcome = trained(config, folder)
    name = f"+{job.options['keep_mib']} MiB" + (", joined" if job.options["join"] else "")
    return [promised(name, [steps, soaked], reached, outcome) for soaked in (whole, part)]


def peak(runner: SubprocessRunner, config: RunConfig, *, soak: bool, evaluate_s: float) -> MemoryPeak:
    request = ProbeRequest(
        id="hungry",
        kind=ProbeKind.END_TO_END,
        workload=config.workload,
        options=config.options,
        points=(config,),
        limits=ProbeLimits(measure_s=STEPS_S, evaluate_s=evaluate_s),
        soak=soak,
    )
    reply = runner.run(request).points[0]
    if reply.measurement is None:
        raise SystemExit(f"{config.options}: {reply.outcome.value}: {reply.message}\n{reply.detail}")
    return reply.measurement.memory


def trained(config: RunConfig, folder: Path) -> tuple[float, str]:
    """Peak memory that a production run reaches, in bytes, and how it ended."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as place:
        file = Path(place) / "config.yaml"
        write(file, TunedConfig(config=config))
        called = tuner(
            "train", "--config", str(file), "--allow-code", "--no-confirm", "--out", f"{place}/run",
            "--storage", f"sqlite:///{place}/studies.db", "--json",
        )  # fmt: skip
    if not called.result:
        return float("nan"), f"exit code {called.code}: {called.log.strip().splitlines()[-1]}"
    return float(called.result["peak_bytes"]), str(called.result["reason"])


def promised(name: str, peaks: list[MemoryPeak], reached: float, outcome: str) -> Result:
    found = expected_peak(peaks, "cpu")
    value, low, high = (size / MIB for size in (found.value, found.low, found.high))
    return Result(name, value, low, high, peak_words(peaks), reached / MIB, outcome)


def text_of(results: list[Result]) -> str:
    heads = ("job", "promised MiB", "bar", "stands on", "reached MiB", "deviation", "kept", "production ended")
    rows = [
        (
            result.job,
            f"{result.promised:.0f}",
            f"{result.low:.0f} to {result.high:.0f}",
            result.stands_on,
            f"{result.reached:.0f}",
            f"{100 * result.deviation:+.1f} %",
            result.kept,
            result.outcome,
        )
        for result in results
    ]
    kept = sum(result.kept != "NO" for result in results)
    near = sum(result.kept == "within 5 %" for result in results)
    whole = f"\n\n{near} of {len(results)} within 5 %, {kept} within 5 % or inside the bar"
    return table(heads, rows) + whole


if __name__ == "__main__":
    main()

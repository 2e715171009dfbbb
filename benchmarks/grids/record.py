"""Records a grid: every configuration of a study's space, several fresh processes each, in a new order every round.

python -m benchmarks.grids.record graph                 # benchmarks/grids/graph.study.yaml -> graph.jsonl.gz
python -m benchmarks.grids.record my.study.yaml --preset tiny --minutes 60 --out my.jsonl.gz

First the peaks, under a cap that is never reached; then the memory is capped so that about a quarter of the
configurations do not fit. The baseline is measured in between, so that the host's drift is known. Ctrl-C and the same
command again goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.machine import PACKAGES
from tuner.commands import setup
from tuner.commands.optimize import SearchWords, build_spec
from tuner.commands.setup import JobWords
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document, read_file
from tuner.contract.measurement import Measurement
from tuner.contract.probe import Event, ProbeKind, ProbeRequest, ProbeRow, ProbeRunner, Stage
from tuner.contract.space import Knob, grid
from tuner.contract.study import MEMORY_MARGIN, LrSpec, StudyFile, StudySpec
from tuner.contract.trust import ANY_CODE
from tuner.probe.recording import ANCHOR, UNCAPPED, GridHeader, Recorded, Writer, read
from tuner.search.history import History
from tuner.search.offline import rows_of
from tuner.search.points import config_of, point_of, smaller_cuts
from tuner.search.requests import make_request

FOLDER = Path(__file__).parent
UNREACHED = 1 << 40
"""The cap while the peaks are measured: what a cap itself costs (a warm-up of every thread) must be in them."""
BETWEEN_ANCHORS = 12
COMPUTE_POINTS = 8
SMALL_SHARE, LARGE_SHARE = 0.16, 0.38
"""Between these shares of configurations that do not fit the cap is put where the gap of the peaks is widest."""
ROOM = 1.05
"""The baseline must fit with this much room."""
SYSTEM = tuple(knob for knob in Knob if knob not in (Knob.LR, Knob.EFFECTIVE_BATCH_SIZE))


@dataclass(frozen=True)
class Task:
    """One request of the recording."""

    repeat: int
    request: ProbeRequest


def main() -> None:
    words = parse()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="tuner-grid-inductor-")
    runner = setup.make_runner("forkserver", ANY_CODE)
    try:
        record(words, runner)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    finally:
        runner.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a name with NAME.study.yaml in benchmarks/grids, or a study file")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--gpu", default="auto")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=90.0, help="stop then; the same command goes on")
    parser.add_argument("--out", type=Path, help="default: benchmarks/grids/NAME.jsonl.gz")
    return parser.parse_args()


def record(words: argparse.Namespace, runner: ProbeRunner) -> None:
    path = Path(words.study) if Path(words.study).suffix in (".yaml", ".yml") else FOLDER / f"{words.study}.study.yaml"
    out: Path = words.out or FOLDER / f"{path.name.partition('.')[0]}.jsonl.gz"
    growing = out.with_name(out.name.removesuffix(".gz") + ".part")
    if growing.exists():
        header, done = read(growing)
        spec = header.spec
    else:
        spec = as_spec(path, words, runner)
        peaks = list(measure(peak_tasks(spec), runner))
        spec = capped(spec, [item.row for item in peaks])
        header = header_of(spec, words, peaks)
        done = peaks
        writer = Writer(growing, header)
        for item in peaks:
            writer.add(item)
    writer = Writer(growing, header)
    asked = {(item.repeat, item.row.request_id) for item in done}
    tasks = [task for task in all_tasks(spec, words.repeats) if (task.repeat, task.request.id) not in asked]
    ends = time.monotonic() + 60 * words.minutes
    for item in measure(tasks, runner, ends):
        writer.add(item)
    if time.monotonic() >= ends and len(tasks) > 0 and not finished(spec, words.repeats, growing):
        sys.exit(f"{words.minutes:g} minutes are over; the same command goes on")
    writer.finish(out)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


def finished(spec: StudySpec, repeats: int, growing: Path) -> bool:
    asked = {(item.repeat, item.row.request_id) for item in read(growing)[1]}
    return all((task.repeat, task.request.id) in asked for task in all_tasks(spec, repeats))


def as_spec(path: Path, words: argparse.Namespace, runner: ProbeRunner) -> StudySpec:
    """The study file as a specification, without lr stage and without a memory cap yet."""
    file = load_document(StudyFile, read_file(path), str(path))
    job_words = JobWords(workload=file.workload, preset=words.preset or str(file.options.get("preset", "tiny")))
    search = SearchWords(gpu=words.gpu, study_file=path, study=f"grid-{path.name.partition('.')[0]}")
    job = setup.understand(job_words, runner, path, words.gpu)  # type: ignore[arg-type]
    setup.prepare(job, file.workload, runner, _unheard)  # type: ignore[arg-type]
    spec = build_spec(job_words, search, job)
    return spec.model_copy(update={"lr": LrSpec(enabled=False)})


def _unheard(_event: Event) -> None:
    """Preparing says how far it is; nobody listens here."""


def header_of(spec: StudySpec, words: argparse.Namespace, peaks: Sequence[Recorded]) -> GridHeader:
    environment = next(item.row.environment for item in peaks if item.row.environment is not None)
    return GridHeader(
        spec=spec,
        repeats=words.repeats,
        environment=environment,
        packages={name: version(name) for name in PACKAGES},
        command=f"python -m benchmarks.grids.record {shlex.join(sys.argv[1:])}",
        recorded_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def cells(spec: StudySpec) -> list[RunConfig]:
    """Every system configuration of the space at the kept effective batch size."""
    return list(grid(spec.space, spec.baseline, SYSTEM))


def computations(spec: StudySpec) -> list[RunConfig]:
    """One configuration per way of computing a step: the cells without their loaders."""
    plain = spec.space.model_copy(update={"num_workers": (), "prefetch_factor": ()})
    return list(grid(plain, spec.baseline, SYSTEM))


def loaders(spec: StudySpec) -> list[RunConfig]:
    return list(grid(spec.space, spec.baseline, (Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR)))


def peak_tasks(spec: StudySpec) -> list[Task]:
    history = History(spec.model_copy(update={"memory_cap_bytes": UNREACHED}), ())
    return [
        Task(UNCAPPED, make_request(history, ProbeKind.END_TO_END, Stage.SETUP, [config]))
        for config in computations(spec)
        if config.compile.value == "eager"
    ]


def capped(spec: StudySpec, rows: Sequence[ProbeRow]) -> StudySpec:
    """`spec` with the memory cap in the widest gap between the peaks, near the wanted share of misfits."""
    growth = sorted(_growth(row.measurement) for row in rows if row.measurement is not None)
    own = next(_growth(r.measurement) for r in rows if r.config == spec.baseline and r.measurement is not None)
    count = len(growth)
    gaps = [
        (growth[i] / growth[i - 1], (growth[i] * growth[i - 1]) ** 0.5)
        for i in range(1, count)
        if SMALL_SHARE <= (count - i) / count <= LARGE_SHARE and growth[i] > ROOM * own
    ]
    limit = max(gaps)[1] if gaps else ROOM * own
    for value in growth:
        print(f"  {value / 2**20:.0f}", end="", file=sys.stderr)
    print(f" MiB above the imported process; baseline {own / 2**20:.0f}, limit {limit / 2**20:.0f}", file=sys.stderr)
    update = {"memory_cap_bytes": int(limit / MEMORY_MARGIN)}
    if spec.device.kind == "cuda":  # there the budget is what shares are shares of
        update["memory_budget_bytes"] = int(limit)
    return spec.model_copy(update=update)


def _growth(measurement: Measurement | None) -> int:
    assert measurement is not None
    memory = measurement.memory
    return memory.gate_bytes if memory.reserved_bytes is not None else memory.process_bytes - memory.base_bytes


def all_tasks(spec: StudySpec, repeats: int) -> Iterator[Task]:
    """Round by round, each in an order of its own: all cells, the computations alone, the loaders alone."""
    history = History(spec, ())
    traced = [c for c in computations(spec) if not c.optimizer.fused and c.compile.value == "eager"]
    for request in (
        make_request(history, ProbeKind.TRACE, Stage.BATCH, traced[i : i + 8]) for i in range(0, len(traced), 8)
    ):
        yield Task(0, request)
    anchors = 0
    for repeat in range(repeats):
        requests = list(_round(spec, history, repeat))
        np.random.default_rng(repeat).shuffle(requests)
        for number, request in enumerate(requests):
            if number % BETWEEN_ANCHORS == 0:
                yield Task(ANCHOR, _anchor(spec, history, anchors))
                anchors += 1
            yield Task(repeat, request)


def _anchor(spec: StudySpec, history: History, number: int) -> ProbeRequest:
    return make_request(history, ProbeKind.END_TO_END, Stage.BASELINE, [spec.baseline], pair=number)


def _round(spec: StudySpec, history: History, repeat: int) -> Iterator[ProbeRequest]:
    for config in cells(spec):
        yield make_request(history, ProbeKind.END_TO_END, Stage.VERIFY, [config])
    rng = np.random.default_rng([repeat, 1])
    by_mode: dict[str, list[RunConfig]] = {}
    for config in computations(spec):
        by_mode.setdefault(config.compile.value, []).append(config)
    for configs in by_mode.values():
        order = [configs[i] for i in rng.permutation(len(configs))]
        for start in range(0, len(order), COMPUTE_POINTS):
            yield make_request(history, ProbeKind.COMPUTE, Stage.BATCH, order[start : start + COMPUTE_POINTS])
    for config in loaders(spec):
        yield make_request(history, ProbeKind.LOADER, Stage.LOADER, [config])
    base = point_of(spec.baseline)
    pair = next(iter(smaller_cuts(base)), None)
    if pair is not None:
        both = [config_of(spec, base), config_of(spec, pair)]
        yield make_request(history, ProbeKind.EQUIVALENCE, Stage.EQUIVALENCE, both)


def measure(tasks: Sequence[Task], runner: ProbeRunner, ends: float = float("inf")) -> Iterator[Recorded]:
    """Run the tasks in order and give what a store would keep."""
    began = time.monotonic()
    for number, task in enumerate(tasks):
        if time.monotonic() >= ends:
            return
        alone = task.request.kind in (ProbeKind.END_TO_END, ProbeKind.COMPUTE)
        request = task.request.model_copy(update={"cache_dir": str(setup.cache_dir()), "reference": alone})
        reply = runner.run(request)
        for row in rows_of(request, reply, number):
            yield Recorded(repeat=task.repeat, row=lean(row))
        if number % 25 == 0:
            spent = time.monotonic() - began
            told = ", ".join(f"{p.outcome.value} {p.seconds:.1f} s" for p in reply.points[:1])
            print(f"{number}/{len(tasks)} after {spent:.0f} s: {request.id} {told}", file=sys.stderr, flush=True)


def lean(row: ProbeRow) -> ProbeRow:
    """`row` without what replays do not need: losses, tracebacks; seconds to the microsecond."""
    update: dict[str, object] = {"detail": "", "environment": row.environment if row.stage is Stage.SETUP else None}
    if row.measurement is not None:
        update["measurement"] = row.measurement.model_copy(
            update={
                "losses": {},
                "step_s": tuple(round(value, 6) for value in row.measurement.step_s),
                "data_wait_s": tuple(round(value, 6) for value in row.measurement.data_wait_s),
                "telemetry": None,
            }
        )
    return row.model_copy(update=update)


if __name__ == "__main__":
    main()

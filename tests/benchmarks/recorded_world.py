"""A recorded grid of the made-up training job: SIMULATION, written to a file as the recorder writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.search.simulated_world import ENVIRONMENT, GIB, SimulatedRunner, World, make_spec
from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.probe import ProbeKind, Stage
from tuner.contract.space import Knob, SearchSpace, grid
from tuner.contract.study import GateSpec, MeasureSpec, StudySpec
from tuner.probe.recording import ANCHOR, GridHeader, Recorded, Writer
from tuner.search.history import History
from tuner.search.offline import rows_of
from tuner.search.requests import make_request

REPEATS = 4
BETWEEN_ANCHORS = 5
SPACE = SearchSpace(
    micro_batch_size=(2, 4, 8, 16), compile=(CompileMode.EAGER, CompileMode.DEFAULT),
    gradient_checkpointing=(False, True), fused=(False, True), num_workers=(0, 1),
)  # fmt: skip
WORLD = World(
    flag_factors={"fused": 0.9, "checkpointing": 1.3, CompileMode.DEFAULT: 0.95},
    compile_s=20.0,
    sample_bytes=1.2 * GIB,
    capacity_bytes=14 * GIB,
    process_noise=0.01,
    step_noise=0.02,
)
"""Without checkpointing 16 samples at once do not fit, 8 do."""


def spec() -> StudySpec:
    return make_spec(
        space=SPACE,
        budget_s=300.0,
        measure=MeasureSpec(measure_s=1.0, compute_s=0.5),
        gate=GateSpec(min_pairs=6, max_pairs=8, finalists=1, measure_s=1.0),
    )


def write_recording(path: Path, world: World = WORLD) -> Path:
    """A whole recording at `path` (.jsonl.gz)."""
    header = GridHeader(
        spec=spec(), repeats=REPEATS, environment=ENVIRONMENT, packages={}, command="simulated", recorded_at="",
    )  # fmt: skip
    writer = Writer(path.with_suffix(".part"), header)
    for recorded in _rows(header.spec, SimulatedRunner(world)):
        writer.add(recorded)
    writer.finish(path)
    return path


def _rows(study: StudySpec, runner: SimulatedRunner) -> Iterator[Recorded]:
    asked = [(repeat, kind, stage, points) for repeat in range(REPEATS) for kind, stage, points in _asked(study)]
    for place, (repeat, kind, stage, points) in enumerate(asked):
        if place % BETWEEN_ANCHORS == 0:
            yield from _recorded(study, runner, ANCHOR, ProbeKind.END_TO_END, Stage.BASELINE, [study.baseline])
        yield from _recorded(study, runner, repeat, kind, stage, points)


def _asked(study: StudySpec) -> Iterator[tuple[ProbeKind, Stage, list[RunConfig]]]:
    computing = (Knob.MICRO_BATCH_SIZE, Knob.COMPILE, Knob.GRADIENT_CHECKPOINTING, Knob.FUSED)
    for config in grid(SPACE, study.baseline, (*computing, Knob.NUM_WORKERS)):
        yield ProbeKind.END_TO_END, Stage.VERIFY, [config]
    for config in grid(SPACE, study.baseline, computing):
        yield ProbeKind.COMPUTE, Stage.BATCH, [config]
    for config in grid(SPACE, study.baseline, (Knob.NUM_WORKERS,)):
        yield ProbeKind.LOADER, Stage.LOADER, [config]
    yield ProbeKind.EQUIVALENCE, Stage.EQUIVALENCE, list(grid(SPACE, study.baseline, (Knob.MICRO_BATCH_SIZE,)))[:2]


def _recorded(
    study: StudySpec, runner: SimulatedRunner, repeat: int, kind: ProbeKind, stage: Stage, points: Sequence[RunConfig]
) -> Iterator[Recorded]:
    request = make_request(History(study, ()), kind, stage, points)
    for row in rows_of(request, runner.run(request), len(runner.requests)):
        yield Recorded(repeat=repeat, row=row)

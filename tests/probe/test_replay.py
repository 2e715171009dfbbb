"""A grid that was recorded answers like the job it was recorded from: speed, noise, seconds, failures, compile once."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.search.simulated_world import ENVIRONMENT, GIB, SimulatedRunner, World, make_spec
from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeRequest
from tuner.contract.space import Knob, SearchSpace, grid
from tuner.contract.study import StudySpec
from tuner.probe.recording import ANCHOR, GridHeader, Recorded, Writer, read
from tuner.probe.replay import Grid, ReplayRunner
from tuner.search.offline import rows_of, run_study

SPACE = SearchSpace(
    micro_batch_size=(2, 4, 8, 16),
    fused=(False, True),
    num_workers=(0, 2),
    compile=(CompileMode.EAGER, CompileMode.DEFAULT),
)
KNOBS = (Knob.MICRO_BATCH_SIZE, Knob.COMPILE, Knob.FUSED, Knob.NUM_WORKERS)
WORLD = World(
    flag_factors={"fused": 0.9, CompileMode.DEFAULT: 0.97}, sample_bytes=1.2 * GIB, process_noise=0.02, compile_s=20.0
)
REPEATS = 3


def spec_of() -> StudySpec:
    return make_spec(space=SPACE, name="grid-made-up")


def recorded(path: Path) -> Path:
    """A made-up job over the whole space, as `benchmarks.grids.record` would leave it."""
    spec, runner, number = spec_of(), SimulatedRunner(WORLD), 0
    header = GridHeader(
        spec=spec, repeats=REPEATS, environment=ENVIRONMENT, packages={}, command="", recorded_at="2026-01-01T00:00:00Z"
    )
    writer = Writer(path.with_suffix(".part"), header)
    for repeat in (ANCHOR, *range(REPEATS)):
        for request in requests(spec, repeat):
            for row in rows_of(request, runner.run(request), number):
                writer.add(Recorded(repeat=repeat, row=row))
                number += 1
    writer.finish(path)
    return path


def requests(spec: StudySpec, repeat: int) -> list[ProbeRequest]:
    if repeat == ANCHOR:
        return [ask(ProbeKind.END_TO_END, [spec.baseline], f"anchor{i}") for i in range(20)]
    cells = list(grid(spec.space, spec.baseline, KNOBS))
    alone = [c for c in cells if c.loader.num_workers == 0]
    loaders = list(grid(spec.space, spec.baseline, (Knob.NUM_WORKERS,)))
    smaller = cells[0]
    return [
        *[ask(ProbeKind.END_TO_END, [c], f"e{repeat}-{c.digest()}") for c in cells],
        *[ask(ProbeKind.COMPUTE, [c], f"c{repeat}-{c.digest()}") for c in alone],
        *[ask(ProbeKind.LOADER, [c], f"l{repeat}-{c.digest()}") for c in loaders],
        ask(ProbeKind.EQUIVALENCE, [spec.baseline, smaller], f"q{repeat}"),
    ]


def ask(kind: ProbeKind, points: Sequence[RunConfig], name: str) -> ProbeRequest:
    return ProbeRequest(id=name, kind=kind, workload="simulated", points=tuple(points))


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid.load(recorded(tmp_path_factory.mktemp("grid") / "made-up.jsonl.gz"))


def answer(runner: ReplayRunner, config: RunConfig, name: str) -> PointReply:
    return runner.run(ask(ProbeKind.END_TO_END, [config], name)).points[0]


def mean_rate(reply: PointReply) -> float:
    assert reply.measurement is not None
    return reply.measurement.samples_per_step / float(np.mean(reply.measurement.steady_step_s))


def test_the_grid_knows_every_cell_and_its_speed(made_up: Grid) -> None:
    assert len(made_up.cells) == 4 * 2 * 2 * 2
    for config in made_up.cells:
        rate = made_up.rate(config, made_up.repeats)
        if WORLD.peak_bytes(config) > WORLD.capacity_bytes:
            assert rate is None
            assert not made_up.fits(config)
        elif rate is not None:
            assert rate == pytest.approx(WORLD.rate(config), rel=0.08)
    assert not made_up.fits(made_up.spec.baseline.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1}))


def test_answers_scatter_as_recorded_and_are_the_same_for_the_same_seed(made_up: Grid) -> None:
    runner, again = (ReplayRunner(made_up, seed=1) for _ in range(2))
    baseline = made_up.spec.baseline
    rates = [mean_rate(answer(runner, baseline, f"n{i}")) for i in range(200)]
    assert rates == [mean_rate(answer(again, baseline, f"n{i}")) for i in range(200)]
    assert np.std(np.log(rates)) == pytest.approx(WORLD.process_noise, rel=0.5)
    assert float(np.mean(rates)) == pytest.approx(made_up.rate(baseline, made_up.repeats), rel=0.01)
    other = ReplayRunner(made_up, seed=2)
    assert [mean_rate(answer(other, baseline, f"n{i}")) for i in range(5)] != rates[:5]


def test_what_ran_out_of_memory_does_so_again(made_up: Grid) -> None:
    large = made_up.spec.baseline.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1})
    reply = answer(ReplayRunner(made_up, seed=0), large, "large")
    assert reply.outcome is Outcome.OOM_DEVICE
    assert reply.measurement is None


def test_what_was_not_recorded_is_said_and_costs_next_to_nothing(made_up: Grid) -> None:
    config = made_up.spec.baseline.model_copy(update={"channels_last": True})
    reply = answer(ReplayRunner(made_up, seed=0), config, "new")
    assert reply.outcome is Outcome.UNSUPPORTED
    assert "not recorded in grid made-up" in reply.message
    assert reply.seconds < 0.1


def test_a_compile_is_charged_once(made_up: Grid) -> None:
    compiled = made_up.spec.baseline.model_copy(update={"compile": CompileMode.DEFAULT})
    runner = ReplayRunner(made_up, seed=0)
    first, second = (answer(runner, compiled, name) for name in ("one", "two"))
    assert first.seconds > second.seconds + 0.5 * WORLD.compile_s
    asked = ask(ProbeKind.END_TO_END, [compiled], "one")
    resumed = ReplayRunner(made_up, seed=0)
    resumed.remember(rows_of(asked, runner.run(asked), 0))
    assert answer(resumed, compiled, "two").seconds == pytest.approx(second.seconds)


def test_a_whole_study_finds_the_fastest_cell_that_fits(made_up: Grid) -> None:
    runner = ReplayRunner(made_up, seed=3)
    rows, decision = run_study(made_up.spec, runner)
    assert decision.kind == "winner"
    assert decision.winner is not None
    rates = {c.digest(): made_up.rate(c, made_up.repeats) for c in made_up.cells}
    best = max(rate for rate in rates.values() if rate is not None)
    own = rates[decision.winner.config.digest()]
    assert own is not None
    assert own > 0.95 * best
    assert runner.seconds == pytest.approx(sum(row.seconds for row in rows))


def test_the_baseline_alone_has_nothing_to_gain(made_up: Grid) -> None:
    runner = ReplayRunner(made_up, seed=5, only_baseline=True)
    large = made_up.spec.baseline.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1})
    assert answer(runner, large, "large").outcome is Outcome.OK
    _, decision = run_study(made_up.spec, runner)
    assert decision.kind == "no_gain"


def test_a_recording_cut_off_in_a_line_goes_on(tmp_path: Path) -> None:
    whole = recorded(tmp_path / "made-up.jsonl.gz")
    header, rows = read(whole)
    growing = tmp_path / "cut.part"
    growing.write_bytes(gzip.decompress(whole.read_bytes())[:-40])
    writer = Writer(growing, header)
    assert len(read(growing)[1]) == len(rows) - 1
    writer.add(rows[-1])
    assert read(growing)[1] == rows


@pytest.mark.parametrize(
    "content",
    [b"", b"not gzip", gzip.compress(b"[1]\n"), gzip.compress(b'{"spec": 1, "format": 9}\n')],
    ids=["empty", "no gzip", "no header", "a newer format"],
)
def test_any_other_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"other\.jsonl\.gz"):
        Grid.load(path)


def slowed(item: Recorded, rng: np.random.Generator) -> Recorded:
    """The same probe on a host that happened to be faster or slower, as its reference work shows."""
    measurement = item.row.measurement
    if measurement is None:
        return item
    factor, busy = float(np.exp(0.2 * rng.standard_normal())), 1.5 if item.row.config.loader.num_workers else 1.0
    update = {
        "step_s": tuple(factor * value for value in measurement.step_s),
        "reference_s": tuple(busy * factor * 0.05 for _ in range(5)),  # workers of its own slow it too
    }
    row = item.row.model_copy(update={"measurement": measurement.model_copy(update=update)})
    return item.model_copy(update={"row": row})


def test_a_restless_host_is_taken_out_by_its_reference_work(made_up: Grid, tmp_path: Path) -> None:
    header, rows = read(recorded(tmp_path / "made-up.jsonl.gz"))
    rng = np.random.default_rng(0)
    restless = Grid(header, [slowed(item, rng) for item in rows])
    off = [
        np.log(own / quiet)
        for config in made_up.cells
        if (quiet := made_up.rate(config, made_up.repeats)) and (own := restless.rate(config, made_up.repeats))
    ]
    assert np.std(off) < 0.02, "of a host that varied by 20 %"
    residuals = restless.residuals[ProbeKind.END_TO_END]
    assert np.std(residuals) > 0.15, "a search still meets the noise that was recorded"

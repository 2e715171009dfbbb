"""The fall-back where the model misfits: reached, bounded, a pure function of the rows, better than stopping."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from tests.search.simulated_world import Ended, SimulatedRunner, World, drive, make_spec
from tuner.commands.study_loop import StudyLoop
from tuner.contract.config import RunConfig
from tuner.contract.probe import Listener, ProbeReply, ProbeRequest, Stage
from tuner.contract.space import Knob, SearchSpace, grid
from tuner.contract.study import StudySpec
from tuner.search import planner
from tuner.search.fallback import FRUITLESS, lessons, open_points
from tuner.search.planner import Ask, next_probe
from tuner.search.points import config_of
from tuner.search.sampler import propose, proposed
from tuner.search.situation import situation_of
from tuner.search.view import View
from tuner.store.store import StudyStore


@dataclass(frozen=True)
class Quarrel(World):
    """Workers and large micro-batches fight over something that no probe of one of them shows."""

    def step_s(self, config: RunConfig) -> float:
        workers, micro = config.loader.num_workers, config.micro_batch_size
        factor = 1 + 0.5 * workers if workers and micro >= 8 else 1.0
        return super().step_s(config) * (0.25 if workers and micro <= 4 else factor)


SEEDS = (1, 2)


def spec_of(**changes: object) -> StudySpec:
    return make_spec(**{"budget_s": 400.0, **changes})


@cache
def study(seed: int) -> Ended:
    return drive(spec_of(), Quarrel(), seed=seed)


def best_found(ended: Ended) -> float:
    """True samples/s of what leads the search."""
    leader = situation_of(View(ended.spec, ended.rows)).forecast.leader
    return Quarrel().rate(config_of(ended.spec, leader))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_misfit_is_handed_to_optuna_within_bounds(seed: int) -> None:
    ended = study(seed)
    asked = ended.of_stage("sampler")
    assert asked
    assert len(asked) < 4 * FRUITLESS
    whole = [r.points[0].digest() for r in ended.requests if r.stage not in (Stage.GATE, Stage.SOAK)]
    measured = [r.points[0].digest() for r in asked]
    assert all(whole.count(digest) == 1 or digest not in whole[: whole.index(digest)] for digest in measured)
    assert len(set(measured)) == len(measured)
    assert not any(row.outcome.is_oom for row in ended.rows if row.stage is Stage.SAMPLER)
    assert any("Optuna's TPE" in note and f"proposed {len(asked)} more" in note for note in ended.decision.notes)


def test_a_model_that_fits_hands_nothing_over() -> None:
    ended = drive(make_spec(), World())
    assert not ended.of_stage("sampler")
    assert not any("Optuna" in note for note in ended.decision.notes)


def test_it_beats_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = [best_found(study(seed)) for seed in SEEDS]
    monkeypatch.setattr(planner, "handed_over", lambda s: "")
    without = [best_found(drive(spec_of(), Quarrel(), seed=seed)) for seed in SEEDS]
    assert all(a >= 0.99 * b for a, b in zip(with_it, without, strict=True))
    assert sum(with_it) > 1.05 * sum(without)


def test_a_proposal_is_a_pure_function_of_the_rows() -> None:
    ended = study(1)
    for request in ended.of_stage("sampler")[::5]:
        number = next(row.number for row in ended.rows if row.request_id == request.id)
        rows = ended.rows[:number]
        assert isinstance(next_probe(ended.spec, rows), Ask)
        random.Random(number).shuffle(rows)
        assert proposed(ended.spec, rows) == request
        other = ended.spec.model_copy(update={"seed": 7})
        assert propose(other, rows) == propose(other, rows)


def test_every_settled_configuration_is_told_with_a_continuous_overrun() -> None:
    ended = study(1)
    told = list(lessons(situation_of(View(ended.spec, ended.rows))))
    rows = [r for r in ended.rows if r.kind.value == "end_to_end" and r.stage not in (Stage.GATE, Stage.SOAK)]
    assert len(told) == len({row.config.digest() for row in rows})
    assert all(lesson.worth > 0 and -1 < lesson.overruns["memory"] <= 0 for lesson in told)


def test_it_ends_with_the_space() -> None:
    """Of thirty configurations next to all are tried, none twice; then the study goes on to its gate."""
    space = SearchSpace(micro_batch_size=(1, 2, 4, 8, 16), num_workers=(0, 1, 2, 3, 4))
    ended = drive(spec_of(space=space), Quarrel())
    assert ended.of_stage("sampler")
    tried = {row.config.digest() for row in ended.rows if row.kind.value == "end_to_end"}
    left = {config_of(ended.spec, p).digest() for p in open_points(situation_of(View(ended.spec, ended.rows)))}
    assert not tried & left
    assert ended.decision.winner is not None
    rates = [
        Quarrel().rate(config) for config in grid(space, ended.spec.baseline, (Knob.MICRO_BATCH_SIZE, Knob.NUM_WORKERS))
    ]
    assert Quarrel().rate(ended.decision.winner.config) >= 0.97 * max(rates)


class Stopped(Exception):
    """The process was killed."""


class Mortal:
    """A runner that is killed at its second and at its third proposal."""

    def __init__(self) -> None:
        self._runner = SimulatedRunner(Quarrel(), seed=1)
        self._deaths = [2, 1]
        self.requests: list[ProbeRequest] = []

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        if self._deaths and sum(item.stage is Stage.SAMPLER for item in self.requests) == self._deaths[-1]:
            self._deaths.pop()
            raise Stopped
        self.requests.append(request)
        return self._runner.run(request, listener)

    def close(self) -> None:
        pass


def test_the_loop_asks_optuna_and_goes_on_identically_when_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    url, runner, before = f"sqlite:///{tmp_path}/studies.db", Mortal(), study(1)
    store = StudyStore.open(url)
    spec = store.create_study(before.spec)
    for request in before.requests[: before.requests.index(before.of_stage("sampler")[0])]:
        store.add_reply(spec.name, request, runner.run(request), None)
    for _ in range(2):
        with pytest.raises(Stopped):
            StudyLoop(spec, store, runner, url, Console(file=io.StringIO())).run()
    asked = [request.id for request in runner.requests]
    rows = store.rows(spec.name)
    store.close()
    assert asked == [request.id for request in before.requests[: len(asked)]]
    assert sum(row.stage is Stage.SAMPLER and row.trial is not None for row in rows) == 2

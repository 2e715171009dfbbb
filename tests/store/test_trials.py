"""Optuna's side: trials carry what the rows say, infeasible ones count as such, and a crash leaves nothing undone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from tests.store.conftest import Server
from tests.store.rows import BASELINE, WINNER, Exchange, example_exchanges, example_rows, example_spec, scored
from tuner.contract.config import RunConfig
from tuner.contract.errors import StoreError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.space import Knob, with_knobs
from tuner.contract.statistics import throughput
from tuner.search.score import overruns, score
from tuner.store.store import StudyStore
from tuner.store.trials import TrialBook, distributions, open_storage, params

SPEC = example_spec()
KNOBS = distributions(SPEC.space, SPEC.baseline)
ROWS = example_rows()


@pytest.fixture
def book(url: str) -> Iterator[TrialBook]:
    StudyStore.open(url).close()
    found = TrialBook(url, SPEC.name)
    yield found
    found.close()


@pytest.fixture
def quick(sqlite_url: str) -> Iterator[TrialBook]:
    StudyStore.open(sqlite_url).close()
    found = TrialBook(sqlite_url, SPEC.name)
    yield found
    found.close()


def row_of(request_id: str) -> ProbeRow:
    return next(row for row in ROWS if row.request_id == request_id)


def told(book: TrialBook, row: ProbeRow) -> FrozenTrial:
    values = params(row.config, KNOBS)
    number = book.ask(KNOBS, values).number
    book.tell(number, row, SPEC, scored(row))
    return book.study.trials[number]


# -- what a trial says


def test_a_measured_probe_is_a_trial_with_parameters_value_and_attributes(book: TrialBook) -> None:
    row = row_of("verify-winner")
    trial = told(book, row)
    assert row.measurement is not None
    assert trial.state is TrialState.COMPLETE
    assert trial.value == pytest.approx(throughput(row.measurement).value)
    assert trial.params["micro_batch_size"] == 16
    assert trial.params["fused"] is True
    shown = trial.user_attrs
    assert (shown["stage"], shown["outcome"], shown["batch_label"]) == ("verify", "ok", "16x1")
    assert (shown["micro_batch"], shown["accumulation"]) == (16, 1)
    assert shown["peak_mib"] == 780
    assert shown["memory_used"] == 0.78
    assert shown["data_wait"] == pytest.approx(0.05)
    assert shown["samples_per_s_low"] < trial.value < shown["samples_per_s_high"]
    assert RunConfig.model_validate_json(shown["config"]) == row.config
    assert trial.constraints["memory"] == pytest.approx(-0.22)
    assert trial.constraints["failed"] < 0


def test_intermediate_values_follow_the_steps(quick: TrialBook) -> None:
    trial = told(quick, row_of("verify-winner"))
    steps = sorted(trial.intermediate_values)
    assert steps[-1] == 40
    assert 8 <= len(steps) <= 12
    assert trial.value is not None
    assert all(abs(value / trial.value - 1) < 0.1 for value in trial.intermediate_values.values())


def test_out_of_memory_is_a_finished_trial_that_is_infeasible(quick: TrialBook) -> None:
    trial = told(quick, row_of("verify-big"))
    assert trial.state is TrialState.COMPLETE
    assert trial.value == 0.0
    assert trial.constraints["memory"] > 0
    assert trial.user_attrs["message"] == "can't allocate memory: 1200 MiB"
    assert trial.user_attrs["outcome"] == "oom_host"


def test_the_overrun_of_an_out_of_memory_grows_with_the_batch() -> None:
    row = row_of("verify-big")
    sizes = [
        row.model_copy(update={"config": row.config.model_copy(update={"micro_batch_size": size})})
        for size in (16, 32, 64, 128)
    ]
    found = [overruns(SPEC, item)["memory"] for item in sizes]
    assert found == sorted(set(found))
    assert found[0] > 0


def test_a_measured_peak_above_the_budget_is_infeasible_by_that_much() -> None:
    tight = SPEC.model_copy(update={"memory_budget_bytes": 600 << 20})
    verdict = score(tight, ROWS, row_of("verify-winner"))
    assert verdict.value is not None
    assert verdict.value > 0
    assert verdict.overruns["memory"] == pytest.approx(0.3)


@pytest.mark.parametrize("outcome", [Outcome.CRASHED, Outcome.TIMEOUT, Outcome.DIVERGED, Outcome.NO_RESULT])
def test_other_failures_are_bad_finished_trials(quick: TrialBook, outcome: Outcome) -> None:
    row = row_of("verify-big").model_copy(update={"outcome": outcome})
    trial = told(quick, row)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.0)
    assert trial.constraints["failed"] == 1.0


def test_a_contended_probe_says_nothing_about_its_configuration(quick: TrialBook) -> None:
    trial = told(quick, row_of("baseline").model_copy(update={"outcome": Outcome.CONTENDED}))
    assert trial.state is TrialState.FAIL
    assert trial.user_attrs["outcome"] == "contended"


def test_telling_twice_changes_nothing(quick: TrialBook) -> None:
    row = row_of("baseline")
    before = told(quick, row)
    quick.tell(before.number, row_of("verify-big"), SPEC, scored(row_of("verify-big")))
    assert quick.study.trials[before.number] == before


def test_the_study_names_workload_target_and_machine(quick: TrialBook) -> None:
    quick.describe(SPEC)
    assert quick.study.user_attrs == {
        "workload": "latent_cfg",
        "target": "Tesla P100 16 GB",
        "measured_on": "Example CPU",
    }
    assert quick.study.metric_names == ["samples/s"]


def test_the_best_trial_is_a_feasible_one(quick: TrialBook) -> None:
    fast = row_of("verify-winner")
    tight = fast.model_copy(update={"outcome": Outcome.OOM_DEVICE})
    told(quick, tight)
    slow = told(quick, row_of("baseline"))
    assert quick.study.best_trial.number == slow.number


def test_the_dashboard_still_needs_the_old_constraints_list(quick: TrialBook) -> None:
    """When this fails, optuna-dashboard reads Optuna 5's constraints: then `dashboard_constraints` may go."""
    from optuna_dashboard import _serializer

    trial = told(quick, row_of("verify-big"))
    assert trial.system_attrs["constraints"] == [pytest.approx(0.8)]
    shown: Any = _serializer.serialize_frozen_trial(quick.study._study_id, trial, {})
    assert shown["constraints"] == trial.system_attrs["constraints"]
    del trial.system_attrs["constraints"]
    assert trial.constraints["memory"] > 0
    blind: Any = _serializer.serialize_frozen_trial(quick.study._study_id, trial, {})
    assert blind["constraints"] == []


# -- proposals


class Fixed(optuna.samplers.BaseSampler):
    """Proposes the last choice of every knob."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return param_distribution.choices[-1]


def test_proposals_come_from_the_sampler_given(sqlite_url: str) -> None:
    StudyStore.open(sqlite_url).close()
    book = TrialBook(sqlite_url, SPEC.name, Fixed())
    asked = book.ask(KNOBS)
    assert asked.params == {name: item.choices[-1] for name, item in KNOBS.items()}
    given = book.ask(KNOBS, params(BASELINE, KNOBS))
    assert given.params["micro_batch_size"] == 8
    assert given.number == asked.number + 1
    with pytest.raises(ValueError, match="micro_batch_size: 3 is none of"):
        book.ask(KNOBS, {"micro_batch_size": 3})
    assert len(book.study.trials) == 2
    book.close()


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_optunas_own_samplers_work_on_what_was_told(sqlite_url: str, name: str) -> None:
    StudyStore.open(sqlite_url).close()
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=2) if name == "tpe" else None
    book = TrialBook(sqlite_url, SPEC.name, sampler or optuna.samplers.RandomSampler(seed=0))
    for request_id in ("baseline", "verify-winner", "verify-big"):
        told(book, row_of(request_id))
    for _ in range(3):
        asked = book.ask(KNOBS)
        assert set(asked.params) == set(KNOBS)
        config = with_knobs(BASELINE, {Knob(key): value for key, value in asked.params.items()})
        row = row_of("baseline").model_copy(update={"config": config})
        book.tell(asked.number, row, SPEC, scored(row))
    book.close()


def test_every_knob_with_a_choice_is_categorical() -> None:
    found = distributions(SPEC.space, BASELINE)
    assert list(found) == ["micro_batch_size", "channels_last", "fused", "num_workers", "prefetch_factor"]
    assert found["micro_batch_size"].choices == (1, 2, 4, 8, 16)
    assert params(WINNER, found) == {
        "micro_batch_size": 16,
        "channels_last": False,
        "fused": True,
        "num_workers": 0,
        "prefetch_factor": 2,
    }


def test_a_value_outside_the_choices_is_left_out_of_the_parameters() -> None:
    found = distributions(SPEC.space, BASELINE)
    odd = with_knobs(BASELINE, {Knob.MICRO_BATCH_SIZE: 32, Knob.EFFECTIVE_BATCH_SIZE: 32})
    assert "micro_batch_size" not in params(odd, found)


def test_the_prefetch_factor_of_idle_loaders_is_a_choice() -> None:
    space = SPEC.space.model_copy(update={"prefetch_factor": (4, 8)})
    busy = BASELINE.loader.model_copy(update={"num_workers": 2, "prefetch_factor": 4})
    found = distributions(space, BASELINE.model_copy(update={"loader": busy}))
    assert found["prefetch_factor"].choices == (4, 8, 2)
    assert params(BASELINE, found)["prefetch_factor"] == 2


# -- after a crash


def kept(book: TrialBook) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.state, trial.values, trial.user_attrs) for trial in book.study.trials]


def test_trials_missing_after_a_crash_are_rebuilt_once(book: TrialBook) -> None:
    book.repair(ROWS, SPEC, scored)
    wanted = {row.request_id for row in ROWS if row.kind is ProbeKind.END_TO_END}
    assert {trial.user_attrs["tuner_probe"] for trial in book.study.trials} == wanted
    assert len(book.study.trials) == len(wanted)
    before = kept(book)
    book.repair(ROWS, SPEC, scored)
    assert kept(book) == before


def test_a_rebuilt_trial_is_what_telling_it_would_have_made(quick: TrialBook) -> None:
    for request_id in ("verify-winner", "verify-big"):
        row = row_of(request_id)
        straight = told(quick, row)
        other = row.model_copy(update={"request_id": f"{request_id}-again"})
        quick.repair([row, other], SPEC, scored)
        rebuilt = quick.study.trials[-1]
        assert rebuilt.user_attrs.pop("tuner_probe") == other.request_id
        straight.user_attrs.pop("tuner_probe")
        for name in ("state", "values", "params", "user_attrs", "system_attrs", "intermediate_values", "constraints"):
            assert getattr(rebuilt, name) == getattr(straight, name)


def test_a_running_trial_without_a_row_is_marked_interrupted(quick: TrialBook) -> None:
    number = quick.ask(KNOBS).number
    quick.study.enqueue_trial({"fused": True})
    quick.repair((), SPEC, scored)
    first, second = quick.study.trials
    assert first.number == number
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.FAIL)
    assert first.user_attrs == {"interrupted": True}
    before = kept(quick)
    quick.repair((), SPEC, scored)
    assert kept(quick) == before


def test_a_running_trial_whose_row_was_stored_is_told(quick: TrialBook) -> None:
    number = quick.ask(KNOBS, params(WINNER, KNOBS)).number
    row = row_of("verify-winner").model_copy(update={"trial": number})
    quick.repair([row], SPEC, scored)
    (trial,) = quick.study.trials
    assert trial.state is TrialState.COMPLETE
    assert trial.user_attrs["tuner_probe"] == "verify-winner"


def test_a_trial_cut_off_in_the_middle_of_telling_is_told_again(quick: TrialBook) -> None:
    number = quick.ask(KNOBS, params(WINNER, KNOBS)).number
    row = row_of("verify-winner").model_copy(update={"trial": number})
    quick._write(quick._trial_id(number), row, SPEC, scored(row))
    quick.repair([row], SPEC, scored)
    assert quick.study.trials[number].state is TrialState.COMPLETE


def test_a_row_delivered_after_its_trial_was_given_up_gets_a_trial(quick: TrialBook) -> None:
    number = quick.ask(KNOBS).number
    quick.repair((), SPEC, scored)
    late = row_of("verify-winner").model_copy(update={"trial": number})
    quick.repair([late], SPEC, scored)
    quick.repair([late], SPEC, scored)
    given_up, rebuilt = quick.study.trials
    assert given_up.state is TrialState.FAIL
    assert rebuilt.user_attrs["tuner_probe"] == "verify-winner"


# -- one database


def test_rows_and_trials_share_one_database(url: str) -> None:
    with StudyStore.open(url) as store:
        store.create_study(SPEC)
        book = TrialBook(url, SPEC.name)
        items: tuple[Exchange, ...] = example_exchanges()
        for item in items:
            if item.request.kind is not ProbeKind.END_TO_END:
                continue
            number = book.ask(KNOBS).number
            (row,) = store.add_reply(SPEC.name, item.request, item.reply, number)
            book.tell(number, row, SPEC, scored(row))
        rows = store.rows(SPEC.name)
        assert [row.trial for row in rows] == list(range(len(rows)))
        assert all(trial.state is TrialState.COMPLETE for trial in book.study.trials)
        book.close()


def test_a_locked_store_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    import sqlite3

    url = f"sqlite:///{tmp_path}/studies.db"
    StudyStore.open(url).close()
    book = TrialBook(url, SPEC.name, lock_timeout_s=0.2)
    holder = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process"):
        book.ask(KNOBS)
    holder.close()
    book.close()


def test_no_password_in_messages_or_trials(postgres_server: Server) -> None:
    url = postgres_server.fresh_database()
    book = TrialBook(url, SPEC.name)
    book.repair(ROWS, SPEC, scored)
    written = json.dumps([trial.user_attrs | trial.system_attrs for trial in book.study.trials])
    assert Server.SECRET not in written
    book.close()
    gone = url.replace(str(postgres_server.port), "1")
    with pytest.raises(StoreError, match="cannot be reached") as caught:
        open_storage(gone)
    assert Server.SECRET not in str(caught.value)

"""The Pareto study beside a study: its front is the true one of the rows, and writing it again changes nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest

from tests.store.rows import BASELINE, MIB, example_rows, example_spec
from tuner.commands.pareto import pareto_points, write_pareto
from tuner.contract.measurement import Telemetry
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.space import Knob, with_knobs
from tuner.store import pareto
from tuner.store.pareto import CONTENT_ATTR, ParetoPoint
from tuner.store.trials import open_storage

ROOT = Path(__file__).resolve().parents[2]
SPEC = example_spec()
ROWS = example_rows()
NAME = f"{SPEC.name}-pareto"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


def stored(url: str) -> optuna.Study:
    return optuna.load_study(study_name=NAME, storage=open_storage(url))


def made(micro: int, rate: float, mib: int, loss: float, overrun: float = -0.5) -> ParetoPoint:
    config = with_knobs(BASELINE, {Knob.MICRO_BATCH_SIZE: micro})
    return ParetoPoint(config, rate, mib * MIB, overrun, processes=1, loss=loss)


def beaten(one: Sequence[float], by: Sequence[float]) -> bool:
    """`by` is no worse in samples/s (more), memory and loss (less), and better in one of them."""
    own, other = (-one[0], *one[1:]), (-by[0], *by[1:])
    return own != other and all(b <= a for a, b in zip(own, other, strict=True))


def test_the_best_trials_are_the_true_front(url: str) -> None:
    points = [
        made(1, 100, 300, 0.50), made(2, 140, 320, 0.50), made(4, 150, 500, 0.50), made(8, 145, 600, 0.50),
        made(16, 150, 500, 0.45), made(16, 90, 290, 0.60),
    ]  # fmt: skip
    assert pareto.write_pareto(url, SPEC, points)
    study = stored(url)
    values = [trial.values for trial in study.trials]
    front = [own for own in values if not any(beaten(own, by) for by in values)]
    assert sorted(trial.values for trial in study.best_trials) == sorted(front)
    assert len(front) == 4
    assert study.metric_names == ["samples/s", "peak MiB", "loss at equal samples"]


def test_what_does_not_fit_is_on_no_front(url: str) -> None:
    assert pareto.write_pareto(url, SPEC, [made(8, 100, 500, 0.5), made(16, 200, 400, 0.4, overrun=0.2)])
    assert [trial.user_attrs["label"] for trial in stored(url).best_trials] == [SPEC.label(BASELINE)]


def test_the_rows_of_a_study_become_one_point_per_configuration(url: str) -> None:
    assert write_pareto(url, SPEC, ROWS)
    study = stored(url)
    ran = [row for row in ROWS if row.kind is ProbeKind.END_TO_END and row.measurement is not None]
    assert len(study.trials) == len({row.config.digest() for row in ran}) == 2
    first = study.trials[0]
    assert first.user_attrs["baseline"] is True
    assert first.user_attrs["processes"] == sum(row.config == BASELINE for row in ran)
    assert first.params["micro_batch_size"] == 8
    assert first.values[1] == 540


def test_losses_that_agree_but_for_rounding_are_equal(url: str) -> None:
    shaken = [shaken_row(row) for row in ROWS]
    assert write_pareto(url, SPEC, shaken)
    assert len({trial.values[2] for trial in stored(url).trials}) == 1


def shaken_row(row: ProbeRow) -> ProbeRow:
    if row.measurement is None or row.config == BASELINE:
        return row
    losses = {"total": tuple(value * (1 + 1e-6) for value in row.measurement.losses["total"])}
    return row.model_copy(update={"measurement": row.measurement.model_copy(update={"losses": losses})})


def test_energy_is_a_direction_where_every_row_has_power(url: str) -> None:
    powered = [
        row.model_copy(
            update={"measurement": row.measurement.model_copy(update={"telemetry": Telemetry(power_w=100.0)})}
        )
        if row.measurement is not None
        else row
        for row in ROWS
    ]
    assert write_pareto(url, SPEC, powered)
    study = stored(url)
    assert study.metric_names is not None
    assert study.metric_names[-1] == "joules per sample"
    assert all(trial.values[3] == pytest.approx(100 / trial.values[0]) for trial in study.trials)


def test_writing_again_changes_nothing_and_new_rows_make_it_anew(url: str) -> None:
    early = [row for row in ROWS if row.pair is None or row.pair < 3]
    write_pareto(url, SPEC, early)
    before = stored(url)
    write_pareto(url, SPEC, early)
    assert stored(url)._study_id == before._study_id
    write_pareto(url, SPEC, ROWS)
    assert stored(url).trials[0].user_attrs["processes"] == 7


def test_a_study_of_that_name_that_is_not_ours_is_left_alone(url: str) -> None:
    optuna.create_study(study_name=NAME, storage=open_storage(url))
    assert not write_pareto(url, SPEC, ROWS)
    assert not stored(url).trials


def test_nothing_is_written_of_a_study_that_ran_nothing(url: str) -> None:
    assert not write_pareto(url, SPEC, [])
    assert pareto_points(SPEC, []) == []


# -- several processes, and exits


CUT_SHORT = """
import os, sys
from sqlalchemy import Engine, event
from tests.store.test_pareto import ROWS, SPEC
from tuner.commands.pareto import write_pareto

def cut_before(commit, spec):
    left = [commit]
    @event.listens_for(Engine, "commit")
    def counted(connection):
        left[0] -= 1
        if not left[0]:
            os._exit(9)
    write_pareto(sys.argv[1], spec, ROWS)

def in_a_fork(work, *args):
    child = os.fork()
    if not child:
        work(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for commit in range(1, 60):
    spec = SPEC.model_copy(update={"name": f"cut-{commit}"})
    ended = in_a_fork(cut_before, commit, spec)
    assert in_a_fork(write_pareto, sys.argv[1], spec, ROWS) == 0, commit
    print(spec.name)
    if ended == 0:
        break
    assert ended == 9, ended
"""
TOGETHER = """
import sys
from tests.store.test_pareto import ROWS, SPEC
from tuner.commands.pareto import write_pareto

sys.stdin.readline()
rows = ROWS if sys.argv[2] == "all" else [row for row in ROWS if row.pair is None]
print(write_pareto(sys.argv[1], SPEC, rows))
"""


def spawn(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_exit_between_any_two_writes_is_made_good_by_the_next_one(url: str) -> None:
    """The study made and nothing in it; its name said; some of its trials; all but the last word."""
    storage = open_storage(url)
    said, errors = spawn(CUT_SHORT, url).communicate(timeout=200)
    names = said.split()
    assert len(names) > 8, errors
    for name in names:
        study = optuna.load_study(study_name=f"{name}-pareto", storage=storage)
        assert len(study.trials) == 2, name
        assert study.user_attrs[pareto.OF_ATTR] == name
        assert CONTENT_ATTR in study.user_attrs


def test_processes_that_finish_one_study_together_all_end_well(url: str) -> None:
    """Two that saw other rows are among them: the last one's word stands, whole."""
    open_storage(url)
    workers = [spawn(TOGETHER, url, "all" if number % 2 else "some") for number in range(4)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        said, errors = worker.communicate(timeout=120)
        assert (worker.returncode, said, errors) == (0, "True\n", "")
    assert len(stored(url).trials) == 2
    assert stored(url).metric_names is not None
    assert CONTENT_ATTR in stored(url).user_attrs


def test_an_empty_study_of_several_directions_that_somebody_named_is_left_alone(url: str) -> None:
    made = optuna.create_study(study_name=NAME, storage=open_storage(url), directions=["maximize", "minimize"])
    made.set_user_attr("whose", "mine")
    assert not write_pareto(url, SPEC, ROWS)
    assert stored(url).user_attrs == {"whose": "mine"}

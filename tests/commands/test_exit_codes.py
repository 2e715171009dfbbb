"""Exit codes of trouble: wrong input is 2, and found before anything is trained; a store out of reach is 75."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.conftest import ROOT, RunTuner
from tests.toys import Toy
from tuner.commands.train import check_run_folder, noted
from tuner.contract.config import Cadence, OptimizerConfig, OptimizerName, QualityConfig, RunConfig
from tuner.contract.errors import ConfigError, StoreError, StoreOutage
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeReply
from tuner.contract.tuned import TunedConfig
from tuner.export.tuned import write
from tuner.store.engine import parse_url, readable
from tuner.store.store import StudyStore

TOY = "tests.toys:Toy"
HOLDER = """
import sys, time
from pathlib import Path
from tuner.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def config(**changes: object) -> RunConfig:
    cadence = Cadence(log_samples=64, evaluate_samples=128, checkpoint_samples=128)
    return Toy({}).info().baseline.model_copy(update={"cadence": cadence, "horizon_samples": 256, **changes})


def trained(tuner: RunTuner, folder: Path, asked: RunConfig, *more: str) -> str:
    """The message with which `train` refuses, exit code 2; nothing was trained."""
    write(folder / "asked.yaml", TunedConfig(config=asked))
    ran = tuner("train", "--config", "asked.yaml", "--allow-code", "--out", "run", *more)
    assert ran.code == 2, ran.out + ran.err
    assert "crashed" not in ran.err
    assert not (folder / "run" / "metrics.csv").exists()
    return ran.err


def test_an_unknown_metric_is_found_before_the_training(tuner: RunTuner, tmp_path: Path) -> None:
    said = trained(tuner, tmp_path, config(quality=QualityConfig(metric="acuracy")))
    assert "quality.metric: 'acuracy' is not among this workload's figures; known: valid_fit" in said


def test_a_folder_that_cannot_be_written(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    assert "cannot be written" in trained(tuner, tmp_path, config())


def test_a_folder_in_use_names_who_uses_it(tuner: RunTuner, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with holder(tmp_path / "run") as pid:
        said = trained(tuner, tmp_path, config(), "--confirm")
    assert f"another process is writing this run (process {pid} on" in said
    assert "confirming" not in said


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as held:
        try:
            assert held.stdout is not None
            assert held.stdout.readline() == "held\n"
            yield held.pid
        finally:
            held.kill()


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("seed", {"seed": 5}),
    ("options", {"options": {"width": 8}}),
    ("ema", {"ema": None}),
    ("optimizer.name", {"optimizer": OptimizerConfig(name=OptimizerName.SGD, lr=0.01)}),
]


def test_the_folder_of_another_run_is_refused_before_anything_is_measured(tuner: RunTuner, tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", TunedConfig(config=config()))
    ran = tuner("train", "--config", "first.yaml", "--allow-code", "--out", "run", "--max-samples", "128")
    assert ran.code == 0, ran.err
    for key, changes in OTHERS:
        with pytest.raises(ConfigError, match=f"holds checkpoints of another run \\({key} was"):
            check_run_folder(tmp_path / "run", config(**changes), ())
    check_run_folder(tmp_path / "run", config(horizon_samples=512), ())

    (tmp_path / "run" / "config.yaml").unlink()
    write(tmp_path / "second.yaml", TunedConfig(config=config(seed=5)))
    ran = tuner("train", "--config", "second.yaml", "--allow-code", "--out", "run")
    assert ran.code == 2, ran.err
    assert "holds checkpoints of another run (seed was 0, is now 5)" in ran.err


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("connection failed: connection to server at 127.0.0.1, port 1 failed: Connection refused", StoreOutage),
        ("connection timeout expired", StoreOutage),
        ("server closed the connection unexpectedly", StoreOutage),
        ("the connection is lost", StoreOutage),
        ("terminating connection due to administrator command", StoreOutage),
        ("connection failed: FATAL:  the database system is starting up", StoreOutage),
        ("connection failed: FATAL:  sorry, too many clients already", StoreOutage),
        ("canceling statement due to lock timeout", StoreOutage),
        ("database is locked", StoreOutage),
        ("database or disk is full", StoreOutage),
        ("disk I/O error", StoreOutage),
        ("failed to resolve host 'datbase': [Errno -2] Name or service not known", StoreError),
        ('connection failed: FATAL:  database "studie" does not exist', StoreError),
        ('connection failed: FATAL:  password authentication failed for user "me"', StoreError),
        ("unable to open database file", StoreError),
        ("attempt to write a readonly database", StoreError),
        ("database disk image is malformed", StoreError),
    ],
)
def test_what_comes_back_by_itself_is_no_wrong_input(said: str, kind: type[StoreError]) -> None:
    found = readable(OperationalError("SELECT 1", {}, Exception(said)), parse_url("postgresql://me@db/studies"))
    assert type(found) is kind
    assert found.exit_code == (75 if kind is StoreOutage else 2)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("postgresql://me@127.0.0.1:1/studies", 75),
        ("postgresql://me@no-such-host.invalid/studies", 2),
        ("postgres//me@127.0.0.1/studies", 2),
        ("sqlite:///no/such/store.db", 2),
        ("orcale://me@127.0.0.1/studies", 2),
    ],
)
def test_a_server_that_is_down_and_a_url_that_is_mistyped(tuner: RunTuner, url: str, code: int) -> None:
    ran = tuner("show", "--storage", url)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err


def test_a_locked_store_is_an_outage(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with StudyStore.open(f"sqlite:///{path}", lock_timeout_s=0.1) as store, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreOutage, match="locked by another process"):
            store.add_run(config(), "run")


def test_the_end_of_a_run_is_told_where_it_cannot_be_noted(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    reply = ProbeReply(request_id="r", points=(PointReply(outcome=Outcome.OK),), seconds=1.0)
    with StudyStore.open(f"sqlite:///{path}", lock_timeout_s=0.1) as store:
        run = store.add_run(config(), "run")
        with closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert isinstance(noted(store, run.id, reply), StoreOutage)
        assert noted(store, run.id, reply) is None

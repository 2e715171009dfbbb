"""Whatever ends a run, its last line names the checkpoint that is kept and the command that goes on from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.dying_toys import NAME
from tests.conftest import RunTuner
from tests.engine.engine_toys import toy_config
from tuner.commands.run_state import read_status
from tuner.contract.config import Cadence, RunConfig
from tuner.contract.documents import write_mapping
from tuner.contract.production import RunStatus


def dying(folder: Path, death: str, at: int) -> Path:
    """Its file; steps are of two loss calls and 16 samples, a checkpoint comes every 64 samples."""
    cadence = Cadence(log_samples=64, checkpoint_samples=64)
    config: RunConfig = toy_config(horizon_samples=320, cadence=cadence, workload=NAME)
    config = config.model_copy(update={"options": {"samples": 64, "death": death, "at": at}})
    path = folder / f"{death}.yaml"
    path.write_text(write_mapping(config.model_dump(mode="json")))
    return path


@pytest.mark.parametrize(
    ("death", "says"),
    [
        ("exit0", "ended without a result (exit code 0)"),
        ("exit42", "ended with exit code 42"),
        ("segfault", "segmentation fault"),
        ("kill", "killed by signal 9"),
        ("abort", "aborted"),
        ("host", "the worker host"),
        ("raise", "told to fail"),
    ],
)
def test_a_run_that_dies_names_its_checkpoint_and_how_to_go_on(
    death: str, says: str, tuner: RunTuner, tmp_path: Path
) -> None:
    file = dying(tmp_path, death, at=20)
    ran = tuner("train", "--config", file.name, "--allow-code", "--out", "run")
    assert ran.code == 3, ran.err
    first, *_, last = ran.err[ran.err.index("tuner: ") :].splitlines()
    assert says in first
    assert first.endswith("The checkpoint step-000000000128 is kept.")
    assert last == f"go on with: tuner train --config {file.name} --out run --allow-code"
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.status, status.checkpoint) == (RunStatus.FAILED, "checkpoints/step-000000000128")
    assert "step-000000000128 is kept" in status.reason


def test_a_run_that_dies_before_its_first_checkpoint_says_so(tuner: RunTuner, tmp_path: Path) -> None:
    ran = tuner("train", "--config", dying(tmp_path, "exit0", at=2).name, "--allow-code", "--out", "run")
    assert ran.code == 3
    assert "There is no checkpoint yet." in ran.err
    assert "go on with" not in ran.err


def test_a_killed_rank_s_run_names_its_checkpoint(tuner: RunTuner, tmp_path: Path) -> None:
    file = dying(tmp_path, "kill", at=10)
    ran = tuner("train", "--config", file.name, "--allow-code", "--out", "run", "--nproc", "2")
    assert ran.code == 3
    assert "crashed: rank" in ran.err
    assert "The checkpoint step-000000000128 is kept." in ran.err
    assert f"go on with: tuner train --config {file.name} --out run --nproc 2 --allow-code" in ran.err

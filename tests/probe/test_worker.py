"""The worker's doors: one request in a fresh interpreter, and many from a process that only imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.contract.allowance import usable_cores
from tuner.contract.config import OptimizerConfig, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import EVENT, Event, Finished, PhaseEvent, PointReply, ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.probe.launch import worker_environment
from tuner.probe.runner import SubprocessRunner

ROOT = Path(__file__).resolve().parents[2]
TELLS = "tests.probe.telling:Tells"


def request(workload: str = "tests.toys:Toy", *, threads: int = 1, seed: int = 0, **options: str) -> ProbeRequest:
    config = RunConfig(
        workload=workload,
        options=dict(options),
        micro_batch_size=8,
        optimizer=OptimizerConfig(lr=1e-3),
        horizon_samples=100,
        threads=threads,
        seed=seed,
    )
    return ProbeRequest(
        id="one",
        kind=ProbeKind.COMPUTE,
        workload=workload,
        options=dict(options),
        points=(config,),
        limits=ProbeLimits(measure_s=0.2, min_steps=4),
        device="cpu",
    )


def one_shot(text: str, *words: str) -> tuple[list[Event], subprocess.CompletedProcess[str]]:
    command = [sys.executable, "-m", "tuner.worker", "--request", *words]
    ran = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=120, check=False)
    return [EVENT.validate_json(line) for line in ran.stdout.splitlines()], ran


def test_one_request_by_hand(tmp_path: Path) -> None:
    asked = tmp_path / "request.json"
    asked.write_text(request("tests.faulty:Chatty").to_json(), encoding="utf-8")
    events, ran = one_shot("", str(asked))
    assert ran.returncode == 0
    assert "not from the engine" in ran.stderr, "what the workload prints stays out of the events"
    assert [event.index for event in events if isinstance(event, PointReply)] == [0]
    assert isinstance(events[-1], Finished)
    assert {"import", "build", "measure"} <= set(events[-1].phases_s)
    assert events[0] == PhaseEvent(phase="import")


def test_a_request_that_is_none_is_told_so() -> None:
    events, ran = one_shot('{"id": "x", "kind": "guess"}', "-")
    assert ran.returncode == 0
    (reply,) = (event for event in events if isinstance(event, PointReply))
    assert reply.outcome is Outcome.BAD_INPUT
    assert "request: kind:" in reply.message


def test_secrets_and_stores_stay_in_the_parent(tmp_path: Path) -> None:
    secrets = {
        "TUNER_STORAGE": "postgresql+psycopg://me@host/db",
        "TUNER_STORAGE_PASSWORD_FILE": "/run/secret",
        "PGPASSWORD": "canary",
        "MYSQL_PWD": "canary",
        "MY_STORE": "postgresql+psycopg://me:canary@host/db",
        "WANDB_SECRET": "canary",
    }
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "HTTP_PROXY": "http://proxy:3128"}
    environment = worker_environment(secrets | kept, tmp_path, threads=2)
    assert not set(secrets) & set(environment)
    assert "canary" not in json.dumps(environment)
    assert kept.items() <= environment.items()


def test_a_worker_gets_what_measuring_needs(tmp_path: Path) -> None:
    environment = worker_environment({}, tmp_path, threads=3)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    assert int(environment["MALLOC_MMAP_THRESHOLD_"]) >= 1 << 30
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) >= 1 << 30
    assert environment["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    assert environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("isolation", ["forkserver", "fresh"])
def test_every_probe_starts_the_same(tmp_path: Path, isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "canary")
    told: list[dict[str, object]] = []
    with SubprocessRunner(tmp_path / "cache", isolation=isolation, log_dir=tmp_path / "logs", trust=ANY_CODE) as runner:  # type: ignore[arg-type]
        for threads, seed in ((1, 7), (0, 7), (2, 8))[: 3 if isolation == "forkserver" else 2]:
            out = tmp_path / f"{threads}-{seed}.json"
            reply = runner.run(request(TELLS, threads=threads, seed=seed, out=str(out)))
            assert reply.points[0].outcome is Outcome.OK, reply.points[0]
            told.append(json.loads(out.read_text()))
    assert [one["threads"] for one in told] == [1, usable_cores(), 2][: len(told)]
    assert told[0]["draws"] == told[1]["draws"]
    assert all(one["draws"] != told[0]["draws"] for one in told[2:])
    assert len({str(one["pid"]) for one in told}) == len(told)
    for one in told:
        assert one["session_leader"] is True
        assert one["cuda_initialized"] is False
        assert "canary" not in str(one["environment"])
        assert one["stdin"] == ""
        assert os.path.basename(str(one["stdout"])).startswith("one-")


def test_a_request_and_its_log_lie_beside_each_other(tmp_path: Path) -> None:
    with SubprocessRunner(tmp_path / "cache", isolation="fresh", log_dir=tmp_path / "logs", trust=ANY_CODE) as runner:
        runner.run(request("tests.no_such_module:X").model_copy(update={"id": "../../evil id"}))
    names = sorted(path.suffix for path in (tmp_path / "logs").iterdir() if not path.name.startswith("host"))
    assert names == [".json", ".log"]
    assert not list(tmp_path.glob("*evil*"))

"""`tuner train` before and after trouble: the choice confirmed on the machine at hand, and a run that goes on with a
leaner configuration when memory runs out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.commands.watched_toys import NAME, Moody
from tests.conftest import RunTuner
from tests.search.simulated_world import make_spec
from tuner.commands.train_confirm import Settled, candidates, choose, settle, with_fallbacks
from tuner.commands.train_fallback import advice, gone_on, needs_less, next_leaner
from tuner.commands.train_words import TrainWords
from tuner.contract.base import Scalar, parse_json
from tuner.contract.choice import Confirmation, Fallbacks
from tuner.contract.config import Cadence, CompileMode, LoaderConfig, Precision, RunConfig
from tuner.contract.errors import JobFailed
from tuner.contract.measurement import Environment, Interval, Outcome
from tuner.contract.probe import DescribeEvent, PointReply, ProbeKind, ProbeReply, ProbeRequest
from tuner.contract.production import RunStatus
from tuner.contract.tuned import Confirmed, Promise, Provenance, TunedConfig
from tuner.export.tuned import load, write
from tuner.store.store import StudyStore

QUIET = Console(file=io.StringIO())
ENVIRONMENT = Environment(
    tuner="0", python="3", torch="2", device="NVIDIA A100", cpu="other", cpu_count=8, threads=8, host="elsewhere"
)
PROMISE = Promise(
    samples_per_s=Interval(value=9e9, low=8.9e9, high=9.1e9),
    peak_bytes=1 << 40,
    peak_low_bytes=1 << 40,
    peak_high_bytes=1 << 40,
    hours=1.0,
    gain=Interval(value=2.0, low=1.9, high=2.1),
)


def moody(micro: int, accumulation: int, options: dict[str, Scalar], **changes: Any) -> RunConfig:
    baseline = Moody({}).info().baseline
    update = {
        "workload": NAME,
        "options": options,
        "micro_batch_size": micro,
        "accumulation_steps": accumulation,
        "threads": 1,
        "cadence": Cadence(log_samples=160, checkpoint_samples=160),
        **changes,
    }
    return baseline.model_copy(update=update)


def tuned(options: dict[str, Scalar], *, measured_on: str = "NVIDIA A100") -> TunedConfig:
    provenance = Provenance(
        study="elsewhere",
        target="NVIDIA A100",
        measured_on=measured_on,
        transfer="measured",
        reason="It was the fastest there.",
        decision="winner",
        probes=9,
        baseline_digest="0" * 12,
        environment=ENVIRONMENT,
        tuner="0",
        created="2026-01-01",
    )
    return TunedConfig(
        config=moody(8, 2, options),
        promise=PROMISE,
        provenance=provenance,
        runner_ups=(moody(4, 4, options), moody(2, 8, options)),
        runner_up_peaks=(1 << 39, 1 << 38),
        baseline=moody(16, 1, options),
    )


def test_a_file_measured_elsewhere_is_confirmed_here_and_the_fastest_runs(tuner: RunTuner, tmp_path: Path) -> None:
    """The file's choice is slow here, and the baseline does not fit."""
    write(tmp_path / "best.yaml", tuned({"slow_batch": 8, "oom_batch": 16}))
    words = ("train", "--config", "best.yaml", "--allow-code", "--out", "run", "--confirm-seconds", "0.2", "--json")
    ran = tuner(*words, "--max-samples", "320")
    assert ran.code == 0, ran.err
    kept = parse_json(Confirmation, (tmp_path / "run" / "confirmed.json").read_text())
    outcomes = {side.config.batch_label: side.outcome for side in kept.sides}
    assert outcomes == {"8x2": Outcome.OK, "4x4": Outcome.OK, "2x8": Outcome.OK, "16x1": Outcome.OOM_HOST}
    assert all(len(side.samples_per_s) == 2 for side in kept.sides if side.outcome is Outcome.OK)
    assert kept.chosen.micro_batch_size in (2, 4)
    assert "faster here than the file's choice" in kept.reason
    assert kept.reason in ran.err
    assert "oom_host" in ran.err

    promised = ran.json["promised_samples_per_s"]
    assert promised["low"] < promised["value"] < 1e9
    assert ran.json["confirmed"]["chosen"]["micro_batch_size"] == kept.chosen.micro_batch_size
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        (run,) = store.runs()
    assert run.config == kept.chosen
    assert run.promise is not None
    assert run.promise.confirmed == kept.sides

    settled = settle(load(tmp_path / "best.yaml"), TrainWords(), tmp_path / "run", OnlyDescribes(kept.device), QUIET)  # type: ignore[arg-type]
    assert settled.confirmed == kept
    assert settled.tuned.config == kept.chosen


class OnlyDescribes:
    """A runner that says which machine this is, and measures nothing."""

    def __init__(self, name: str) -> None:
        self._device = make_spec().device.model_copy(update={"kind": "cuda", "name": name})

    def run(self, request: ProbeRequest) -> ProbeReply:
        assert request.kind is ProbeKind.DESCRIBE, "a folder that was confirmed is not probed again"
        described = DescribeEvent(device=self._device, environment=ENVIRONMENT)
        return ProbeReply(request_id=request.id, points=(), seconds=0.0, description=described)


def test_out_of_memory_the_run_falls_back_to_what_needs_less_and_stays_there(tuner: RunTuner, tmp_path: Path) -> None:
    write(tmp_path / "best.yaml", tuned({"oom_batch": 4, "oom_call": 50}))
    words = ("train", "--config", "best.yaml", "--allow-code", "--out", "run", "--no-confirm", "--json")
    ran = tuner(*words, "--max-samples", "800", "--fallback")
    assert ran.code == 0, ran.err
    assert ran.json["samples"] == 800
    kept = parse_json(Fallbacks, (tmp_path / "run" / "fallback.json").read_text())
    assert [(step.ended.batch_label, step.chosen.batch_label) for step in kept.steps] == [("8x2", "2x8")]
    assert kept.steps[0].samples == 400
    assert "where the other was measured at" in kept.steps[0].why
    assert ran.json["resumed_from"] == 400
    assert ran.json["fallbacks"][0]["outcome"] == "oom_host"
    assert "falling back from 8x2" in ran.err
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        found = [(run.config.batch_label, run.status) for run in store.runs()]
    assert sorted(found) == [("2x8", RunStatus.FINISHED), ("8x2", RunStatus.FAILED)]

    asked = load(tmp_path / "best.yaml")
    assert gone_on(Settled(asked, asked), tmp_path / "run", QUIET).tuned.config == kept.steps[-1].chosen
    other = asked.model_copy(update={"config": moody(8, 2, {})})
    assert gone_on(Settled(other, other), tmp_path / "run", QUIET).tuned == other


def test_without_the_option_the_message_tells_of_it() -> None:
    asked = tuned({})
    words, out = TrainWords(config=Path("best.yaml"), allow_code=True), Path("my run")
    ended = PointReply(outcome=Outcome.OOM_HOST, message="no memory")
    text = advice(Settled(asked, asked), ended, words, out)
    assert "go on with a runner-up that needs less memory (2x8" in text
    assert text.endswith("tuner train --config best.yaml --allow-code --out 'my run' --fallback")
    leanest = with_fallbacks(Settled(asked, asked), asked.runner_ups[1], ())
    assert "no runner-up is left that needs less memory than 2x8" in advice(leanest, ended, words, out)
    assert not advice(leanest, ended.model_copy(update={"outcome": Outcome.CRASHED}), words, out)


def side(origin: Any, config: RunConfig, rates: tuple[float, ...], outcome: Outcome = Outcome.OK) -> Confirmed:
    return Confirmed(origin=origin, config=config, samples_per_s=rates, outcome=outcome, peak_bytes=1)


WINNER, SMALLER = moody(8, 2, {}), moody(4, 4, {})


@pytest.mark.parametrize(
    ("own", "other", "chosen", "said"),
    [
        ((100.0, 101.0), (90.0, 95.0), WINNER, "the fastest of them"),
        ((100.0, 101.0), (101.0, 102.0), WINNER, "not clearly faster"),
        ((100.0, 100.0), (130.0, 101.0), WINNER, "not clearly faster"),
        ((100.0, 100.0), (110.0, 112.0), SMALLER, "faster here than the file's choice"),
    ],
)
def test_the_file_s_choice_stays_unless_another_is_clearly_faster(
    own: tuple[float, ...], other: tuple[float, ...], chosen: RunConfig, said: str
) -> None:
    found, reason = choose([side("winner", WINNER, own), side("runner-up", SMALLER, other)])
    assert found.config == chosen
    assert said in reason


def test_what_does_not_run_here_drops_out_and_none_left_is_a_clear_failure() -> None:
    lost = side("winner", WINNER, (), Outcome.OOM_HOST)
    found, reason = choose([lost, side("runner-up", SMALLER, (50.0, 51.0))])
    assert found.config == SMALLER
    assert "ended with oom_host here" in reason
    with pytest.raises(JobFailed, match="none of the file's configurations could be run") as failure:
        choose([lost, side("runner-up", SMALLER, (), Outcome.UNSUPPORTED)])
    assert "--no-confirm" in str(failure.value)


def test_only_the_same_training_is_a_candidate() -> None:
    """Another effective batch or another model is left out; the optimizer and the schedule stay the file's."""
    other_lr = WINNER.optimizer.model_copy(update={"lr": 0.5, "fused": True})
    asked = TunedConfig(
        config=WINNER,
        runner_ups=(
            moody(4, 4, {}, optimizer=other_lr),
            moody(8, 4, {}),
            moody(8, 2, {"width": 8}),
            WINNER,
        ),
    )
    names = [(origin, config.batch_label, config.optimizer.lr) for origin, config in candidates(asked)]
    assert names == [("winner", "8x2", 1e-3), ("runner-up", "4x4", 1e-3)]
    assert candidates(asked)[1][1].optimizer.fused


def test_what_really_needs_less() -> None:
    peaks = {WINNER.digest(): 1000 << 20, SMALLER.digest(): 900 << 20}
    assert "900 MiB" in needs_less(SMALLER, WINNER, peaks)
    assert not needs_less(SMALLER, WINNER, {**peaks, SMALLER.digest(): 970 << 20})
    assert "micro-batch is 4 instead of 8" in needs_less(SMALLER, WINNER, {})
    assert not needs_less(WINNER, SMALLER, {})
    recomputing = moody(8, 2, {}, gradient_checkpointing=True)
    assert "gradient checkpointing" in needs_less(recomputing, WINNER, {})
    assert not needs_less(SMALLER, recomputing, {})
    assert not needs_less(moody(4, 4, {}, precision=Precision.BF16), WINNER, {})
    assert not needs_less(moody(4, 4, {}, compile=CompileMode.DEFAULT), WINNER, {})
    many = moody(8, 2, {}, loader=LoaderConfig(num_workers=4))
    assert "keeps 0 samples ready instead of 64" in needs_less(WINNER, many, {}, on_host=True)


def test_it_falls_back_until_none_is_left(tmp_path: Path) -> None:
    asked = tuned({})
    ended = PointReply(outcome=Outcome.OOM_DEVICE, message="no memory", values={"samples": 64.0})
    following = next_leaner(Settled(asked, asked), ended, tmp_path, QUIET)
    assert following is not None
    assert following.tuned.config.batch_label == "2x8"
    assert following.tuned.promise is None
    assert next_leaner(following, ended, tmp_path, QUIET) is None
    middle = with_fallbacks(Settled(asked, asked), asked.runner_ups[0], ())
    assert next_leaner(middle, ended, tmp_path, QUIET) is not None
    crashed = ended.model_copy(update={"outcome": Outcome.CRASHED})
    assert next_leaner(Settled(asked, asked), crashed, tmp_path, QUIET) is None
    assert len(json.loads((tmp_path / "fallback.json").read_text())["steps"]) == 1

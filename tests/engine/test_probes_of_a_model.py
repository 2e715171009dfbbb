"""Quality after equal samples, the profile of a step, inference; and that a point's own options build its own model."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.engine_toys import answer, replies, toy_config, toy_trainer
from tests.engine.judged_toys import Judged
from tests.toys import Toy
from tuner.contract.config import EmaConfig, Precision, QualityConfig, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import NoticeEvent, PointReply, ProbeKind, TrainPlan, TrainResult
from tuner.contract.workload import Batch, Term
from tuner.engine.probes import without_slow_average
from tuner.engine.profiling import PARTS, TimedParts

SMALL = {"width": 8, "depth": 1, "samples": 128}
LARGE = {"width": 48, "depth": 3, "samples": 128}


def parameters(options: Mapping[str, Any]) -> int:
    return sum(p.numel() for p in Toy(options).model().parameters())


def only(*points: RunConfig, kind: ProbeKind, workload: type[Toy] = Toy, **words: Any) -> PointReply:
    (reply,) = replies(answer(kind, *points, workload=workload, **words))
    return reply


def ok(reply: PointReply) -> PointReply:
    assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"
    return reply


@pytest.mark.parametrize("kind", [ProbeKind.QUALITY, ProbeKind.COMPUTE, ProbeKind.END_TO_END, ProbeKind.INFERENCE])
def test_a_points_own_options_build_its_own_model(kind: ProbeKind) -> None:
    points = [toy_config(SMALL), toy_config(LARGE), toy_config(SMALL)]
    found = [ok(reply) for reply in replies(answer(kind, *points, options=LARGE, samples=64))]
    counts = [reply.measurement.parameters for reply in found if reply.measurement is not None]
    assert counts == [parameters(SMALL), parameters(LARGE), parameters(SMALL)]


def test_training_and_the_trace_take_the_points_options_too(tmp_path: Path) -> None:
    plan = TrainPlan(out_dir=str(tmp_path))
    small = toy_config(SMALL, horizon_samples=64)
    events = answer(ProbeKind.TRAIN, small, options=LARGE, train=plan)
    (result,) = [event for event in events if isinstance(event, TrainResult)]
    assert result.measurement.parameters == parameters(SMALL)
    both = replies(answer(ProbeKind.TRACE, toy_config(SMALL), toy_config(LARGE), options=SMALL))
    less, more = (ok(reply).values["predicted_peak_bytes"] for reply in both)
    assert less < more


def test_quality_gives_the_validation_figures_after_equal_samples() -> None:
    short, longer = (
        ok(only(toy_config(), kind=ProbeKind.QUALITY, samples=samples)).values["valid_fit"] for samples in (64, 2048)
    )
    assert longer < short
    again = ok(only(toy_config(), kind=ProbeKind.QUALITY, samples=64))
    assert again.values == {"valid_fit": short}
    other = ok(only(toy_config(seed=3), kind=ProbeKind.QUALITY, samples=64))
    assert other.values["valid_fit"] != short


def test_quality_assesses_only_where_the_metric_asks_for_it() -> None:
    asked = toy_config(quality=QualityConfig(metric="sharpness"))
    assert ok(only(asked, kind=ProbeKind.QUALITY, workload=Judged, samples=64)).values["sharpness"] == 0.5
    plain = ok(only(toy_config(), kind=ProbeKind.QUALITY, workload=Judged, samples=64))
    assert plain.values.keys() == {"valid_fit"}


def test_an_average_too_slow_for_a_short_run_is_left_out() -> None:
    """Otherwise the probe would judge the initial weights."""
    slow = toy_config(ema=EmaConfig(half_life_samples=1_000_000, warmup_ratio=0.0))
    assert without_slow_average(slow, 1024).ema is None
    raw = ok(only(slow, kind=ProbeKind.QUALITY, samples=1024)).values
    assert raw == ok(only(toy_config(ema=None), kind=ProbeKind.QUALITY, samples=1024)).values
    for quick in (EmaConfig(half_life_samples=1_000_000, warmup_ratio=0.05), EmaConfig(half_life_samples=400)):
        assert without_slow_average(toy_config(ema=quick), 1024).ema == quick


def test_a_quality_probe_that_diverges_says_so() -> None:
    wild = toy_config({"fail": "nan", "fail_call": 1})
    reply = only(wild, kind=ProbeKind.QUALITY, samples=512)
    assert (reply.outcome, reply.values) == (Outcome.DIVERGED, {})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as source:
        return list(csv.DictReader(source))


def test_a_profile_shows_where_the_steps_time_goes(tmp_path: Path) -> None:
    """Two milliseconds an item in the loader, twenty in the loss: the shares must tell which is which."""
    slow_loader = toy_config({"load_s": 0.002, "samples": 64})
    events = answer(ProbeKind.PROFILE, slow_loader, out_dir=str(tmp_path / "loader"))
    (reply,) = replies(events)
    values = ok(reply).values
    shares = {part: values[f"share_{part}"] for part in PARTS}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares, key=lambda part: shares[part]) == "data_wait"
    assert values["step_s"] > 16 * 0.002
    assert any(str(tmp_path / "loader") in event.text for event in events if isinstance(event, NoticeEvent))
    slow_loss = ok(only(toy_config({"sleep_s": 0.02}), kind=ProbeKind.PROFILE, out_dir=str(tmp_path / "loss"))).values
    assert slow_loss["share_forward"] > 0.5


def test_a_profile_leaves_a_trace_and_tables_people_can_open(tmp_path: Path) -> None:
    ok(only(toy_config(), kind=ProbeKind.PROFILE, out_dir=str(tmp_path)))
    with gzip.open(tmp_path / "trace.json.gz") as source:
        events = json.load(source)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"data_wait", "transfer", "forward", "backward", "optimizer", "ema"} <= names
    assert any(event["name"] == "aten::addmm" for event in events if "name" in event)
    for row in table(tmp_path / "steps.csv"):
        assert sum(float(row[f"{part}_s"]) for part in PARTS) == pytest.approx(float(row["total_s"]), abs=1e-6)
    operators = {row["operator"]: row for row in table(tmp_path / "operators.csv")}
    assert float(operators["aten::addmm"]["calls_per_step"]) == 2 * 4  # two micro-batches, four linear layers
    assert "forward" in (tmp_path / "profile.txt").read_text()


def test_each_of_several_profiles_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    points = toy_config(SMALL), toy_config(LARGE)
    assert all(ok(reply) for reply in replies(answer(ProbeKind.PROFILE, *points, out_dir=str(tmp_path))))
    assert {path.parent.name for path in tmp_path.glob("*/trace.json.gz")} == {"0", "1"}


def test_a_profile_without_a_folder_names_the_option() -> None:
    reply = only(toy_config(), kind=ProbeKind.PROFILE)
    assert reply.outcome is Outcome.BAD_INPUT
    assert reply.message.startswith("out_dir: ")


def test_profiling_a_run_does_not_change_what_it_computes() -> None:
    plain, watched = toy_trainer(toy_config()), toy_trainer(toy_config())
    watched.annotate(TimedParts(watched.device))
    for _ in range(3):
        assert torch.equal(plain.step().losses["total"], watched.step().losses["total"])
    plain.close()
    watched.close()


def test_inference_tells_latency_and_throughput_of_what_fits() -> None:
    values = ok(only(toy_config(), kind=ProbeKind.INFERENCE, workload=Judged)).values
    assert 0 < values["latency_b1_p50_s"] <= values["latency_b1_p95_s"]
    assert {f"samples_per_s_b{size}" for size in (1, 4, 16, 64)} <= values.keys()
    assert values["samples_per_s_b64"] > values["samples_per_s_b1"]
    assert values["largest_batch"] == 64
    assert values["peak_bytes"] > 0


def test_inference_without_predict_times_the_loss_and_bf16_is_what_is_run() -> None:
    seen: list[tuple[int, bool, bool]] = []

    class Watching(Toy):
        def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
            seen.append((len(batch["x"]), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            assert not model.training
            return super().loss(model, batch)

    reply = only(toy_config(precision=Precision.BF16), kind=ProbeKind.INFERENCE, workload=Watching)
    if reply.outcome is Outcome.UNSUPPORTED:
        pytest.skip("not run: this CPU has no bf16")
    ok(reply)
    assert {size for size, _, _ in seen} == {1, 4, 16, 64}
    assert all(cast and not grad for _, cast, grad in seen)


def test_a_batch_that_does_not_fit_ends_the_list_and_is_told() -> None:
    class Large(Judged):
        def predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
            if len(batch["x"]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
            return super().predict(model, batch)

    events = answer(ProbeKind.INFERENCE, toy_config(), workload=Large)
    (reply,) = replies(events)
    assert ok(reply).values["largest_batch"] == 4
    assert "samples_per_s_b16" not in reply.values
    (text,) = [event.text for event in events if isinstance(event, NoticeEvent)]
    assert "batch 16 does not fit (oom_device" in text


def test_a_sample_that_does_not_fit_is_the_outcome() -> None:
    class Huge(Judged):
        def predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    assert only(toy_config(), kind=ProbeKind.INFERENCE, workload=Huge).outcome is Outcome.OOM_DEVICE


def test_an_assessment_that_fails_does_not_fail_the_soak() -> None:
    class Clumsy(Judged):
        def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
            raise ValueError("no classifier here")

    events = answer(ProbeKind.END_TO_END, toy_config(), workload=Clumsy, soak=True)
    (reply,) = replies(events)
    measurement = ok(reply).measurement
    assert measurement is not None
    assert "assess" in measurement.phases_s
    assert any("no classifier here" in event.text for event in events if isinstance(event, NoticeEvent))

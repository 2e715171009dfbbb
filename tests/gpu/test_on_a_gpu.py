"""The engine on a real CUDA device: arithmetic, graphs, clocks, memory, resuming."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
import torch

from benchmarks.gpu_fault_jobs import Hungry
from tests.engine.engine_toys import toy_config
from tests.toys import Toy
from tuner.contract.config import CompileMode, LoaderConfig, Precision, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeLimits, ProbeRequest
from tuner.engine.compiling import compile_problems
from tuner.engine.device import describe
from tuner.engine.trainer import Trainer
from tuner.probe.runner import SubprocessRunner

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
"""What torch itself warns of on a device (TF32 that is off, say) is no fault of ours."""

MIB = 1 << 20


def losses(config: RunConfig, device: torch.device, steps: int = 8) -> list[float]:
    """Total loss of the first steps."""
    trainer = Trainer(Toy(config.options), config, device=device)
    try:
        return [float(trainer.step().losses["total"]) for _ in range(steps)]
    finally:
        trainer.close()
        torch._dynamo.reset()


def probe(
    runner: SubprocessRunner, kind: ProbeKind, points: Sequence[RunConfig], cap_bytes: int | None = None
) -> tuple[PointReply, ...]:
    """The replies of a probe on the GPU, in a process of its own."""
    limits = ProbeLimits(measure_s=0.5, min_steps=4, deadline_s=120.0, memory_bytes=cap_bytes)
    request = ProbeRequest(
        id=f"gpu-{kind.value}",
        kind=kind,
        workload=points[0].workload,
        points=tuple(points),
        limits=limits,
        device="cuda",
    )
    return runner.run(request).points


def hungry(hold_mib: int) -> RunConfig:
    """Four samples that hold so much between them."""
    options = {"hold_kib": 256 * hold_mib}
    return Hungry(options).info().baseline.model_copy(update={"options": options, "threads": 1})


def test_the_device_is_described_as_it_is(cuda: torch.device) -> None:
    found = describe()
    assert (found.kind, found.problem) == ("cuda", None)
    assert found.name == torch.cuda.get_device_name(cuda)
    assert found.memory_bytes >= found.free_bytes > 0
    assert Precision.FP16 in found.dtypes


@pytest.mark.parametrize("precision", list(Precision))
def test_every_precision_of_the_device_learns(cuda: torch.device, precision: Precision) -> None:
    if precision not in describe().dtypes:
        pytest.skip(f"not run: {torch.cuda.get_device_name(cuda)} has no {precision.value}")
    found = losses(toy_config(precision=precision), cuda, steps=60)
    exact = losses(toy_config(), cuda, steps=60)
    assert sum(found[-10:]) < sum(found[:10])
    assert found[:4] == pytest.approx(exact[:4], rel=0.02)


@pytest.mark.parametrize("mode", [CompileMode.DEFAULT, CompileMode.REDUCE_OVERHEAD, CompileMode.CUDAGRAPHS])
def test_a_compile_mode_computes_what_eager_does(cuda: torch.device, mode: CompileMode) -> None:
    """8 x 2: gradients of two micro-batches meet, which graphs that are replayed must not lose."""
    if problem := compile_problems(cuda).get(mode):
        pytest.skip(f"not run: {problem}")
    fixed = {"ragged": False}
    assert losses(toy_config(fixed, compile=mode), cuda) == pytest.approx(losses(toy_config(fixed), cuda), rel=1e-3)


def test_a_step_that_overflows_in_fp16_is_skipped(cuda: torch.device) -> None:
    config = toy_config({"fail": "nan", "fail_call": 6}, precision=Precision.FP16)
    trainer = Trainer(Toy(config.options), config, device=cuda)
    try:
        for _ in range(8):
            trainer.step()
        assert all(bool(torch.isfinite(parameter).all()) for parameter in trainer.parameters)
        assert trainer.loss_scale is not None
        assert trainer.loss_scale < 65536.0
    finally:
        trainer.close()


def test_step_times_are_the_devices_own(cuda: torch.device) -> None:
    config = toy_config()
    trainer = Trainer(Toy({}), config, device=cuda)
    try:
        trainer.step()
        trainer.clock.take(wait=True)
        began = time.perf_counter()
        for _ in range(50):
            trainer.step()
        taken = trainer.clock.take(wait=True)
        wall_s = time.perf_counter() - began
    finally:
        trainer.close()
    assert len(taken) == 50
    assert 0 < sum(taken) <= 1.05 * wall_s


def test_a_run_goes_on_from_its_state(cuda: torch.device) -> None:
    config = toy_config(precision=Precision.FP16)
    whole = losses(config, cuda, steps=12)
    first = Trainer(Toy({}), config, device=cuda)
    for _ in range(6):
        first.step()
    state = first.state_dict()
    second = Trainer(Toy({}), config, device=cuda)
    second.load_state_dict(state)
    rest = [float(second.step().losses["total"]) for _ in range(6)]
    first.close()
    second.close()
    assert rest == pytest.approx(whole[6:], rel=1e-4)


def test_probes_are_forked_and_tell_of_the_device(gpu_runner: SubprocessRunner) -> None:
    (point,) = probe(gpu_runner, ProbeKind.COMPUTE, [toy_config()])
    assert point.outcome is Outcome.OK, point.message
    assert gpu_runner.isolation == "forkserver", "importing torch has touched CUDA"
    assert point.measurement is not None
    memory = point.measurement.memory
    assert memory.reserved_bytes is not None
    assert memory.reserved_bytes >= (memory.allocated_bytes or 0) > 0


def test_a_loader_with_pinned_memory_feeds_the_device(gpu_runner: SubprocessRunner) -> None:
    loader = LoaderConfig(num_workers=2, pin_memory=True)
    (point,) = probe(gpu_runner, ProbeKind.END_TO_END, [toy_config(loader=loader)])
    assert point.outcome is Outcome.OK, point.message


def test_what_does_not_fit_the_cap_is_told_and_the_next_point_runs(gpu_runner: SubprocessRunner) -> None:
    points = [hungry(64), hungry(800), hungry(2048), hungry(64)]
    found = probe(gpu_runner, ProbeKind.COMPUTE, points, cap_bytes=1024 * MIB)
    assert [point.outcome for point in found] == [Outcome.OK, Outcome.OK, Outcome.OOM_DEVICE, Outcome.OK]


def test_a_trace_foretells_what_the_allocator_holds(gpu_runner: SubprocessRunner) -> None:
    (traced,) = probe(gpu_runner, ProbeKind.TRACE, [hungry(1024)])
    (ran,) = probe(gpu_runner, ProbeKind.COMPUTE, [hungry(1024)])
    assert ran.measurement is not None
    allocated = ran.measurement.memory.allocated_bytes
    assert allocated is not None
    assert traced.values["predicted_peak_bytes"] == pytest.approx(allocated, rel=0.1)

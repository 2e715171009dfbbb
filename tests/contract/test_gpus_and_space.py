"""The table of GPUs, and what it rules out of a search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.contract.config import CompileMode, LoaderConfig, OptimizerConfig, Precision, RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.gpu import DeviceInfo, GpuProfile, detected_profile, gpu_profile, gpu_profiles
from tuner.contract.space import Knob, SearchSpace, grid, knob_value, with_knobs

NAMES = ["cpu", "p100", "v100", "t4", "rtx3090", "rtx4090", "a10", "l4", "a100-40", "a100-80", "h100", "h200"]
BASELINE = RunConfig(
    workload="x", micro_batch_size=8, accumulation_steps=2, optimizer=OptimizerConfig(lr=1e-4), horizon_samples=1000
)


def device(**update: object) -> DeviceInfo:
    here = DeviceInfo(
        kind="cpu",
        name="a CPU",
        memory_bytes=16 << 30,
        free_bytes=12 << 30,
        host_bytes=16 << 30,
        host_free_bytes=12 << 30,
        cpu_name="a CPU",
        cpu_count=2,
        torch="2.13",
        dtypes=(Precision.FP32, Precision.BF16),
        compile_problems={"reduce-overhead": "needs CUDA", "cudagraphs": "needs CUDA"},
    )
    return here.model_copy(update=update)


def test_every_promised_gpu_is_there_in_order() -> None:
    assert list(gpu_profiles()) == NAMES


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_row_is_complete_and_sane(name: str) -> None:
    row = gpu_profile(name)
    assert row.kind == "cuda"
    assert row.memory_bytes is not None
    assert 10e9 < row.memory_bytes < 200e9
    assert row.capability is not None
    assert set(row.peak_flops) == {dtype.value for dtype in row.dtypes}
    assert all(5e12 < flops < 2e15 for flops in row.peak_flops.values())
    assert row.peak_flops["fp16"] > row.peak_flops["fp32"]
    assert row.bandwidth_bytes_per_s is not None
    assert 1e11 < row.bandwidth_bytes_per_s < 1e13
    assert {"memory", "peak_flops", "bandwidth", "dtypes", "compile_modes"} <= set(row.sources)
    assert row.wheels


@pytest.mark.parametrize("name", NAMES[1:])
def test_bf16_and_tf32_start_with_ampere_and_triton_with_volta(name: str) -> None:
    row = gpu_profile(name)
    assert row.capability is not None
    assert (Precision.BF16 in row.dtypes) == (Precision.TF32 in row.dtypes) == (row.capability >= (8, 0))
    assert (CompileMode.DEFAULT in row.compile_modes) == (row.capability >= (7, 0))
    assert bool(row.compile_note) == (len(row.compile_modes) < len(CompileMode))


def test_a_p100_is_what_the_guide_trains_on() -> None:
    row = gpu_profile("p100")
    assert row.memory_bytes == 16280 << 20
    assert row.dtypes == (Precision.FP32, Precision.FP16)
    assert row.compile_modes == (CompileMode.EAGER, CompileMode.CUDAGRAPHS)


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'p1000'.*p100.*h200.*auto"):
        gpu_profile("p1000")


@pytest.mark.parametrize(
    ("name", "memory", "capability", "row"),
    [
        ("Tesla P100-PCIE-16GB", 17066885120, (6, 0), "p100"),
        ("NVIDIA A100-SXM4-80GB", 84987740160, (8, 0), "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 42405855232, (8, 0), "a100-40"),
        ("NVIDIA GeForce RTX 4090", 25386352640, (8, 9), "rtx4090"),
        ("NVIDIA H200", 150109880320, (9, 0), "h200"),
        ("Tesla V100-SXM2-32GB", 34079637504, (7, 0), "auto"),
        ("NVIDIA RTX A5000", 25425608704, (8, 6), "auto"),
    ],
)
def test_auto_finds_the_row_of_the_device(name: str, memory: int, capability: tuple[int, int], row: str) -> None:
    here = device(kind="cuda", name=name, memory_bytes=memory, capability=capability, compile_problems={})
    found = detected_profile(here)
    assert found.name == row
    assert found.memory_bytes == memory


def test_auto_without_a_gpu_is_the_cpu() -> None:
    assert detected_profile(device()).name == "cpu"


def reasons(space: SearchSpace, gpu: str, effective: int | None = 16) -> tuple[SearchSpace, dict[tuple[str, str], str]]:
    left, dropped = space.restrict(gpu_profile(gpu), device(), BASELINE, effective)
    return left, {(item.knob.value, item.value): f"{item.because}: {item.reason}" for item in dropped}


def test_what_a_p100_cannot_do_is_dropped_with_the_reason() -> None:
    left, why = reasons(SearchSpace(precision=tuple(Precision), compile=tuple(CompileMode)), "p100")
    assert left.precision == (Precision.FP32,)
    assert left.compile == (CompileMode.EAGER,)
    assert why["precision", "bf16"] == "target: Tesla P100 PCIe 16 GB has no bf16 (compute capability 6.0)"
    assert why["precision", "fp16"].startswith("device: cannot be measured here: a CPU")
    assert "7.0" in why["compile", "default"]
    assert why["compile", "default"].startswith("target: ")
    assert why["compile", "cudagraphs"] == "device: cannot be measured here: needs CUDA"


def test_batches_that_break_the_effective_batch_are_dropped() -> None:
    left, why = reasons(SearchSpace(micro_batch_size=(1, 3, 8, 16, 32)), "cpu")
    assert left.micro_batch_size == (1, 8, 16)
    assert list(why) == [("micro_batch_size", "3"), ("micro_batch_size", "32")]
    free, why_free = reasons(SearchSpace(micro_batch_size=(3, 32), effective_batch_size=(32, 96)), "cpu", None)
    assert free.micro_batch_size == (3, 32)
    assert free.effective_batch_size == (32, 96)
    assert why_free == {}


def test_workers_beyond_the_host_are_dropped() -> None:
    left, why = reasons(SearchSpace(num_workers=(0, 2, 4, 8)), "cpu")
    assert left.num_workers == (0, 2, 4)
    assert "2 cores" in why["num_workers", "8"]


def test_everything_dropped_is_said_once_and_gone() -> None:
    space = SearchSpace(precision=tuple(Precision), compile=tuple(CompileMode), micro_batch_size=tuple(range(1, 33)))
    for name in NAMES:
        left, dropped = space.restrict(gpu_profile(name), device(), BASELINE, 16)
        for knob in (Knob.PRECISION, Knob.COMPILE, Knob.MICRO_BATCH_SIZE):
            gone = [item.value for item in dropped if item.knob is knob]
            assert len(gone) == len(set(gone))
            kept = [str(value) for value in getattr(left, knob.value)]
            assert sorted(gone + kept) == sorted(str(value) for value in getattr(space, knob.value))


@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from(list(CompileMode)), st.booleans(), st.integers(0, 4))
def test_changing_knobs_keeps_the_effective_batch(micro: int, mode: CompileMode, fused: bool, workers: int) -> None:
    wanted = {Knob.MICRO_BATCH_SIZE: micro, Knob.COMPILE: mode, Knob.FUSED: fused, Knob.NUM_WORKERS: workers}
    config = with_knobs(BASELINE, wanted)
    assert config.effective_batch_size == BASELINE.effective_batch_size
    assert {knob: knob_value(config, knob) for knob in wanted} == wanted
    assert config.optimizer.lr == BASELINE.optimizer.lr


def test_an_undividing_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 does not divide the effective batch size 16"):
        with_knobs(BASELINE, {Knob.MICRO_BATCH_SIZE: 3})


def test_the_effective_batch_changes_only_when_asked() -> None:
    config = with_knobs(BASELINE, {Knob.EFFECTIVE_BATCH_SIZE: 32})
    assert (config.micro_batch_size, config.accumulation_steps) == (8, 4)


def test_a_grid_holds_the_baseline_and_nothing_twice() -> None:
    space = SearchSpace(num_workers=(0, 2), prefetch_factor=(2, 4))
    configs = list(grid(space, BASELINE, [Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR]))
    assert BASELINE.canonical() in configs
    assert len(configs) == len({config.digest() for config in configs}) == 3  # prefetch is idle without workers


def test_idle_settings_do_not_make_a_configuration_different() -> None:
    idle = BASELINE.model_copy(update={"loader": LoaderConfig(num_workers=0, prefetch_factor=8)})
    assert idle != BASELINE
    assert idle.canonical() == BASELINE.canonical()


def test_a_profile_row_is_closed() -> None:
    with pytest.raises(ValueError, match="colour"):
        GpuProfile.model_validate(
            {"name": "x", "label": "x", "kind": "cpu", "dtypes": [], "compile_modes": [], "colour": 1}
        )

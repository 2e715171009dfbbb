"""Every exception becomes one outcome and one line; a real out-of-memory is survived."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch

from tests.engine.engine_toys import answer, make_request, read_events, replies, start_apart, toy_config
from tests.toys import Toy
from tuner.contract.config import LoaderConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeLimits
from tuner.engine.failure import Diverged, LoaderFailed, Unsupported, classify, details, release
from tuner.engine.limits import memory_cap
from tuner.search.lr import exploded


class BackendCompilerFailed(RuntimeError):
    """Stands in for torch's own: same module, no compiler needed."""


BackendCompilerFailed.__module__ = "torch._dynamo.exc"


def caused(outer: BaseException, cause: BaseException) -> BaseException:
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Outcome.OOM_DEVICE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), Outcome.OOM_DEVICE),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), Outcome.OOM_HOST),
        (MemoryError(), Outcome.OOM_HOST),
        (RuntimeError("std::bad_alloc"), Outcome.OOM_HOST),
        (OSError(12, "Cannot allocate memory"), Outcome.OOM_HOST),
        (caused(BackendCompilerFailed("backend failed"), MemoryError("std::bad_alloc")), Outcome.OOM_HOST),
        (BackendCompilerFailed("CppCompileError: gcc said no"), Outcome.COMPILE_ERROR),
        (caused(LoaderFailed("x"), OSError("item 3 cannot be read")), Outcome.LOADER_ERROR),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."), Outcome.LOADER_ERROR),
        (NotImplementedError("\"conv\" not implemented for 'Half'"), Outcome.UNSUPPORTED),
        (Unsupported("compile: no"), Outcome.UNSUPPORTED),
        (Diverged("nan"), Outcome.DIVERGED),
        (WorkloadError("--data: no such folder"), Outcome.BAD_INPUT),
        (caused(LoaderFailed("x"), WorkloadError("--data a.png: no picture")), Outcome.BAD_INPUT),
        (ValueError("a bug"), Outcome.CRASHED),
    ],
)
def test_one_outcome_for_each_exception(error: BaseException, outcome: Outcome) -> None:
    found, message = classify(error)
    assert found is outcome
    assert "\n" not in message
    assert message


def test_releasing_an_exception_frees_what_its_frames_hold() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        large = torch.ones(1000)
        kept.append(weakref.ref(large))
        raise ValueError("died holding a tensor")

    try:
        fails()
    except ValueError as error:
        caught = error
    assert "died holding" in details(caught)
    assert kept[0]() is not None
    release(caught)
    gc.collect()
    assert kept[0]() is None


def test_a_real_out_of_memory_costs_only_its_own_point(tmp_path: Path) -> None:
    """Under a cap of 200 MiB: 8 samples of 64 MiB do not fit, and the points around them are answered."""
    heavy = toy_config({"ballast_bytes": 64 << 20})
    request = make_request(
        ProbeKind.COMPUTE, toy_config(), heavy, toy_config(), limits=ProbeLimits(measure_s=0.2, memory_bytes=200 << 20)
    )
    found = replies(read_events(start_apart(request, tmp_path)))
    assert [reply.outcome for reply in found] == [Outcome.OK, Outcome.OOM_HOST, Outcome.OK]
    assert "can't allocate memory" in found[1].message
    assert found[1].detail


@pytest.mark.parametrize("kind", [ProbeKind.COMPUTE, ProbeKind.END_TO_END, ProbeKind.LR])
def test_a_loss_that_is_not_finite_is_diverged(kind: ProbeKind) -> None:
    (reply,) = replies(answer(kind, toy_config({"fail": "nan", "fail_call": 3}), samples=128))
    assert reply.outcome is Outcome.DIVERGED
    assert "finite" in reply.message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_raises_is_a_loader_error(workers: int) -> None:
    point = toy_config({"fail": "loader"}, loader=LoaderConfig(num_workers=workers))
    for kind in (ProbeKind.LOADER, ProbeKind.END_TO_END):
        (reply,) = replies(answer(kind, point))
        assert reply.outcome is Outcome.LOADER_ERROR
        assert "cannot be read" in reply.message


def test_an_exploding_rate_is_vetoed() -> None:
    point = toy_config()
    mad = point.model_copy(update={"optimizer": point.optimizer.model_copy(update={"lr": 5.0})})
    (reply,) = replies(answer(ProbeKind.LR, mad, samples=512))
    assert reply.measurement is not None
    assert exploded([loss for loss in reply.measurement.losses["total"] if math.isfinite(loss)])


def test_unknown_options_speak_for_themselves() -> None:
    point = toy_config().model_copy(update={"options": {"widht": 3}})
    (reply,) = replies(answer(ProbeKind.COMPUTE, point, workload=Toy))
    assert reply.outcome is Outcome.BAD_INPUT
    assert "'widht' is not known" in reply.message
    assert reply.detail == ""


def test_a_refused_scratch_of_onednn_is_an_out_of_memory_under_a_cap_and_a_crash_without() -> None:
    def failing(cap_bytes: int | None) -> Outcome:
        try:
            with memory_cap(cap_bytes, torch.device("cpu")):
                raise RuntimeError("could not execute a primitive")
        except Exception as error:
            return classify(error)[0]

    assert failing(1 << 30) is Outcome.OOM_HOST
    assert failing(None) is Outcome.CRASHED

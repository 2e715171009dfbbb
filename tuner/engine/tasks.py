"""One request -> its events: what the worker process calls. Every failure of a point is a reply, not an exception."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tuner.contract.base import Scalar
from tuner.contract.config import OptimizerName, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.probe import DescribeEvent, NoticeEvent, ProbeKind, ProbeRequest, ProgressEvent
from tuner.contract.workload import WorkloadInfo
from tuner.engine import inference, noise, probes, profiling, proofs, two_cuts
from tuner.engine.bench import Bench, failed
from tuner.engine.device import choose_device, describe, environment
from tuner.engine.distributed import Rank, joined, rank_index
from tuner.engine.following import follow
from tuner.engine.hooks import Emit, Phases
from tuner.engine.limits import memory_cap
from tuner.engine.notices import told
from tuner.engine.optim import makes_optimizer
from tuner.engine.production import train
from tuner.engine.pulse import Pulse
from tuner.prepared import locked

_PROBES: Mapping[ProbeKind, Callable[[Bench], None]] = {
    ProbeKind.LOADER: probes.loader,
    ProbeKind.COMPUTE: probes.compute,
    ProbeKind.LR: probes.lr,
    ProbeKind.NOISE: noise.noise,
    ProbeKind.QUALITY: probes.quality,
    ProbeKind.PROFILE: profiling.profile,
    ProbeKind.INFERENCE: inference.inference,
    ProbeKind.END_TO_END: probes.end_to_end,
    ProbeKind.TRACE: proofs.trace,
    ProbeKind.EQUIVALENCE: two_cuts.equivalence,
}


def run(request: ProbeRequest, workload_class: type[Any] | None, emit: Emit) -> None:
    """Do what `request` asks with workloads of `workload_class`, telling everything through `emit`.

    Points are answered by PointReply, whatever happens to them; a describe or prepare that fails raises
    WorkloadError or what the workload raised. A describe without a workload describes the machine alone.
    """
    if request.cache_dir:
        os.environ["TUNER_CACHE"] = request.cache_dir
    with told(emit):
        _run(request, workload_class, emit)


def _run(request: ProbeRequest, workload_class: type[Any] | None, emit: Emit) -> None:
    make = _maker(workload_class, emit)
    if request.kind is ProbeKind.DESCRIBE:
        _describe(request, workload_class, emit)
    elif request.kind is ProbeKind.PREPARE:
        Phases(emit).enter("build")
        make(request.options)
    else:
        _answer(request, make, emit)


def _answer(request: ProbeRequest, make: Callable[[Mapping[str, Scalar]], Any], emit: Emit) -> None:
    cpu = torch.device("cpu")
    try:
        device = choose_device(request.device, rank_index())
        with joined(request.points[0] if request.points else None, device) as rank:
            _work(request, rank, make, device, emit)
    except Exception as error:
        reply = failed(0, error, cpu)
        for index in range(max(1, len(request.points))):
            emit(reply.model_copy(update={"index": index}))


def _work(
    request: ProbeRequest, rank: Rank, make: Callable[[Mapping[str, Scalar]], Any], device: torch.device, emit: Emit
) -> None:
    """This rank's part of a request. What rank 0 prepares the others find in the cache."""

    def make_in_order(options: Mapping[str, Scalar]) -> Any:
        with rank.first_goes_first():
            return make(options)

    if request.kind is not ProbeKind.TRAIN:
        with Pulse() as pulse:
            _PROBES[request.kind](Bench(request, make_in_order, device, emit, pulse.take))
        return
    point: RunConfig = request.points[0]
    with memory_cap(request.limits.memory_bytes, device):
        workload = make_in_order(point.options or request.options)
        if rank.world_size > 1 and workload.info().batch_coupled:
            emit(NoticeEvent(level="warning", text=_coupled(point)))
        (train if rank.leads else follow)(request, workload, device, emit)


def _coupled(config: RunConfig) -> str:
    return (
        "samples of a micro-batch influence each other in this workload (batch_coupled): each of the "
        f"{config.world_size} ranks computes over its own {config.micro_batch_size} samples, as accumulation does, "
        "and running statistics are those of rank 0"
    )


def _maker(workload_class: type[Any] | None, emit: Emit) -> Callable[[Mapping[str, Scalar]], Any]:
    """Options -> a workload whose data is ready."""
    if workload_class is None:
        raise_later = WorkloadError("--workload: this request needs a workload")

        def refuse(options: Mapping[str, Scalar]) -> Any:  # noqa: ARG001
            raise raise_later

        return refuse

    def make(options: Mapping[str, Scalar]) -> Any:
        workload = workload_class(dict(options))
        _prepare(workload, emit)
        return workload

    return make


def _describe(request: ProbeRequest, workload_class: type[Any] | None, emit: Emit) -> None:
    info = described(workload_class(dict(request.options))) if workload_class is not None else None
    device = describe(request.device)
    kind = torch.device("cuda", 0) if device.kind == "cuda" else torch.device("cpu")
    emit(DescribeEvent(device=device, info=info, environment=environment(kind)))


def described(workload: Any) -> WorkloadInfo:
    """Its `info`. Where it makes its own optimizer and does not say after which one its lr scales, none is assumed."""
    info: WorkloadInfo = workload.info()
    optimizer = info.baseline.optimizer
    if not makes_optimizer(workload) or "name" in optimizer.model_fields_set:
        return info
    own = optimizer.model_copy(update={"name": OptimizerName.OWN})
    return info.model_copy(update={"baseline": info.baseline.model_copy(update={"optimizer": own})})


def _prepare(workload: Any, emit: Emit) -> None:
    """In every process, under a lock between them: the first one makes the data, the others find it cached."""
    if not hasattr(workload, "prepare"):
        return
    folder = Path(os.environ.get("TUNER_CACHE") or Path.home() / ".cache" / "tuner")

    def progress(done: int, total: int, text: str) -> None:
        emit(ProgressEvent(done=done, total=total, text=text))

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: progress(0, 0, "waiting for another process to prepare")):
            workload.prepare(folder, progress)
    except OSError as error:
        raise WorkloadError(f"prepare: {error.filename or folder}: {error.strerror or error}") from error

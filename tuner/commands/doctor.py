"""`tuner doctor`: what this machine is, whether torch can use its GPU, and what stands in the way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.typed import first_study
from tuner.contract.config import CompileMode
from tuner.contract.errors import JobFailed, TunerError
from tuner.contract.gpu import DeviceInfo, detected_profile
from tuner.contract.probe import DescribeEvent, ProbeKind, ProbeRequest, Stage

if TYPE_CHECKING:
    from rich.console import Console


def run(storage: str | None, *, as_json: bool) -> None:
    """The whole command. Raises JobFailed (3) when a GPU is present and cannot be used."""
    console = speak.make_console(as_json=as_json)
    described = examine()
    device = described.device
    store = store_state(storage)
    if as_json:
        data = {"device": device.model_dump(mode="json"), "environment": described.environment.model_dump(mode="json")}
        speak.emit_json(json.dumps({**data, "profile": detected_profile(device).name, "store": store}, indent=2))
    show(device, store, first_study(storage), console)
    if device.problem:
        raise JobFailed(f"{device.problem} {device.advice or ''}".rstrip())


def examine() -> DescribeEvent:
    """The machine as a worker sees it, without any workload."""
    runner = setup.make_runner("fresh")
    try:
        reply = runner.run(ProbeRequest(id="doctor", kind=ProbeKind.DESCRIBE, stage=Stage.SETUP, workload=""))
    finally:
        runner.close()
    if reply.description is None:
        point = reply.points[0] if reply.points else None
        raise JobFailed(
            f"torch cannot be started here: {point.message if point else ''}\n{point.detail if point else ''}"
        )
    return reply.description


def store_state(storage: str | None) -> str:
    try:
        return f"ok, {len(setup.open_for_reading(storage).study_names())} studies"
    except TunerError as error:
        return str(error)


def show(device: DeviceInfo, store: str, ready: str, console: Console) -> None:
    profile = detected_profile(device)
    lines = {
        "machine": f"{device.cpu_name}, {device.cores}, {speak.mib(device.host_bytes)} "
        f"({speak.mib(device.host_free_bytes)} free)",
        "torch": f"{device.torch}"
        + (f", CUDA {device.cuda}, driver {device.driver}" if device.cuda else ", CPU build"),
        "device": _device(device),
        "profile": f"{profile.name} ({profile.label})",
        "dtypes": ", ".join(precision.value for precision in device.dtypes),
        "store": store,
    }
    for name, text in [*lines.items(), *(("limit", text) for text in device.limits)]:
        console.print(f"{name:<10}{text}")
    for mode in CompileMode:
        problem = device.compile_problems.get(mode.value)
        console.print(
            f"compile   {mode.value:<16} {'no: ' + problem if problem else 'yes'}", style="dim" if problem else ""
        )
    if device.problem:
        console.print(f"problem   {device.problem}", style="red")
        console.print(f"advice    {device.advice or ''}")
    else:
        console.print(f"ready     {ready}", style="green")


def _device(device: DeviceInfo) -> str:
    if device.kind == "cpu":
        return "no CUDA device; probes run on the CPU"
    capability = ".".join(map(str, device.capability or ()))
    return (
        f"{device.name}, capability {capability}, "
        f"{speak.mib(device.memory_bytes)} ({speak.mib(device.free_bytes)} free); "
        f"this torch build has kernels for {', '.join(device.arch_list)}"
    )

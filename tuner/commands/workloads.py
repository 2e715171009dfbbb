"""`tuner workloads`: what is registered, each described by itself in a worker process."""

from __future__ import annotations

import json

from tuner.commands import console as speak
from tuner.commands import setup
from tuner.contract.errors import WorkloadError


def run(*, as_json: bool) -> None:
    from tuner.registry import known_workloads

    console = speak.make_console(as_json=as_json)
    runner = setup.make_runner("forkserver")
    found = []
    try:
        for name in (entry.name for entry in known_workloads()):
            try:
                info = setup.describe(name, {}, runner).info
            except WorkloadError as error:
                console.print(f"{name}: cannot be described: {error}", style="yellow")
                continue
            if info is not None:
                found.append(info)
                console.print(f"{name}  {info.summary}")
                console.print(
                    f"  baseline {info.baseline.label}, {info.train_samples:,} {info.unit}s, preset {info.preset}"
                )
    finally:
        runner.close()
    if as_json:
        speak.emit_json(json.dumps({"workloads": [info.model_dump(mode="json") for info in found]}, indent=2))

"""The documents of a run's folder that say what was run, where, and what was promised: config.yaml, data.json,
environment.json and promise.json, each written aside and moved."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tuner.contract.config import RunConfig
from tuner.contract.documents import load_json, write_mapping
from tuner.contract.fingerprint import DATA_FILE, MOST_KEPT, RunData
from tuner.contract.own_files import replace_text
from tuner.contract.probe import TrainPlan
from tuner.contract.production import CONFIG_FILE
from tuner.contract.result import plain_json
from tuner.engine.device import environment

ENVIRONMENT, PROMISE = "environment.json", "promise.json"
PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "diffusers", "transformers", "tensorboard")
GIT_S = 5.0
"""A repository on a slow disk must not hold up a run."""
EARLIER = 50
"""So many earlier environments of a much resumed run are kept."""


def write_documents(config: RunConfig, plan: TrainPlan, device: torch.device, resumed_from: int) -> None:
    """Say in the folder what runs here from now on. Raises OSError."""
    out = Path(plan.out_dir)
    comment = "The configuration of this run, as it was started last. Go on with it:\n" + (
        plan.command or _command(config, out)
    )
    replace_text(out / CONFIG_FILE, write_mapping(config.model_dump(mode="json"), comment))
    replace_text(out / DATA_FILE, run_data(out).resumed(plan.data, resumed_from).model_dump_json(indent=1) + "\n")
    place = _with_earlier(out, _place(config, plan, device, resumed_from))
    replace_text(out / ENVIRONMENT, json.dumps(place, indent=2) + "\n")
    if plan.promise is not None:
        replace_text(out / PROMISE, plain_json(plan.promise) + "\n")
    else:
        (out / PROMISE).unlink(missing_ok=True)


def run_data(out: Path) -> RunData:
    """What the run in `out` has learned from; nothing is known of a run without such a file. Raises ConfigError."""
    return load_json(RunData, out / DATA_FILE, MOST_KEPT) or RunData()


def _command(config: RunConfig, out: Path) -> str:
    """What goes on with a run that no command has started."""
    code = ["--allow-code"] if ":" in config.workload else []
    return shlex.join(["tuner", "train", "--config", str(out / CONFIG_FILE), "--out", str(out), *code])


def _place(config: RunConfig, plan: TrainPlan, device: torch.device, resumed_from: int) -> dict[str, Any]:
    """Device, versions, host and code of this invocation."""
    cuda = device.type == "cuda"
    return {
        "run": plan.run_id,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        **environment(device).model_dump(mode="json"),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "packages": _versions(),
        "code": code_of(config.workload),
    }


def _with_earlier(out: Path, now: dict[str, Any]) -> dict[str, Any]:
    """`now`, and under `earlier` what the file said before: a run may be resumed elsewhere."""
    before: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((out / ENVIRONMENT).read_text(encoding="utf-8"))
    earlier = before.pop("earlier", []) if isinstance(before, dict) else []
    return {**now, "earlier": [*([before] if before else []), *earlier][:EARLIER]}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_of(workload: str) -> dict[str, str | None]:
    """Where the workload's code lies, and its git commit (`-dirty`: with changes on top); null where it has none."""
    module = workload.partition(":")[0]
    folder = _folder_of(module) if ":" in workload else _folder_of(_registered(module))
    return {"folder": folder, "commit": _commit(folder) if folder else None}


def _registered(name: str) -> str:
    """The module behind a registered name; empty when there is none."""
    points = metadata.entry_points(group="tuner.workloads", name=name)
    return next((point.module for point in points), "")


def _folder_of(module: str) -> str | None:
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        found = importlib.util.find_spec(module) if module else None
        if found is not None and found.origin:
            return str(Path(found.origin).parent)
    return None


def _commit(folder: str) -> str | None:
    words = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looking must not get into the way of somebody's commit
    try:
        ran = subprocess.run(
            words, capture_output=True, text=True, timeout=GIT_S, check=False, stdin=subprocess.DEVNULL, env=quiet
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None

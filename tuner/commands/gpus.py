"""`tuner gpus`: the profile table."""

from __future__ import annotations

import json

from tuner.commands import console as speak
from tuner.contract.config import Precision
from tuner.contract.gpu import gpu_profiles


def run(*, as_json: bool) -> None:
    profiles = gpu_profiles().values()
    if as_json:
        speak.emit_json(json.dumps({"gpus": [profile.model_dump(mode="json") for profile in profiles]}, indent=2))
        return
    from rich.table import Table

    table = Table(title="GPU profiles (peak in TFLOP/s, dense; `tuner gpus --json` has every figure's source)")
    for column in ("name", "GPU", "memory", "capability", *(p.value for p in Precision), "GB/s", "compile modes"):
        table.add_column(column, justify="right" if column not in ("name", "GPU", "compile modes") else "left")
    for profile in profiles:
        peaks = [_tera(profile.peak_flops.get(p.value)) if p in profile.dtypes else "no" for p in Precision]
        table.add_row(
            profile.name,
            profile.label,
            f"{profile.memory_bytes / (1 << 30):.1f} GiB" if profile.memory_bytes else "the host's",
            ".".join(map(str, profile.capability)) if profile.capability else "-",
            *peaks,
            f"{profile.bandwidth_bytes_per_s / 1e9:,.0f}" if profile.bandwidth_bytes_per_s else "-",
            ", ".join(mode.value for mode in profile.compile_modes),
        )
    speak.make_console(as_json=False).print(table)


def _tera(flops: float | None) -> str:
    return f"{flops / 1e12:,.1f}" if flops else "yes"

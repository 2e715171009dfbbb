"""The options that several commands share, as Typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Workload = Annotated[
    str, typer.Option("--workload", "-w", help="A registered name (`tuner workloads`) or `module:Class`.")
]
Gpu = Annotated[
    str,
    typer.Option("--gpu", "-g", help="The GPU to choose for: a name from `tuner gpus`, or `auto` = this machine's."),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        envvar="TUNER_STORAGE",
        help="SQLAlchemy URL of the study store.",
        show_default="sqlite:///studies/studies.db",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the workload itself; repeatable."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="tiny or full, or another size that the workload has.", show_default="full with CUDA, tiny without"
    ),
]
Data = Annotated[Path | None, typer.Option(help="Your own data, in the workload's format.")]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        max=1 << 16,
        help="Ranks on this machine, a GPU each where there are any; the effective batch is kept.",
        show_default="the configuration's world_size",
    ),
]
Isolation = Annotated[str, typer.Option(help="forkserver (imports once) or fresh (a new interpreter per probe).")]

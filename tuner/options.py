"""The options that several commands share, as Typer reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tuner.contract.errors import ConfigError

MOST_LETTERS, MOST_IN_ALL = 255, 4000
"""Bytes of one part of a path, and of all of it, on the file systems of today."""


def path_option(*names: str, help: str, show_default: bool | str = True) -> Any:
    """An option whose value is a path; text that can be no path anywhere is refused in one place."""
    return typer.Option(*names, parser=_path_of(names[0]), metavar="PATH", help=help, show_default=show_default)


def _path_of(option: str) -> Callable[[str], Path]:
    def parse(text: str) -> Path:
        if not text:
            raise ConfigError(f"{option}: the path of a file or folder is expected (got '')")
        longest = max((len(os.fsencode(part)) for part in text.split(os.sep)), default=0)
        if longest > MOST_LETTERS or len(os.fsencode(text)) > MOST_IN_ALL:
            raise ConfigError(
                f"{option}: a path has at most {MOST_LETTERS} letters between two slashes, and {MOST_IN_ALL} in all "
                f"(got {len(text)}: {text[:40]!r}...)"
            )
        return Path(text)

    return parse


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
Data = Annotated[Path | None, path_option("--data", help="Your own data, in the workload's format.")]
AcceptNewData = Annotated[
    bool,
    typer.Option("--accept-new-data", help="Go on though the data are not those it was begun with; it is noted."),
]
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
Wait = Annotated[
    bool,
    typer.Option(
        "--wait/--no-wait",
        help="Where another command measures or trains on this device: wait for it, or refuse (exit code 75).",
    ),
]
Isolation = Annotated[str, typer.Option(help="forkserver (imports once) or fresh (a new interpreter per probe).")]

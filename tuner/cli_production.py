"""Words -> commands, for production runs. Everything heavy is imported inside a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.options import Data, Isolation, Json, Options, Preset, Storage


def add_to(app: typer.Typer) -> None:
    """Give `app` the commands of this page."""
    app.command(epilog=TRAIN)(train)


TRAIN = (
    "Examples:\n\n"
    "    tuner train --config studies/latent_cfg/best.p100.yaml\n\n"
    "    tuner train --config best.yaml --max-hours 8 --out runs/night\n\n"
    "    tuner train --workload gpt2 --preset tiny --max-minutes 5"
)


def train(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="best.GPU.yaml, or a bare run configuration.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", "-w", help="Instead of --config: train this workload's baseline.")
    ] = None,
    preset: Preset = None,
    data: Data = None,
    option: Options = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; an existing one is resumed.", show_default="runs/WORKLOAD-DIGEST"),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="End with a checkpoint after this many samples.")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(min=0.0, help="End with a checkpoint after this time.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="The same in minutes.")] = None,
    storage: Storage = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the file name code as `module:Class`; it is imported and run.")
    ] = False,
    isolation: Isolation = "forkserver",
    json: Json = False,
) -> None:
    """Run the job with a configuration; resumes by itself."""
    from tuner.commands import train as command
    from tuner.commands.train_words import TrainWords, job_words

    command.run(
        TrainWords(
            config=config,
            job=job_words(workload, preset, data, tuple(option or ()), isolation),
            out=out,
            max_samples=max_samples,
            max_hours=max_hours,
            max_minutes=max_minutes,
            storage=storage,
            allow_code=allow_code,
            isolation=isolation,
        ),
        as_json=json,
    )

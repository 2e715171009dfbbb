"""Words -> commands, for production runs. Everything heavy is imported inside a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.options import AcceptNewData, Data, Isolation, Json, Nproc, Options, Preset, Storage, Wait, path_option


def add_to(app: typer.Typer) -> None:
    """Give `app` the commands of this page."""
    app.command(epilog=TRAIN)(train)
    app.command(epilog=RUNS)(runs)


TRAIN = (
    "Examples:\n\n"
    "    tuner train --config studies/latent_cfg/best.p100.yaml\n\n"
    "    tuner train --config best.yaml --max-hours 8 --out runs/night --fallback\n\n"
    "    tuner train --workload gpt2 --preset tiny --max-minutes 5\n\n"
    "    tuner train --config best.yaml --nproc 2"
)


def train(
    config: Annotated[
        Path | None, path_option("--config", "-c", help="best.GPU.yaml, or a bare run configuration.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", "-w", help="Instead of --config: train this workload's baseline.")
    ] = None,
    preset: Preset = None,
    data: Data = None,
    option: Options = None,
    out: Annotated[
        Path | None,
        path_option("--out", help="Run folder; an existing one is resumed.", show_default="runs/WORKLOAD-DIGEST"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start a new run beside the one in the folder, in OUT-2, OUT-3 ...")
    ] = False,
    accept_new_data: AcceptNewData = False,
    max_samples: Annotated[
        int | None, typer.Option(min=1, max=1 << 53, help="End with a checkpoint after this many samples.")
    ] = None,
    max_hours: Annotated[
        float | None,
        typer.Option(min=0.0, max=8784.0, help="End with a checkpoint after this time, counted anew at every start."),
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, max=527040.0, help="The same in minutes.")] = None,
    background_checkpoints: Annotated[
        bool,
        typer.Option(
            "--background-checkpoints",
            help="Write checkpoints beside the training, from a copy of the state (as much memory again).",
        ),
    ] = False,
    confirm: Annotated[
        bool | None,
        typer.Option(
            "--confirm/--no-confirm",
            help="Measure the file's choice, its runner-ups and the baseline on this machine first, and run the best.",
            show_default="only if the file was measured on another device",
        ),
    ] = None,
    confirm_seconds: Annotated[
        float, typer.Option(min=0.1, max=3600.0, help="Seconds of each of those measurements; there are two of each.")
    ] = 5.0,
    fallback: Annotated[
        bool,
        typer.Option("--fallback", help="Out of memory: go on from the checkpoint with a runner-up that needs less."),
    ] = False,
    nproc: Nproc = None,
    storage: Storage = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="TensorBoard event files in the run folder too.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let the file name code as `module:Class`; it is imported and run.")
    ] = False,
    wait: Wait = True,
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
            fresh=fresh,
            accept_new_data=accept_new_data,
            max_samples=max_samples,
            max_hours=max_hours,
            max_minutes=max_minutes,
            background_checkpoints=background_checkpoints,
            confirm=confirm,
            confirm_s=confirm_seconds,
            fallback=fallback,
            nproc=nproc,
            storage=storage,
            tensorboard=tensorboard,
            allow_code=allow_code,
            wait=wait,
            isolation=isolation,
        ),
        as_json=json,
    )


RUNS = (
    "Examples:\n\n"
    "    tuner runs\n\n"
    "    tuner runs --workload gpt2 --limit 5\n\n"
    "    tuner runs 3f2a91 --json\n\n"
    "A run shown as died says it is running, but its process is gone; with a checkpoint the same command goes on."
)


def runs(
    run: Annotated[
        str | None, typer.Argument(help="One run, by its id or the beginning of it; without it, all of them.")
    ] = None,
    workload: Annotated[str | None, typer.Option("--workload", "-w", help="Only this workload's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many, the newest first.")] = 20,
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Production runs: what was promised, what was reached, which can go on; or one with its loss curve."""
    from tuner.commands import runs as command

    command.run(run, workload, limit, storage, as_json=json)

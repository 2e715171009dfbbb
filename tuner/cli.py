"""Words -> commands. Everything heavy is imported inside a command, so that `--help` answers at once.
The only place that prints an error and exits.

Exit codes: docs/production.md.
"""

from __future__ import annotations

import contextlib
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` has put the current folder there: nothing of ours is looked for in it

from tuner import importing

importing.current_folder_last()

from pathlib import Path
from typing import Annotated

import typer

from tuner import cli_production, stopping
from tuner.contract.errors import TunerError
from tuner.options import (
    AcceptNewData,
    Data,
    Gpu,
    Isolation,
    Json,
    Nproc,
    Options,
    Preset,
    Storage,
    Wait,
    Workload,
    path_option,
)

app = typer.Typer(
    name="tuner",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find the fastest safe configuration of a PyTorch training job, then run that job.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="First run: tuner optimize --workload latent_cfg --gpu auto",
)


@app.command(
    epilog="Examples:\n\n"
    "    tuner optimize -w latent_cfg --gpu p100\n\n"
    "    tuner optimize -w latent_cfg --gpu auto --budget 10m --json > result.json\n\n"
    "    tuner optimize -w mypackage.jobs:Job --gpu t4 --probes 20 --memory-cap 4GiB"
)
def optimize(
    workload: Workload,
    gpu: Gpu = "auto",
    storage: Storage = None,
    study: Annotated[str | None, typer.Option(help="Name in the store.", show_default="WORKLOAD-PRESET-GPU")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start a new study beside an existing one of that name.")
    ] = False,
    accept_new_data: AcceptNewData = False,
    spec: Annotated[
        Path | None, path_option("--spec", help="Study file.", show_default="studies/WORKLOAD/study.yaml")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for the study, data preparation not counted: 90s, 10m, 2h.")
    ] = None,
    probes: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="At most this many in the search.")] = None,
    sampler: Annotated[str, typer.Option(help="staged (ours), or Optuna's tpe, gp, random for comparison.")] = "staged",
    objective: Annotated[
        str, typer.Option(help="time (whole production run), throughput, goodput, memory or energy.")
    ] = "time",
    effective_batch: Annotated[str, typer.Option(help="keep (the baseline's), free, or a number.")] = "keep",
    micro_batch: Annotated[int | None, typer.Option(help="Micro-batch size of the baseline.")] = None,
    nproc: Nproc = None,
    memory_cap: Annotated[str | None, typer.Option(help="Hard memory limit of every probe: 300MiB, 4GiB.")] = None,
    tune_lr: Annotated[bool, typer.Option("--tune-lr", help="Let the lr stage replace the baseline's lr.")] = False,
    aa: Annotated[
        bool, typer.Option("--aa", help="Tune the baseline against itself: an honest answer is no gain.")
    ] = False,
    preset: Preset = None,
    data: Data = None,
    option: Options = None,
    out: Annotated[
        Path | None, path_option("--out", help="Where to write.", show_default="studies/WORKLOAD/best.GPU.yaml")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 31) - 1)] = 0,
    wait: Wait = True,
    isolation: Isolation = "forkserver",
    json: Json = False,
) -> None:
    """Search, prove the winner against the baseline, write best.GPU.yaml."""
    from tuner.commands import optimize as command
    from tuner.commands.setup import JobWords

    words = JobWords(workload, preset, data, options=tuple(option or ()), isolation=isolation, wait=wait)
    command.run(
        words,
        command.SearchWords(
            gpu=gpu,
            storage=storage,
            study=study,
            fresh=fresh,
            accept_new_data=accept_new_data,
            study_file=spec,
            budget=budget,
            probes=probes,
            sampler=sampler,
            objective=objective,
            effective_batch=effective_batch,
            micro_batch=micro_batch,
            nproc=nproc,
            memory_cap=memory_cap,
            tune_lr=tune_lr,
            out=out,
            seed=seed,
            aa=aa,
        ),
        as_json=json,
    )


cli_production.add_to(app)


@app.command(
    epilog="Examples:\n\n"
    "    tuner probe -w latent_cfg --set micro_batch_size=16 --set channels_last=true\n\n"
    "    tuner probe -w latent_cfg --kind equivalence\n\n"
    "    tuner probe -w gpt2 --profile\n\n"
    "    tuner probe -w latent_cfg --set micro_batch_size=16 --memory-cap 100MiB"
)
def probe(
    workload: Workload,
    kind: Annotated[
        str | None,
        typer.Option(
            help="end_to_end, compute, loader, equivalence, trace, lr, noise or profile.", show_default="end_to_end"
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where a step's time goes: a table, and a trace to open.")
    ] = False,
    out: Annotated[
        Path | None, path_option("--out", help="Folder of the profile.", show_default="runs/profile-WORKLOAD")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the baseline to change; repeatable."),
    ] = None,
    seconds: Annotated[str, typer.Option(help="How long to measure.")] = "3s",
    deadline: Annotated[str, typer.Option(help="Longest silence within a phase before the probe is ended.")] = "300s",
    memory_cap: Annotated[str | None, typer.Option(help="Hard memory limit: 300MiB, 4GiB.")] = None,
    preset: Preset = None,
    data: Data = None,
    option: Options = None,
    wait: Wait = True,
    isolation: Isolation = "forkserver",
    json: Json = False,
) -> None:
    """Measure one configuration by hand; nothing is stored."""
    from tuner.commands import probe as command
    from tuner.commands.setup import JobWords

    words = JobWords(workload, preset, data, options=tuple(option or ()), isolation=isolation, wait=wait)
    asked = command.ProbeWords(
        kind=command.asked_kind(kind, profile=profile),
        changes=tuple(set_ or ()),
        seconds=seconds,
        deadline=deadline,
        memory_cap=memory_cap,
        out=out,
    )
    command.run(words, asked, as_json=json)


@app.command(
    epilog="Examples:\n\n"
    "    tuner bench --workload graph\n\n"
    "    tuner bench -w gpt2 --preset tiny --micro-batch 1,8,32 --out bench"
)
def bench(
    workload: Workload,
    micro_batch: Annotated[
        str | None,
        typer.Option(help="Sizes to train with: 1,8,32.", show_default="around the baseline's"),
    ] = None,
    seconds: Annotated[str, typer.Option(help="How long to measure each.")] = "2s",
    preset: Preset = None,
    data: Data = None,
    option: Options = None,
    out: Annotated[
        Path | None, path_option("--out", help="Folder of the picture.", show_default="runs/bench-WORKLOAD")
    ] = None,
    wait: Wait = True,
    isolation: Isolation = "forkserver",
    json: Json = False,
) -> None:
    """Data preparation, inference and training of a workload in figures and one picture."""
    from tuner.commands import bench as command
    from tuner.commands.setup import JobWords

    words = JobWords(workload, preset, data, options=tuple(option or ()), isolation=isolation, wait=wait)
    command.run(words, micro_batch, seconds, out, as_json=json)


@app.command(epilog="Examples:\n\n    tuner show\n\n    tuner show latent_cfg-tiny-p100 --probes")
def show(
    study: Annotated[str | None, typer.Argument(help="A study; without it, all of them.")] = None,
    probes: Annotated[bool, typer.Option("--probes", help="Every probe of the study.")] = False,
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Studies in the store, or one study's answer."""
    from tuner.commands import show as command

    command.run(study, probes, storage, as_json=json)


@app.command(
    epilog="Examples:\n\n"
    "    tuner explain latent_cfg-tiny-p100\n\n"
    "    tuner explain --config studies/latent_cfg/best.p100.yaml --out why"
)
def explain(
    study: Annotated[
        str | None, typer.Argument(help="A study in the store.", show_default="the only one, or the config's")
    ] = None,
    config: Annotated[
        Path | None, path_option("--config", "-c", help="best.GPU.yaml: explain this one of its study.")
    ] = None,
    out: Annotated[
        Path | None, path_option("--out", help="Folder for a page and three pictures.", show_default="none")
    ] = None,
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Why this configuration: what limits it, what was measured, what would make it faster."""
    from tuner.commands import explain as command

    command.run(study, config, out, storage, as_json=json)


@app.command()
def gpus(json: Json = False) -> None:
    """The table of known GPUs and what each can do."""
    from tuner.commands import gpus as command

    command.run(as_json=json)


@app.command()
def workloads(json: Json = False) -> None:
    """Registered workloads and their baselines."""
    from tuner.commands import workloads as command

    command.run(as_json=json)


@app.command()
def doctor(storage: Storage = None, json: Json = False) -> None:
    """What this machine is, and what to install."""
    from tuner.commands import doctor as command

    command.run(storage, as_json=json)


@app.command(epilog="Example:\n\n    tuner export latent_cfg-tiny-p100 --format json")
def export(
    study: Annotated[str, typer.Argument(help="A study with a decision.")],
    format_: Annotated[str, typer.Option("--format", help="yaml, json, or csv (every probe).")] = "yaml",
    out: Annotated[Path | None, path_option("--out", help="File to write.", show_default="stdout")] = None,
    storage: Storage = None,
) -> None:
    """Write a study's winner, or its probes, again."""
    from tuner.commands import export as command

    command.run(study, format_, out, storage)


@app.command(epilog="Example:\n\n    tuner report latent_cfg-tiny-p100 --out report.html")
def report(
    study: Annotated[str, typer.Argument(help="A study in the store.")],
    out: Annotated[
        Path | None, path_option("--out", help="The page.", show_default="studies/WORKLOAD/report.STUDY.html")
    ] = None,
    storage: Storage = None,
) -> None:
    """One self-contained page about a study."""
    from tuner.commands import report as command

    command.run(study, out, storage)


@app.command(epilog="Example:\n\n    tuner dashboard --port 8080")
def dashboard(
    storage: Storage = None,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="Anything but a loopback address needs --allow-remote.")] = "127.0.0.1",
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Serve other machines too, behind TUNER_DASHBOARD_PASSWORD.")
    ] = False,
) -> None:
    """Serve the Optuna dashboard on our store."""
    from tuner.commands import dashboard as command

    command.run(storage, host, port, allow_remote)


cache_app = typer.Typer(
    rich_markup_mode=None,
    help="What prepared data and compiled kernels lie on the disk; clear them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n    tuner cache\n\n    tuner cache clear --workload gpt2 --older-than 30d",
)
app.add_typer(cache_app, name="cache")


@cache_app.callback(invoke_without_command=True)
def cache(context: typer.Context, json: Json = False) -> None:
    if context.invoked_subcommand is None:
        cache_list(json=json)


@cache_app.command("list")
def cache_list(json: Json = False) -> None:
    """Every entry with its size, when it was made, and how long that took."""
    from tuner.commands import cache as command

    command.show(as_json=json)


@cache_app.command(
    "clear", epilog="Examples:\n\n    tuner cache clear --older-than 30d\n\n    tuner cache clear --all --yes"
)
def cache_clear(
    workload: Annotated[str | None, typer.Option("--workload", "-w", help="Only what this workload prepared.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Only what was made longer ago: 12h, 30d.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Compiled kernels and probes' logs too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Remove prepared data; it is made again when needed. Waits while a preparation runs."""
    from tuner.commands import cache as command

    words = command.ClearWords(workload=workload, older_than=older_than, everything=all_, yes=yes)
    command.clear(words, as_json=json)


def _version(value: bool) -> None:
    if value:
        from tuner import __version__

        typer.echo(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Entry point: errors become one clear line and an exit code."""
    from tuner.commands import console, encodings

    encodings.degrade()
    try:
        encodings.refuse_names(sys.argv[1:])
        app()
    except TunerError as error:
        with contextlib.suppress(OSError):
            typer.echo(f"tuner: {error}", err=True)
        sys.exit(error.exit_code)
    finally:
        console.let_go()
        stopping.deaf()


if __name__ == "__main__":
    main()

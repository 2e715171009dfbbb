"""What `tuner optimize` says to people: what it is about to search, how the preparation goes, and the answer."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from tuner import stopping
from tuner.commands import console as speak
from tuner.commands.setup import Job, JobWords
from tuner.commands.typed import typed
from tuner.contract.errors import Stopped, StoreOutage
from tuner.contract.probe import Event, ProgressEvent
from tuner.contract.result import AaResult, OptimizeResult
from tuner.contract.space import SearchSpace
from tuner.contract.study import Objective, QualityConstraint, StudySpec
from tuner.contract.tuned import Decision, Promise
from tuner.report.targets import in_words

if TYPE_CHECKING:
    from rich.console import Console


def introduce(spec: StudySpec, job: Job, console: Console) -> None:
    """The job, the target, and what is searched from where."""
    device = spec.device
    where = device.place if device.kind == "cuda" else f"CPU {device.place}"
    console.print(f"tuner {job.info.name}: {job.info.summary}", style="bold")
    if job.info.preset:
        console.print(f"preset {job.info.preset_note}")
    console.print(f"target {spec.target.label}, measured on {where}, torch {device.torch}")
    if spec.transferred:
        console.print(
            f"The target is not this machine: its limits hold (memory, dtypes, compile modes), "
            f"but every speed below is this machine's. Confirm on a real {spec.target.label} before you rely on it.",
            style="yellow",
        )
    if spec.tier:
        console.print(spec.tier)
    if spec.quality is not None and spec.space.options:
        console.print(f"the model itself may change: {condition(spec.space, spec.quality)}")
    for item in spec.dropped:
        console.print(f"  not tried: {item.knob.value} {item.value} - {item.reason}", style="dim")
    if spec.aa:
        console.print("A/A: every probe runs the baseline, whatever it is asked for; a gain would be a false one")
    kept = "free" if spec.effective_batch is None else f"{spec.effective_batch} (kept)"
    console.print(
        f"baseline {spec.label(spec.baseline)}, effective batch {kept}, "
        f"memory budget {speak.mib(spec.memory_budget_bytes)}"
        + (f", hard cap {speak.mib(spec.memory_cap_bytes)}" if spec.memory_cap_bytes else "")
        + (f", objective {spec.objective.value}" if spec.objective is not Objective.TIME else "")
        + f", budget {speak.clock(spec.budget_s)}, study {spec.name}\n"
    )


def condition(space: SearchSpace, quality: QualityConstraint) -> str:
    """`width 16, 32; only if accuracy after 4,096 samples is at most 0.01 worse, over 3 seeds`."""
    levers = ", ".join(f"{name} {', '.join(map(str, values))}" for name, values in space.options.items())
    return (
        f"{levers}; only if {quality.metric} after {quality.samples:,} samples is at most {quality.tolerance:g} worse, "
        f"over {quality.seeds} seeds"
    )


class Farewell:
    """Whoever loses the store of a search is told the `command` that goes on with it."""

    def __init__(self, console: Console, command: str) -> None:
        self._console = console
        self.command = command

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        says_so_itself = isinstance(error, stopping.Interrupted)
        if isinstance(error, Stopped | StoreOutage) and not says_so_itself:
            raise type(error)(f"{error}; go on with: {self.command}") from None


class Remarks:
    """What the reading of the data has to say, each once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: set[str] = set()

    def __call__(self, event: Event) -> None:
        if isinstance(event, ProgressEvent) and event.is_remark and event.text not in self._said:
            self._said.add(event.text)
            self._console.print(f"  data: {event.text}", style="yellow")


class Preparing:
    """Progress of the data preparation: a line at the beginning, the middle and the end of each part; remarks once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: tuple[str, int] | None = None
        self._remarks = Remarks(console)

    def __call__(self, event: Event) -> None:
        self._remarks(event)
        if not isinstance(event, ProgressEvent) or not event.total:
            return
        mark = (event.text, 2 * event.done // event.total)
        if mark != self._shown:
            self._shown = mark
            self._console.print(f"  preparing: {event.text} {100 * event.done // event.total} %", style="dim")


def break_even(samples: int | None, horizon: int) -> str:
    if samples is None:
        return ""
    beyond = ", which is more than this run has" if samples > horizon else ""
    return f"; the tuning pays for itself after {samples:,} samples{beyond}"


def peak_in_words(promised: Promise) -> str:
    """`842 MiB (790 MiB to 901 MiB): extrapolated from 40 of 200 evaluation batches`"""
    low, value, high = map(speak.mib, (promised.peak_low_bytes, promised.peak_bytes, promised.peak_high_bytes))
    return f"{value} ({low} to {high})" + (f": {promised.peak_from}" if promised.peak_from else "")


def tell_aa(console: Console, found: AaResult) -> None:
    verdict = "a FALSE gain" if found.false_gain else "no gain, as it must be"
    console.print(f"  A/A      the baseline tuned against itself: {verdict}")
    if found.search_maximum is not None:
        console.print(
            f"           picking the best figure of the search would have claimed {found.search_maximum:.3f}x"
        )


def next_steps(spec: StudySpec, config: str, storage: str | None, isolation: str) -> dict[str, str]:
    """The commands that come after a search; `storage` and `isolation` as they were typed."""
    own = {"storage": storage}
    code = ":" in spec.workload or None  # what a file names is imported when the user says so
    fresh = isolation if isolation != JobWords(spec.workload).isolation else None
    return {
        "train": typed("train", config=config, allow_code=code, isolation=fresh, **own),
        "explain": typed("explain", config=config, **own),
        "report": typed("report", spec.name, **own),
        "browse": typed("dashboard", **own),
    }


def tell(
    console: Console,
    spec: StudySpec,
    decision: Decision,
    promised: Promise | None,
    result: OptimizeResult,
    *,
    storage: str | None,
    isolation: str,
) -> None:
    """The answer, for people."""
    console.print()
    titles = {"winner": "bold green", "no_gain": "bold", "failed": "bold red"}
    console.print(f"{decision.kind.replace('_', ' ')}  {decision.reason}", style=titles[decision.kind])
    for name, side in (("baseline", decision.baseline), ("shipped", decision.winner)):
        if side is not None:
            console.print(
                f"  {name:<9}{spec.label(side.config):<44}{speak.rate(side.samples_per_s, ' samples/s'):>36}"
                f"   peak {speak.mib(side.peak_bytes):>10}   {side.processes} fresh processes"
            )
    if decision.gain is not None:
        console.print(f"  gain     {speak.gain(decision.gain)}, paired and interleaved")
    if result.aa is not None:
        tell_aa(console, result.aa)
    if promised is not None:
        horizon = spec.baseline.horizon_samples
        pays = break_even(promised.break_even_samples, horizon)
        console.print(f"  promise  {promised.hours:.2f} h to {horizon:,} samples{pays}")
        console.print(f"           peak {peak_in_words(promised)}")
    if result.targets:
        console.print(f"  guide's targets: {in_words(result.targets)}")
    for note in decision.notes:
        console.print(f"  note     {note}")
    if result.config_path:
        console.print(f"\nwritten  {result.config_path}")
        for name, command in next_steps(spec, result.config_path, storage, isolation).items():
            console.print(f"{name:<9}{command}")
    console.print(
        f"took     {speak.clock(result.seconds['total'])}, {sum(result.probes.values())} measured points", style="dim"
    )

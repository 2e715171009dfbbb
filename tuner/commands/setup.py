"""What several commands need before their own work: the store's URL, the runner, the machine and workload described,
the study file with its tier and preset, and the baseline made from all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.commands.encodings import written_down
from tuner.commands.typed import OPTION
from tuner.contract.base import Scalar, parse
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document, read_file
from tuner.contract.errors import ConfigError, WorkloadError
from tuner.contract.gpu import AUTO, DeviceInfo, GpuProfile, detected_profile, gpu_profile
from tuner.contract.probe import DescribeEvent, Listener, ProbeKind, ProbeLimits, ProbeRequest, Stage
from tuner.contract.space import SearchSpace
from tuner.contract.study import StudyFile, Tier
from tuner.contract.trust import REGISTERED, Trust
from tuner.contract.workload import WorkloadInfo
from tuner.importing import shipped

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.probe.runner import SubprocessRunner
    from tuner.store.store import StudyStore

DEFAULT_STORAGE = "sqlite:///studies/studies.db"
GIB = 1 << 30
_KNOWN_AS = {"micro_batch_size": "micro-batch", "accumulation_steps": "accumulation"}


@dataclass(frozen=True)
class JobWords:
    """The job as named on the command line."""

    workload: str
    preset: str | None = None
    data: Path | None = None
    options: tuple[str, ...] = field(default=(), metadata={OPTION: "option"})
    isolation: str = "forkserver"
    wait: bool = True
    """For who uses the device or the study; False = refuse."""


@dataclass(frozen=True)
class Job:
    """The job as understood: the workload's options, its description on this machine, its study file."""

    options: dict[str, Scalar]
    description: DescribeEvent
    info: WorkloadInfo
    file: StudyFile
    """With the tier's and the preset's keys put over its own."""
    baseline: RunConfig
    target: GpuProfile
    tier: Tier | None = None
    """The guide's tier that holds for the target."""


def storage_url(storage: str | None) -> str:
    return storage or DEFAULT_STORAGE


def open_for_reading(storage: str | None) -> StudyStore:
    """The store as it is; nothing is made. One that was named must be there, the usual one may not be there yet."""
    from tuner.store.store import StudyStore

    return StudyStore.read(storage_url(storage), empty=storage is None)


def tell_problems(store: StudyStore, console: Console) -> None:
    """What was left out of what was read."""
    for name, why in store.problems.items():
        console.print(f"{name} cannot be read: {why}", style="red")


def cache_dir() -> Path:
    """$TUNER_CACHE, or ~/.cache/tuner: prepared data and compiled kernels, shared by all studies."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("TUNER_CACHE") or Path(base) / "tuner")


def make_runner(isolation: str, trust: Trust = REGISTERED) -> SubprocessRunner:
    """Raises ConfigError for an unknown isolation, and for a cache folder that cannot be made."""
    from tuner.probe.runner import SubprocessRunner

    if isolation not in ("forkserver", "fresh"):
        raise ConfigError(f"--isolation: unknown value {isolation!r}; known: forkserver, fresh")
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the cache folder {folder} cannot be made: {error.strerror}; set TUNER_CACHE") from None
    return SubprocessRunner(
        folder, isolation="fresh" if isolation == "fresh" else "forkserver", log_dir=folder / "logs", trust=trust
    )


def understand(words: JobWords, runner: SubprocessRunner, study_file: Path | None = None, gpu: str = AUTO) -> Job:
    """Describe workload and machine, choose tier and preset (full with CUDA, tiny without), read the study file.

    Later ones win: the file's options, its tier's, its preset's, the command line's; likewise for the baseline.
    Raises WorkloadError when the workload cannot be imported or refuses its options, ConfigError for a bad file.
    """
    from tuner.registry import check_name

    check_name(words.workload)
    typed = typed_options(words)
    given = load_study_file(words.workload, study_file)
    first = {**given.options, **typed}
    description = describe(words.workload, first, runner)
    target = target_profile(gpu, description.device)
    chosen: dict[str, Scalar] = {}
    if "preset" not in first and "full" in given.presets:
        chosen["preset"] = "full" if description.device.kind == "cuda" else "tiny"
    preset = str({**first, **chosen}.get("preset") or (description.info.preset if description.info else ""))
    file, tier = resolved(given, preset, target)
    check_asked(file, words.workload, "study.yaml")
    options = {**file.options, **chosen, **typed}
    if options != first:
        description = describe(words.workload, options, runner)
    if description.info is None:
        raise WorkloadError(f"--workload {words.workload}: it does not describe itself")
    baseline = merged_baseline(description.info.baseline, file, options, words.workload)
    baseline = counted_in_samples(baseline, description.info)
    return Job(options, description, description.info, file, baseline, target, tier)


def typed_options(words: JobWords) -> dict[str, Scalar]:
    """The workload's options as the command line gives them: --option, --data, --preset. Raises WorkloadError."""
    from tuner.commands.words import assignments

    options = assignments(words.options, "--option")
    if words.data is not None:
        if not os.path.exists(words.data):  # unlike Path.exists it raises for nothing
            raise WorkloadError(f"--data: {words.data} does not exist")
        options["data"] = written_down(words.data, "--data")
    if words.preset is not None:
        options["preset"] = words.preset
    return options


def target_profile(gpu: str, device: DeviceInfo) -> GpuProfile:
    """What `--gpu` means on this machine."""
    return detected_profile(device) if gpu == AUTO else gpu_profile(gpu)


def describe(workload: str, options: Mapping[str, Scalar], runner: SubprocessRunner) -> DescribeEvent:
    request = ProbeRequest(
        id="describe", kind=ProbeKind.DESCRIBE, stage=Stage.SETUP, workload=workload, options=dict(options)
    )
    reply = runner.run(request)
    if reply.description is None:
        point = reply.points[0] if reply.points else None
        raise failed_setup(workload, point.message if point else "no answer", point.detail if point else "")
    return reply.description


def prepare(job: Job, workload: str, runner: SubprocessRunner, listener: Listener) -> float:
    """Make the workload's data ready (cached); returns the seconds it took. Raises WorkloadError."""
    request = ProbeRequest(
        id="prepare",
        kind=ProbeKind.PREPARE,
        stage=Stage.SETUP,
        workload=workload,
        options=job.options,
        cache_dir=str(cache_dir()),
        limits=ProbeLimits(deadline_s=1800.0),
    )
    reply = runner.run(request, listener)
    for point in reply.points:
        if point.outcome.value != "ok":
            raise failed_setup(workload, point.message, point.detail)
    return reply.seconds


def failed_setup(workload: str, message: str, detail: str) -> WorkloadError:
    """The workload's own words; its traceback only where the message alone does not say enough."""
    own = message.startswith(("WorkloadError", "--"))
    text = message.removeprefix("WorkloadError: ")
    if own or not detail:
        return WorkloadError(f"--workload {workload}: {text}")
    return WorkloadError(f"--workload {workload}: {text}\n{detail.rstrip()}")


def load_study_file(workload: str, given: Path | None) -> StudyFile:
    """The file given, or studies/<workload>/study.yaml here or beside the installed package, or an empty one.

    Raises ConfigError for a file of another workload: no file changes what was asked for.
    """
    for path in (given,) if given is not None else study_files(workload):
        if path == given or os.path.isfile(path):
            file = load_document(StudyFile, read_file(path), str(path))
            check_asked(file, workload, str(path))
            return file
    return StudyFile(
        workload=workload, space=SearchSpace(micro_batch_size=(1, 2, 4, 8, 16, 32, 64), num_workers=(0, 1, 2, 4))
    )


def study_files(workload: str) -> list[Path]:
    """Where the workload's study file may lie. Those shipped are for the registered workloads alone: somebody's class
    may be called as one of them."""
    folders = [Path("studies"), *([] if ":" in workload else [Path(shipped("studies"))])]
    return [folder / short_name(workload) / "study.yaml" for folder in folders]


def check_asked(file: StudyFile, workload: str, source: str) -> None:
    """Raises ConfigError unless the file is for the workload that was asked for, everywhere in it."""
    from tuner.registry import target

    for place, name in (("workload", file.workload), ("baseline.workload", file.baseline.get("workload", workload))):
        if not isinstance(name, str) or target(name) != target(workload):
            raise ConfigError(
                f"{source}: {place}: it is for {name!s:.300}, but --workload {workload} was asked for; "
                "correct the file, or ask for what it names"
            )


def short_name(workload: str) -> str:
    """`latent_cfg`, or the class of `module:Class` in lower case."""
    return workload.partition(":")[2].lower() or workload


def resolved(file: StudyFile, preset: str, target: GpuProfile) -> tuple[StudyFile, Tier | None]:
    """`file` with the keys of the target's tier, then those of the preset, put over its own; and that tier."""
    preset_keys = file.presets.get(preset, {})
    tier = tier_for(_merged(file, preset_keys, f"presets.{preset}").tiers, target)
    if tier is not None:
        own = tier.model_dump(mode="json", exclude={"above_gib"}, exclude_unset=True)
        file = _merged(file, own, "tiers")
    return _merged(file, preset_keys, f"presets.{preset}"), tier


def _merged(file: StudyFile, keys: Mapping[str, Any], place: str) -> StudyFile:
    if not keys:
        return file
    return parse(StudyFile, deep_merge(file.model_dump(mode="json", exclude_unset=True), keys), f"study.yaml: {place}")


def tier_for(tiers: Sequence[Tier], target: GpuProfile) -> Tier | None:
    """The first tier below the target's memory, of a list from the largest down; on a CPU the last one."""
    if not tiers or target.memory_bytes is None:
        return tiers[-1] if tiers else None
    memory_gib = target.memory_bytes / GIB
    return next((tier for tier in tiers if tier.above_gib < memory_gib), None)


def tier_text(job: Job) -> str:
    """`tier above 8 GiB: micro-batch 16`; what the preset or the command line put over the tier is said."""
    if job.tier is None:
        return ""
    asked = {**dict(_leaves(job.tier.baseline)), **job.tier.options}
    holds = {**dict(_leaves(job.baseline.model_dump(mode="json"))), **job.options}
    parts = [
        f"{_KNOWN_AS.get(name, name)} {value}" + (f" (here {holds.get(name)})" if holds.get(name) != value else "")
        for name, value in asked.items()
    ]
    return f"tier above {job.tier.above_gib:g} GiB: {', '.join(parts) or 'the baseline as it is'}"


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested mappings."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def merged_baseline(baseline: RunConfig, file: StudyFile, options: Mapping[str, Scalar], workload: str) -> RunConfig:
    """The workload's own baseline with the file's put over it; the workload and its options are those asked for."""
    merged = deep_merge(baseline.model_dump(mode="json"), file.baseline)
    merged["options"] = dict(options)
    merged["workload"] = workload
    return parse(RunConfig, merged, "study.yaml: baseline").canonical()


def counted_in_samples(baseline: RunConfig, info: WorkloadInfo) -> RunConfig:
    """What is wanted by the epoch is forecast, and shipped, by the samples of one."""
    if not (baseline.cadence.in_epochs and info.train_samples):
        return baseline
    return baseline.model_copy(update={"cadence": baseline.cadence.in_samples(info.train_samples)})


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, `over` winning; lists are replaced."""
    merged = dict(base)
    for key, value in over.items():
        own = merged.get(key)
        merged[key] = deep_merge(own, value) if isinstance(own, dict) and isinstance(value, dict) else value
    return merged

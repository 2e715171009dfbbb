"""Out of memory in the middle of a run: go on from its last checkpoint with a configuration that needs less.

The file's runner-ups at the same effective batch are asked, the one that needs least first; each change is kept in the
run's folder, so that the same command goes on with it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.commands import console as speak
from tuner.commands.train_confirm import MOST_KEPT, Settled, as_computed, candidates, check_kept, with_fallbacks
from tuner.commands.train_words import TrainWords
from tuner.contract.choice import FALLBACK_FILE, Fallbacks, FellBack
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_json
from tuner.contract.errors import TunerError
from tuner.contract.measurement import Outcome
from tuner.contract.own_files import newest_checkpoint, replace_text
from tuner.contract.probe import SAMPLES_REACHED, PointReply

if TYPE_CHECKING:
    from rich.console import Console

LEAST_SAVED = 0.08
"""A configuration really needs less when its measured peak is lower by at least this share."""
UNKNOWN = 1 << 62
"""Peak of a configuration that nobody measured: asked after those that were."""


def gone_on(settled: Settled, out: Path, console: Console) -> Settled:
    """With what this folder fell back to before, if it did."""
    path = out / FALLBACK_FILE
    kept = load_json(Fallbacks, path, MOST_KEPT)
    if kept is None or kept.asked != settled.name or not kept.steps:
        return settled
    last = kept.steps[-1]
    check_kept(last.chosen, settled.asked, f"{path}: steps.{len(kept.steps) - 1}.chosen")
    console.print(f"this run fell back {_where(last)} ({FALLBACK_FILE}), and goes on so: {last.chosen.label}")
    return with_fallbacks(settled, last.chosen, kept.steps)


def next_leaner(settled: Settled, point: PointReply, out: Path, console: Console) -> Settled | None:
    """What to go on with after `point` ended the run; None unless it ran out of memory and something needs less."""
    found = _choice(settled, point) if point.outcome.is_oom else None
    if found is None:
        return None
    config, why = found
    reached = point.values.get(SAMPLES_REACHED)
    step = FellBack(
        ended=settled.tuned.config,
        outcome=point.outcome,
        message=point.message,
        samples=round(reached) if reached is not None else None,
        chosen=config,
        why=why,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    steps = (*settled.fallbacks, step)
    _keep(out, Fallbacks(asked=settled.name, steps=steps))
    console.print(f"{point.outcome.value} {_where(step)}: {point.message}", style="yellow")
    console.print(f"falling back from {step.ended.label} to {config.label}: {why}", style="yellow")
    return with_fallbacks(settled, config, steps)


def advice(settled: Settled, point: PointReply, words: TrainWords, out: Path) -> str:
    """What to do about a lack of memory, and the command that goes on after other ends; empty where it would meet the
    same end at once, or there is nothing to go on from."""
    if not point.outcome.is_oom:
        again = point.outcome is not Outcome.DIVERGED and newest_checkpoint(out)
        return f"\ngo on with: {words.again(out)}" if again else ""
    config = settled.tuned.config
    found = _choice(settled, point)
    if found is not None and not words.fallback:
        return f"\ngo on with a runner-up that needs less memory ({found[0].label}): {words.again(out, fallback=True)}"
    tried = f" (tried: {', '.join(step.ended.label for step in settled.fallbacks)})" if settled.fallbacks else ""
    return (
        f"\nno runner-up is left that needs less memory than {config.label}{tried}; tune again with --memory-cap, or "
        f"write a smaller micro_batch_size than {config.micro_batch_size} into the file, accumulation_steps to match"
    )


def _choice(settled: Settled, point: PointReply) -> tuple[RunConfig, str] | None:
    """The configuration that needs least of those that need less, and why it does."""
    failed = settled.tuned.config
    tried = [failed.canonical(), *(step.ended.canonical() for step in settled.fallbacks)]
    peaks = known_peaks(settled)
    on_host = point.outcome is Outcome.OOM_HOST and point.environment is not None and point.environment.device != "cpu"
    found = []
    for _, config in candidates(settled.asked):
        why = "" if config in tried else needs_less(config, failed, {} if on_host else peaks, on_host=on_host)
        if why:
            found.append((peaks.get(_key(config), UNKNOWN), config.micro_batch_size, config, why))
    if not found:
        return None
    _, _, config, why = min(found, key=lambda item: item[:2])
    return config, why


def known_peaks(settled: Settled) -> dict[str, int]:
    """Configuration (its digest) -> its measured peak: from the confirmation on this machine, else from the file."""
    if settled.confirmed is not None:
        return {_key(side.config): side.peak_bytes for side in settled.confirmed.sides if side.peak_bytes}
    asked, peaks = settled.asked, dict[str, int]()
    for other, peak in zip(asked.runner_ups, asked.runner_up_peaks, strict=False):
        config = as_computed(asked.config, other)
        if config is not None and peak:
            peaks[_key(config)] = peak
    if asked.promise is not None:
        peaks[_key(asked.config)] = asked.promise.peak_bytes
    return peaks


def _key(config: RunConfig) -> str:
    return config.canonical().digest()


def needs_less(config: RunConfig, failed: RunConfig, peaks: dict[str, int], *, on_host: bool = False) -> str:
    """Why `config` needs less memory than `failed`, in words; empty when it does not, or nobody knows.

    on_host: the host's memory ran out beside a GPU, where the loader's batches lie.
    """
    mine, theirs = peaks.get(_key(config)), peaks.get(_key(failed))
    if mine is not None and theirs is not None:
        fits = mine <= (1 - LEAST_SAVED) * theirs
        return f"it needs {speak.mib(mine)} where the other was measured at {speak.mib(theirs)}" if fits else ""
    if on_host:
        ready, before = _samples_ready(config), _samples_ready(failed)
        return f"its loader keeps {ready} samples ready instead of {before}" if ready < before else ""
    return _leaner_by_design(config, failed)


def _leaner_by_design(config: RunConfig, failed: RunConfig) -> str:
    """Less in one respect and more in none, where no peak was measured."""
    if config.compile is not failed.compile or config.precision is not failed.precision:
        return ""
    if config.micro_batch_size > failed.micro_batch_size:
        return ""
    if failed.gradient_checkpointing and not config.gradient_checkpointing:
        return ""
    if config.micro_batch_size < failed.micro_batch_size:
        return f"its micro-batch is {config.micro_batch_size} instead of {failed.micro_batch_size}"
    if config.gradient_checkpointing and not failed.gradient_checkpointing:
        return "it recomputes activations instead of keeping them (gradient checkpointing)"
    return ""


def _samples_ready(config: RunConfig) -> int:
    """Samples that the loader's workers hold at a time."""
    return config.loader.num_workers * config.loader.prefetch_factor * config.micro_batch_size


def _where(step: FellBack) -> str:
    return f"at {step.samples:,} samples" if step.samples is not None else "at the last checkpoint"


def _keep(out: Path, kept: Fallbacks) -> None:
    try:
        replace_text(out / FALLBACK_FILE, kept.model_dump_json(indent=2) + "\n", durable=True)
    except OSError as error:
        raise TunerError(f"{out / FALLBACK_FILE}: cannot be written: {error.strerror}") from None

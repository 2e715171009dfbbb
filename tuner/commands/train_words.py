"""The words of `tuner train` as typed, and what may not be typed together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from tuner.commands.setup import JobWords
from tuner.commands.typed import OPTION, retyped
from tuner.contract.errors import ConfigError
from tuner.contract.trust import Trust

LEAST_S = 1e-3
"""A budget that is spent still ends at a step border, with a checkpoint."""


@dataclass(frozen=True)
class TrainWords:
    """The run as typed: by a file, or by a workload, whose baseline is then trained."""

    config: Path | None = None
    job: JobWords | None = field(default=None, metadata={OPTION: ""})
    out: Path | None = None
    fresh: bool = False
    accept_new_data: bool = False
    max_samples: int | None = None
    max_hours: float | None = None
    max_minutes: float | None = None
    background_checkpoints: bool = False
    confirm: bool | None = None
    """None = only where the file was measured on another device."""
    confirm_s: float = field(default=5.0, metadata={OPTION: "confirm_seconds"})
    fallback: bool = False
    nproc: int | None = None
    """Ranks; None = as many as the configuration names."""
    storage: str | None = None
    tensorboard: bool = False
    allow_code: bool = False
    wait: bool = True
    """For who measures on the device; False = refuse."""
    isolation: str = "forkserver"

    @property
    def trust(self) -> Trust:
        """Which code this run may import."""
        return Trust(frozenset([self.job.workload] if self.job else []), any_code=self.allow_code)

    @property
    def max_seconds(self) -> float | None:
        if self.max_hours and self.max_minutes:
            raise ConfigError("--max-hours and --max-minutes: give one of them")
        return (self.max_hours or 0.0) * 3600 + (self.max_minutes or 0.0) * 60 or None

    def after(self, spent_s: float) -> TrainWords:
        """What is left of the time that was asked for."""
        if self.max_seconds is None:
            return self
        return replace(self, max_hours=None, max_minutes=max(LEAST_S, self.max_seconds - spent_s) / 60)

    def again(self, out: Path, **changes: object) -> str:
        """The command that goes on with the run in `out`."""
        given = (self,) if self.job is None else (self.job, self)
        return retyped("train", *given, **{"out": out, **changes})


def job_words(
    workload: str | None, preset: str | None, data: Path | None, options: tuple[str, ...], isolation: str
) -> JobWords | None:
    """None without a workload. Raises ConfigError for words that only mean something beside one."""
    if workload is not None:
        return JobWords(workload=workload, preset=preset, data=data, options=options, isolation=isolation)
    for option, value in (("--preset", preset), ("--data", data), ("--option", options)):
        if value:
            raise ConfigError(f"{option}: it belongs to --workload; a --config file holds its own options")
    return None


def check_words(words: TrainWords) -> None:
    """Raises ConfigError unless the job is named once."""
    if (words.config is None) == (words.job is None):
        raise ConfigError("train: name the job by --config FILE, or by --workload NAME (its baseline); one of the two")
    _ = words.max_seconds
    if words.fallback and words.config is None:
        raise ConfigError("--fallback: it goes on with the runner-ups of a tuned file; name one with --config")
    if words.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard: the package tensorboard is not installed; pip install tensorboard")

"""The words of `tuner train` as typed, and what may not be typed together."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tuner.commands.setup import JobWords
from tuner.contract.errors import ConfigError


@dataclass(frozen=True)
class TrainWords:
    """The run as typed: by a file, or by a workload, whose baseline is then trained."""

    config: Path | None = None
    job: JobWords | None = None
    out: Path | None = None
    max_samples: int | None = None
    max_hours: float | None = None
    max_minutes: float | None = None
    storage: str | None = None
    allow_code: bool = False
    isolation: str = "forkserver"

    @property
    def max_seconds(self) -> float | None:
        if self.max_hours and self.max_minutes:
            raise ConfigError("--max-hours and --max-minutes: give one of them")
        return (self.max_hours or 0.0) * 3600 + (self.max_minutes or 0.0) * 60 or None

    @property
    def source(self) -> str:
        """The options that name the job, to be typed again."""
        if self.job is None:
            return f"--config {self.config}"
        words = ["--workload", self.job.workload]
        words += ["--preset", self.job.preset] if self.job.preset else []
        words += ["--data", str(self.job.data)] if self.job.data else []
        words += [word for option in self.job.options for word in ("-o", option)]
        return shlex.join(words)


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

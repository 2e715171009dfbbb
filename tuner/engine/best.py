"""Follows the quality metric: keeps the best checkpoint beside the last ones, and ends a run that gets no better.

Patience is counted on the figures of the run's whole course, so a resumed run goes on counting; what is the best
checkpoint says its own manifest, so one that is better is never overwritten by a part of the run that is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.contract.config import QualityConfig, RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.fingerprint import Fingerprint
from tuner.contract.probe import NoticeEvent
from tuner.engine.checkpoint import Checkpointer, CheckpointError
from tuner.engine.hooks import Emit, Hook
from tuner.engine.judging import assess, evaluate
from tuner.engine.loader import TensorBatch
from tuner.engine.scores import RAW, Origin, Scores, is_better
from tuner.engine.step import StepResult
from tuner.engine.trainer import Trainer


@dataclass
class Course:
    """The best value of a metric so far, and how many values have come since without a better one."""

    quality: QualityConfig
    name: str
    """Of the figure, as it stands in evaluations.csv."""
    value: float = math.nan
    samples: int = 0
    waited: int = field(default=0)

    def take(self, samples: int, value: float) -> bool:
        """True when `value` is the best so far."""
        if is_better(value, self.value, higher=self.quality.higher_is_better, by=self.quality.min_delta):
            self.value, self.samples, self.waited = value, samples, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        return 0 < self.quality.patience <= self.waited

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"{self.name} was never a finite number in {self.waited} evaluations"
        return (
            f"{self.name} has not been better than {self.value:.4g} (at {self.samples:,} samples) "
            f"in {self.waited} evaluations"
        )


class BestKeeper(Hook):
    """Judges every new figure of the quality metric. Raises ConfigError for a metric that nobody gives."""

    def __init__(
        self, config: RunConfig, scores: Scores, checkpointer: Checkpointer, save: Callable[..., bool], emit: Emit
    ) -> None:
        assert config.quality is not None
        self._config = config
        self._since: Callable[[], int] = lambda: 0
        self._quality = config.quality
        self._metric = judged_name(config)
        self._raw = config.judges_raw
        self._run = _run_digest(config)
        self._scores = scores
        self._checkpointer = checkpointer
        self._save = save
        self._emit = emit
        self._course = Course(config.quality, self._metric)
        self._about: dict[str, Any] | None = None
        self._expected: set[Origin] = set()
        self.ended = ""
        """Why the run was ended early; empty when it was not."""

    def know_data(self, data: Sequence[Fingerprint], since: Callable[[], int]) -> None:
        """What is judged on, and from which samples on: a figure on other data says nothing about these."""
        self._run = _run_digest(self._config, data)
        self._since = since

    @property
    def best(self) -> dict[str, float]:
        """`value` and `samples` of the best checkpoint; empty when there is none."""
        return {} if self._about is None else {name: self._about[name] for name in ("value", "samples")}

    @property
    def kept(self) -> str:
        """The best checkpoint in words, for advice; empty when there is none."""
        if self._about is None:
            return ""
        return f"checkpoints/best ({self._metric} {self._about['value']:.4g} at {self._about['samples']:,})"

    def on_start(self, trainer: Trainer) -> None:
        self._expected = _origins(trainer)
        if not self._expected:
            raise ConfigError(
                f"quality.metric: {self._quality.metric!r} would never be measured: "
                + (
                    "cadence.evaluate_samples is 0; set it"
                    if self._raw
                    else "cadence.evaluate_samples and sample_samples are 0; set one of them"
                )
            )
        about = self._checkpointer.best(lambda text: self._emit(NoticeEvent(level="warning", text=text)))
        if about is not None and (about["run"], about["metric"]) == (self._run, self._metric):
            self._about = about
        elif about is not None:
            self._put_aside(about)
        since = self._since()
        for samples, value in self._scores.of_the_cadence(self._metric, trainer.config.cadence):
            if samples > since:
                self._course.take(samples, value)
        self._stop_if_exhausted(trainer)

    def _put_aside(self, about: Mapping[str, Any]) -> None:
        """The best by another measure is none by this one, but it is not to be lost."""
        kept = self._checkpointer.put_best_aside(int(about["samples"]))
        text = f"the best checkpoint so far is of other data or another metric: kept as {kept}, and counted anew"
        self._emit(NoticeEvent(level="warning", text=text))

    def check_metric(self, trainer: Trainer, trivial: Iterable[str]) -> None:
        """Raises ConfigError, before hours are spent, for a metric that is not among the workload's figures. One batch
        tells most of them; a figure that it does not give is looked for in all of them."""
        name, known = self._quality.metric, set[str]()
        if self._metric in self._scores.history or (name in trivial and not self._raw):
            return
        for through in (_first, iter):
            with contextlib.suppress(Exception):  # an evaluation that fails will say so itself, when it is due
                known |= evaluate(trainer, raw=self._raw, through=through).keys()
            if name in known:
                return
        if not self._raw:
            with contextlib.suppress(Exception), tempfile.TemporaryDirectory(prefix="tuner-assess-") as folder:
                known |= assess(trainer, Path(folder)).keys()
        if known and name not in known:
            raise self._unknown(known)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Nothing: figures come through `see`."""

    def see(self, trainer: Trainer, origin: Origin, found: Mapping[str, float]) -> None:
        if self._metric not in found:
            self._miss(origin)
            return
        value = found[self._metric]
        if self._course.take(trainer.samples, value) and self._beats_the_kept(value):
            self._keep(trainer, value)
        self._stop_if_exhausted(trainer)

    def _miss(self, origin: Origin) -> None:
        self._expected.discard(origin)
        if not self._expected and self._metric not in self._scores.history:
            names = [name.removeprefix(RAW) for name in self._scores.history if name.startswith(RAW) == self._raw]
            raise self._unknown(names)

    def _unknown(self, names: Iterable[str]) -> ConfigError:
        of_raw = " of the weights as trained (quality.weights: raw)" if self._raw else ""
        return ConfigError(
            f"quality.metric: {self._quality.metric!r} is not among this workload's figures{of_raw}; "
            f"known: {', '.join(sorted(names))}"
        )

    def _beats_the_kept(self, value: float) -> bool:
        higher = self._quality.higher_is_better
        return self._about is None or is_better(value, float(self._about["value"]), higher=higher)

    def _keep(self, trainer: Trainer, value: float) -> None:
        about = {"metric": self._metric, "value": value, "samples": trainer.samples, "run": self._run}
        try:
            if self._save(trainer, about):
                self._about = about
        except CheckpointError as error:
            self._emit(NoticeEvent(level="warning", text=f"{error}; the best one is not kept, the run goes on"))

    def _stop_if_exhausted(self, trainer: Trainer) -> None:
        if self._course.exhausted and trainer.stop_reason is None:
            self.ended = f"ended early: {self._course}"
            trainer.stop(self.ended)


def _first(batches: Iterator[TensorBatch]) -> Iterator[TensorBatch]:
    for batch in batches:
        yield batch
        return


def judged_name(config: RunConfig) -> str:
    """The figure that decides, as it stands in evaluations.csv: `raw_NAME` where the raw weights are judged."""
    assert config.quality is not None
    return (RAW if config.judges_raw else "") + config.quality.metric


def _origins(trainer: Trainer) -> set[Origin]:
    """Where figures will come from in this run. Generating is done with the averaged weights alone."""
    cadence = trainer.config.cadence
    found = {Origin.EVALUATE} if cadence.evaluate_samples else set()
    if trainer.config.judges_raw:
        return found
    generates = cadence.sample_samples or cadence.evaluate_samples
    return found | ({Origin.ASSESS} if generates and hasattr(trainer.workload, "assess") else set())


def _run_digest(config: RunConfig, data: Sequence[Fingerprint] = ()) -> str:
    """Names what a run may not change while it lasts: a best checkpoint of another run is not taken for ours. Data are
    named by their content."""
    plain = config.model_dump(mode="json", include={"workload", "options", "ema", "seed"})
    plain["options"] |= {item.option: item.sha256 for item in data}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]

"""A toy that is judged: it names the metric that decides and says what that would be without learning."""

from __future__ import annotations

from collections.abc import Mapping

from tests.toys import Toy
from tuner.contract.config import QualityConfig
from tuner.contract.workload import Trivial, WorkloadInfo


class JudgedToy(Toy):
    name = "judged_toy"

    def info(self) -> WorkloadInfo:
        info = super().info()
        cadence = info.baseline.cadence.model_copy(update={"evaluate_samples": 512})
        judged = {
            "workload": "tests.commands.judged_toy:JudgedToy",
            "quality": QualityConfig(metric="valid_fit", higher_is_better=False),
            "cadence": cadence,
        }
        return info.model_copy(update={"baseline": info.baseline.model_copy(update=judged)})

    def trivial(self) -> Mapping[str, Trivial]:
        y, mask = self.dataset("valid").y, self.dataset("valid").mask  # type: ignore[attr-defined]
        value = float((y.square() * mask).sum() / mask.sum())
        return {"valid_fit": Trivial(value=value, text="predicting zero", higher_is_better=False)}

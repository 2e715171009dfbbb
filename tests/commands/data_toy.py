"""A toy that learns from a table of the user's own, as any workload may: it knows nothing of fingerprints."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tests.toys import DEFAULTS, Rows, Toy
from tuner.contract.base import Scalar
from tuner.contract.config import QualityConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Split, WorkloadInfo


class DataToy(Toy):
    """Options besides the toy's: data (CSV with `text` and `label`, or a folder of files), extra (another file)."""

    name = "data_toy"

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        own = dict(options)
        self.path, self.extra = str(own.pop("data", "")), own.pop("extra", "")
        self.asked = dict(options)
        super().__init__(own)
        self.labels = self._labels()

    def _labels(self) -> list[float]:
        if os.path.isdir(self.path):
            return [float(len(path.read_bytes())) for path in sorted(Path(self.path).rglob("*.txt"))]
        with open(self.path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if "label" not in rows[0]:
            raise WorkloadError(f"--data {self.path}: no column 'label'; its columns: {', '.join(rows[0])}")
        return [float(row["label"]) for row in rows]

    def info(self) -> WorkloadInfo:
        info = super().info()
        changed = {
            "workload": f"tests.commands.data_toy:{type(self).__name__}",
            "options": {name: value for name, value in self.asked.items() if DEFAULTS.get(name) != value},
            "quality": QualityConfig(metric="valid_fit", higher_is_better=False),
            "cadence": info.baseline.cadence.model_copy(update={"evaluate_samples": 320}),
            "horizon_samples": 4096 + 16 * len(self.labels),
        }
        return info.model_copy(update={"baseline": info.baseline.model_copy(update=changed)})

    def dataset(self, split: Split) -> Any:
        rows: Rows = super().dataset(split)  # type: ignore[assignment]
        rows.y = rows.y + sum(self.labels) / max(1, len(self.labels))
        return rows


class Vandal(DataToy):
    """Puts a file where the folder `out` was, or other data in place of `data`, once it is measured."""

    def model(self) -> nn.Module:
        if self.extra == "takes the place" and os.path.isdir("out"):
            shutil.rmtree("out")
            Path("out").write_text("in the way")
        if self.extra == "replaces the data":
            Path(self.path).write_text("text,label\nother,3\n", encoding="utf-8")
        return super().model()

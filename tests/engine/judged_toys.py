"""Toys that are judged: figures that can be scripted, an assessment, trivial values, and a prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tests.toys import Toy
from tuner.contract.workload import Batch, Trivial


class Judged(Toy):
    """Adds an assessment (which draws random numbers), trivial values and a prediction."""

    def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        (out_dir / "assessed.txt").write_text(str(seed))
        return {"sharpness": 0.5 + 0.0 * float(torch.rand(1))}

    def trivial(self) -> Mapping[str, Trivial]:
        torch.rand(3)  # must not disturb the training
        error = torch.tanh(torch.randn(1000)).square().mean()
        return {
            "valid_fit": Trivial(value=float(error), text="predicting zero", higher_is_better=False),
            "sharpness": Trivial(value=0.9, text="the data itself"),
        }

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        assert not model.training
        out: Tensor = model(batch["x"])
        return out


class Scripted(Toy):
    """Its validation figure goes through `script`, evaluation by evaluation, over a resume too (by samples seen). A
    look at one batch, as before a training, is none."""

    script: ClassVar[list[float]] = []
    seen: ClassVar[list[float]] = []

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        value = self.script[len(self.seen) % len(self.script)]
        if sum(1 for _ in batches) > 1:
            self.seen.append(value)
        return {"score": value, "other": 1.0}


def scripted(*values: float) -> type[Scripted]:
    """A toy whose figure takes these values in turn."""

    class Made(Scripted):
        script: ClassVar[list[float]] = list(values)
        seen: ClassVar[list[float]] = []

    return Made

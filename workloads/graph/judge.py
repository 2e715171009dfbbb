"""What a model makes of held-out windows, and what one gets without learning. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.contract.workload import Batch, Trivial

from .data import Windows
from .masking import fixed_hidden


@dataclass(frozen=True)
class Judged:
    """One row for every window seen, on the CPU."""

    index: Tensor
    label: Tensor
    answer: Tensor
    """The class said when all channels are shown."""
    class_loss: Tensor
    """Cross-entropy with hidden channels, as in training; float64."""
    errors: Tensor
    """float64 [N, C]: mean squared error of the hidden channels, NaN where shown."""

    def figures(self) -> dict[str, float]:
        masked = float(self.errors.nanmean(1).mean())
        return {
            "loss": masked + float(self.class_loss.mean()),
            "masked_mse": masked,
            "accuracy": float((self.answer == self.label).double().mean()),
        }


def judge(model: nn.Module, batches: Iterable[Batch]) -> Judged:
    """Each window twice: with the channels hidden that its index says, and whole."""
    device = next(model.parameters()).device
    parts = [_judge_batch(model, {name: value.to(device) for name, value in batch.items()}) for batch in batches]
    return Judged(*(torch.cat(columns).cpu() for columns in zip(*parts, strict=True)))


def _judge_batch(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    x, label = batch["x"], batch["label"]
    hidden = fixed_hidden(batch["index"], x.shape[2])
    logits, filled = model(x, hidden)
    whole, _ = model(x, torch.zeros_like(hidden))
    class_loss = functional.cross_entropy(logits.float(), label, reduction="none")
    return batch["index"], label, whole.argmax(1), class_loss.double(), errors_of(filled, x, hidden)


def errors_of(filled: Tensor, x: Tensor, hidden: Tensor) -> Tensor:
    """float64 [B, C]: mean squared error over time of hidden channels, NaN for those shown."""
    return (filled.double() - x.double()).square().mean(1).masked_fill(~hidden, torch.nan)


def majority_by_segment(judged: Judged, segments: Tensor) -> float:
    """Share of recordings of which most windows are classified rightly as one class; `segments` by window index."""
    owner = segments[judged.index]
    right = []
    for segment in owner.unique():
        mine = owner == segment
        right.append(int(judged.answer[mine].mode().values) == int(judged.label[mine][0]))
    return sum(right) / len(right)


def trivial_figures(train: Windows, valid: Windows, batches: Iterable[Batch]) -> Mapping[str, Trivial]:
    """The commonest training class for every window, and hidden channels left at their mean."""
    counts = train.labels.bincount(minlength=int(torch.cat((train.labels, valid.labels)).max()) + 1).double()
    always = counts.argmax()
    surprise = -(counts / counts.sum()).log()[valid.labels].mean()
    recordings = valid.segments.unique()
    firsts = torch.stack([valid.labels[valid.segments == one][0] for one in recordings])
    zero = torch.cat([_zero_fill(batch) for batch in batches]).nanmean(1).mean()
    commonest, mean = "always the commonest training class", "filling hidden channels with their training mean (0)"
    return {
        "accuracy": Trivial(value=float((valid.labels == always).double().mean()), text=commonest),
        "recording_accuracy": Trivial(value=float((firsts == always).double().mean()), text=commonest),
        "balanced_accuracy": Trivial(value=1 / len(valid.labels.unique()), text=commonest),
        "worst_recall": Trivial(value=0.0, text=commonest),
        "masked_mse": Trivial(value=float(zero), text=mean, higher_is_better=False),
        "loss": Trivial(
            value=float(zero + surprise), text=f"{mean}, and each class as often as in training", higher_is_better=False
        ),
    }


def _zero_fill(batch: Batch) -> Tensor:
    x = batch["x"]
    return errors_of(torch.zeros_like(x), x, fixed_hidden(batch["index"], x.shape[2]))

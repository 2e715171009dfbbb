"""Toys whose gradient depends on how a batch is cut, one for each reason, and two that only look like it.

Refer to them as `tests.engine.coupled_toys:Mean`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from tests.toys import Toy
from tuner.contract.workload import Batch, Split, Term


class Mean(Toy):
    """Its first term is a mean over the micro-batch."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        fit = terms["fit"]
        return {**terms, "fit": Term(fit.sum / fit.weight, fit.weight)}


class EvenMean(Mean):
    """The same where every sample has as many tokens."""

    def dataset(self, split: Split) -> Any:
        made: Any = super().dataset(split)
        made.mask = torch.ones_like(made.mask)
        return made


class TokenMean(Toy):
    """A mean over the tokens of a ragged micro-batch, times its samples."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        fit, size = terms["fit"], len(batch["x"])
        return {**terms, "fit": Term(fit.sum / fit.weight * size, float(size))}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return dict.fromkeys(("fit", "size"), float(len(batch["x"])))


class Miscounted(Toy):
    """Counts the longest of its samples as the weight of all."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        return {**terms, "fit": Term(terms["fit"].sum, self.weights(batch)["fit"])}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {**super().weights(batch), "fit": float(batch["mask"].sum(dim=1).max())}


class Dropped(nn.Module):
    """A net that drops with torch's functions: in the layer, and in the attention over a sample's parts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, 16] -> [B, 4]"""
        mixed = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)
        out: Tensor = self.inner(F.dropout(mixed, 0.2, self.training))
        return out


class FunctionalDropout(Toy):
    def model(self) -> nn.Module:
        return Dropped(super().model())


class FreeNoise(Toy):
    """Draws its noise for the batch from the process's random state."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        return super().loss(model, {**batch, "x": batch["x"] + torch.randn_like(batch["x"])})


class _Jittered:
    """A data set that augments at random."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        item = self._inner[index]
        return {**item, "x": item["x"] + 0.1 * torch.randn_like(item["x"])}


class Augmented(Toy):
    def dataset(self, split: Split) -> Any:
        made = super().dataset(split)
        return _Jittered(made) if split == "train" else made


class MaskingCollate(Toy):
    """Masks inputs at random while it collates, as for masked language models."""

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return {**batch, "x": batch["x"] * (torch.rand_like(batch["x"]) > 0.15)}


class Contrastive(Toy):
    """Each sample's negatives are the others of its micro-batch."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        own = F.normalize(model(batch["x"]), dim=1)
        alike = own @ F.normalize(batch["y"], dim=1).T / 0.2
        rank = F.cross_entropy(alike, torch.arange(len(own), device=own.device), reduction="sum")
        return {**terms, "rank": Term(rank, float(len(own)))}

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {**super().weights(batch), "rank": float(len(batch["x"]))}


class WholeOnly(Contrastive):
    """Fails on fewer samples than the baseline's micro-batch."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        if len(batch["x"]) < 8:
            raise ValueError("a batch of at least 8 is needed")
        return super().loss(model, batch)


class OwnStatistics(Toy):
    """Batch norms without running statistics, and a mean in the place of a sum besides."""

    def model(self) -> nn.Module:
        made = super().model()
        for block in made.blocks:  # type: ignore[union-attr]
            block.insert(1, nn.BatchNorm1d(self.options["width"], track_running_stats=False))
        return made


class NormedMean(OwnStatistics, EvenMean):
    """Two faults at once."""

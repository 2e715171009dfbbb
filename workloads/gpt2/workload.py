"""The job: GPT-2 as a classifier of texts with several yes/no labels (task=classify), or as a language model (task=lm).

             tiny                       full
model        2 blocks, width 128        GPT-2 small: 12 blocks, width 768
parameters   667,910                    92,138,502; with GPT-2's own vocabulary of 50,257: 124,444,422
tokens       at most 64                 at most 128
trained      everything                 with `pretrained` the top 8 blocks, ln_f and the head; else everything
lr, head     1e-4, 2e-3                 1e-4, 2e-3 (a language model from nothing: 6e-4)
horizon      24,000 samples             96,000 samples (3,000 steps of 32)

Options: preset, data, task, pretrained (folder of a GPT-2), text_column, label_columns (comma between), padding
(bucket: texts of about equal length together, padded to the longest; fixed: to max_tokens), pad_multiple (lengths are
rounded up to it; compiled models meet fewer shapes the larger it is), max_tokens, blocks, width, trained_blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from tuner.contract.base import Scalar
from tuner.contract.config import (
    LoaderConfig,
    LossBands,
    OptimizerConfig,
    OptimizerName,
    QualityConfig,
    RunConfig,
    ScheduleConfig,
    ScheduleKind,
)
from tuner.contract.workload import Batch, Progress, Split, Term, Trivial, WorkloadInfo

from .dataset import TextDataset
from .metrics import Floats, Scores, score
from .model import (
    Classifier,
    Decoder,
    LanguageModel,
    Size,
    continue_texts,
    groups_of,
    label_losses,
    load_weights,
    token_losses,
)
from .reports import draw_curves, labelled_text, write_scores, write_text
from .settings import Settings
from .tokens import Tokens, load_tokens

MICRO_BATCH = 32
WORKERS, PREFETCH = 4, 2
LR, HEAD_SCALE = 1e-4, 20.0
"""The head learns at 2e-3."""
LR_FROM_NOTHING = 6e-4
"""Of a language model of this size that is not pretrained (Brown et al., 2020, table 2.1)."""
HIGHEST_WEIGHT = 20.0
"""A label rarer than one in 21 weighs no more than that: a single text would otherwise fill a step's gradient."""
SHOWN_TEXTS, PROMPT_TOKENS, NEW_TOKENS = 12, 8, 40
ASSESS_BATCH = 64
BANDS = {
    "classify": LossBands(normal_low=0.2, normal_high=1.3, warn_low=0.02, warn_high=3.0),
    "lm": LossBands(normal_low=1.5, normal_high=7.0, warn_low=0.3, warn_high=12.0),
}


class Gpt2:
    """See the head of this file for the options."""

    preload: Sequence[str] = ("transformers.models.gpt2.modeling_gpt2", "tokenizers", "safetensors.torch")

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self._options = dict(options)
        self._settings = Settings.read(options)
        self._language = self._settings.task == "lm"
        self._tokens: Tokens | None = None
        self._datasets: dict[str, TextDataset] = {}

    def info(self) -> WorkloadInfo:
        job = "GPT-2 language model on" if self._language else "GPT-2 with several yes/no labels on"
        own = "texts" if "data" in self._options else "the docstrings of Python's standard library"
        return WorkloadInfo(
            name="gpt2",
            summary=f"{job} {own}",
            unit="text",
            preset=self._settings.preset_name,
            preset_note=self._settings.preset.note,
            train_samples=self._settings.source.train_count(),
            baseline=self._baseline(),
        )

    def _baseline(self) -> RunConfig:
        """The guide's: 32 x 1, four workers, AdamW at 1e-4, the head at 2e-3, a linear schedule."""
        preset = self._settings.preset
        return RunConfig(
            workload="gpt2",
            options={**self._options, "preset": self._settings.preset_name},
            micro_batch_size=MICRO_BATCH,
            loader=LoaderConfig(num_workers=WORKERS, prefetch_factor=PREFETCH),
            optimizer=OptimizerConfig(
                name=OptimizerName.ADAMW,
                lr=LR_FROM_NOTHING if self._language and self._settings.pretrained is None else LR,
                weight_decay=0.01,
            ),
            schedule=ScheduleConfig(kind=ScheduleKind.LINEAR, warmup_samples=preset.warmup_samples),
            max_grad_norm=1.0,
            horizon_samples=preset.horizon_samples,
            cadence=preset.cadence,
            loss_bands=BANDS[self._settings.task],
            quality=QualityConfig(metric="perplexity", higher_is_better=False)
            if self._language
            else QualityConfig(metric="macro_auc"),
            threads=preset.threads,
        )

    def prepare(self, cache_dir: Path, progress: Progress) -> None:
        """Texts, tokeniser, tokens: made once, afterwards loaded. Raises WorkloadError."""
        settings = self._settings
        self._tokens = load_tokens(
            cache_dir, settings.source, settings.shape.vocabulary, settings.pretrained, settings.asked, progress
        )
        self._datasets = {}

    def model(self) -> nn.Module:
        settings = self._settings
        size = Size(
            blocks=settings.shape.blocks,
            width=settings.shape.width,
            heads=settings.shape.heads,
            vocabulary=settings.shape.vocabulary,
            positions=settings.shape.positions,
            dropout=settings.preset.dropout,
            trained_blocks=settings.trained_blocks,
        )
        model: Decoder = LanguageModel(size) if self._language else Classifier(size, self._positive_weight())
        if settings.pretrained is not None:
            load_weights(model, settings.pretrained)
        return model

    def dataset(self, split: Split) -> TextDataset:
        if split not in self._datasets:
            part, length = self.tokens.part(split), self._settings.max_tokens
            self._datasets[split] = TextDataset(part, length, language=self._language, folds=split == "valid")
        return self._datasets[split]

    def lengths(self, split: Split) -> Sequence[int] | None:
        return self.dataset(split).lengths if self._settings.padding == "bucket" else None

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """{"ids": int64 [B, L], "lengths": int64 [B]} and the other values stacked. L is padded as `padding` says."""
        ids = [item["ids"] for item in items]
        lengths = [len(piece) for piece in ids]
        padded = pad_sequence(ids, batch_first=True)
        batch = {
            "ids": functional.pad(padded, (0, self._padded(max(lengths)) - padded.shape[1])).long(),
            "lengths": torch.tensor(lengths),
        }
        return batch | {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "ids"}

    def _padded(self, length: int) -> int:
        most = self._settings.max_tokens
        if self._settings.padding == "fixed":
            return most
        return min(most, -(-length // self._settings.pad_multiple) * self._settings.pad_multiple)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Texts, or the tokens that are predicted."""
        if self._language:
            return {"nll": float((batch["lengths"] - 1).sum())}
        return {"bce": float(len(batch["lengths"]))}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        if self._language:
            total, count = token_losses(model(batch["ids"]), batch["ids"], batch["lengths"])
            return {"nll": Term(sum=total, weight=count)}
        logits = model(batch["ids"], batch["lengths"])
        losses = label_losses(logits, batch["labels"], _positive_weight_of(model))
        return {"bce": Term(sum=losses.sum(), weight=float(len(losses)))}

    def param_groups(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        assert isinstance(model, Decoder)
        trunk, head = groups_of(model)
        return [{"params": trunk}, {"params": head, "lr_scale": HEAD_SCALE}]

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Frozen blocks keep nothing for the backward pass, so only trained ones are worth computing twice."""
        assert isinstance(model, Decoder)
        return model.trained_blocks()

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Probabilities [B, labels]; for the language model the likeliest token at each place [B, L]."""
        if self._language:
            return torch.as_tensor(model(batch["ids"]).argmax(dim=-1))
        return torch.as_tensor(model(batch["ids"], batch["lengths"]).float().sigmoid())

    # --- quality ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        """classify: loss, macro_auc, macro_f1 (each half of validation judged by the other half's thresholds),
        macro_f1_at_half and threshold_LABEL. lm: loss (nats a token), perplexity, bits_per_byte."""
        return self._language_figures(model, batches) if self._language else self._label_figures(model, batches)

    def _label_figures(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        loss, probability, truth, fold = _predictions(model, batches)
        scores = score(probability, truth, fold)
        figures = {
            "loss": loss,
            "macro_auc": scores.macro_auc,
            "macro_f1": float(scores.f1.mean()),
            "macro_f1_at_half": float(scores.f1_at_half.mean()),
        }
        names = self.tokens.label_names
        return figures | {f"threshold_{name}": float(t) for name, t in zip(names, scores.threshold, strict=True)}

    def _language_figures(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        total, tokens, size = 0.0, 0, 0
        width = self.tokens.byte_counts(self._settings.shape.vocabulary)
        for batch in batches:
            nll, count = token_losses(model(batch["ids"]), batch["ids"], batch["lengths"])
            total, tokens = total + float(nll), tokens + int(count)
            size += int((width.to(batch["ids"].device)[batch["ids"]] * _real(batch))[:, 1:].sum())
        return _language_metrics(total, tokens, size)

    @torch.no_grad()
    def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
        """classify: labels.csv and roc.png, auc_LABEL and f1_LABEL. lm: continuations.txt, and distinct_pairs: the
        share of different pairs of neighbouring tokens among all generated ones (low = the model repeats itself)."""
        if self._language:
            written = self._continue(model, out_dir / "continuations.txt", seed)
            pairs = [pair for row in written.tolist() for pair in itertools.pairwise(row)]
            return {"distinct_pairs": len(set(pairs)) / max(1, len(pairs))}
        names = self.tokens.label_names
        _, probability, truth, scores = self._all_predictions(model)
        write_scores(out_dir / "labels.csv", names, scores)
        draw_curves(out_dir / "roc.png", names, probability, truth, scores)
        known = [place for place in range(len(names)) if not math.isnan(scores.auc[place])]
        auc = {f"auc_{names[place]}": float(scores.auc[place]) for place in known}
        return auc | {f"f1_{name}": float(value) for name, value in zip(names, scores.f1, strict=True)}

    def trivial(self) -> Mapping[str, Trivial]:
        """From the data: chance, a yes to everything, the training labels' frequencies, the tokens' frequencies."""
        return self._trivial_language() if self._language else self._trivial_labels()

    def _trivial_labels(self) -> dict[str, Trivial]:
        tokens = self.tokens
        rate = tokens.valid.labels.double().mean(dim=0)
        always = float((2 * rate / (1 + rate)).mean())
        weight, frequency = self._positive_weight(), tokens.train.labels.mean(dim=0)
        odds = (weight * frequency / (1 - frequency)).log().expand_as(tokens.valid.labels)
        loss = float(label_losses(odds, tokens.valid.labels, weight).mean())
        return {
            "macro_auc": Trivial(value=0.5, text="chance"),
            "macro_f1": Trivial(value=always, text="saying yes to every label"),
            "loss": Trivial(value=loss, text="the training labels' frequencies", higher_is_better=False),
        }

    def _trivial_language(self) -> dict[str, Trivial]:
        tokens, size = self.tokens, self._settings.shape.vocabulary
        seen = torch.bincount(tokens.train.ids[1:].long(), minlength=size).double() + 1
        targets = tokens.valid.ids[1:].long()
        nll = -(seen / seen.sum()).log()[targets].sum()
        figures = _language_metrics(float(nll), len(targets), int(tokens.byte_counts(size)[targets].sum()))
        text = "how often each token occurs in training"
        return {name: Trivial(value=value, text=text, higher_is_better=False) for name, value in figures.items()}

    @torch.no_grad()
    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]:
        """texts-SEED.txt: validation texts with true and predicted labels; or their beginnings, continued."""
        path = out_dir / f"texts-{seed}.txt"
        if self._language:
            self._continue(model, path, seed)
            return [path]
        items, probability, truth, scores = self._all_predictions(model)
        names, tokens = self.tokens.label_names, self.tokens
        chosen = np.random.default_rng(seed).permutation(len(items))[:SHOWN_TEXTS]
        shown = [
            labelled_text(tokens.decode(items[i]["ids"]), names, probability[i], truth[i], scores.threshold)
            for i in chosen
        ]
        return [write_text(path, "\n".join(shown))]

    def _all_predictions(self, model: nn.Module) -> tuple[TextDataset, Floats, Floats, Scores]:
        dataset, device = self.dataset("valid"), next(model.parameters()).device
        cuts = [range(at, min(at + ASSESS_BATCH, len(dataset))) for at in range(0, len(dataset), ASSESS_BATCH)]
        batches = (self.collate([dataset[index] for index in cut]) for cut in cuts)
        moved = ({name: value.to(device) for name, value in batch.items()} for batch in batches)
        _, probability, truth, fold = _predictions(model, moved)
        return dataset, probability, truth, score(probability, truth, fold)

    def _continue(self, model: nn.Module, path: Path, seed: int) -> Tensor:
        """Write beginnings of validation texts and what the model makes of them; returns the new tokens [B, new]."""
        assert isinstance(model, LanguageModel)
        dataset, tokens = self.dataset("valid"), self.tokens
        length = min(PROMPT_TOKENS + 1, max(dataset.lengths))
        long = [index for index in range(len(dataset)) if dataset.lengths[index] >= length]
        chosen = np.random.default_rng(seed).permutation(long)[:SHOWN_TEXTS]
        start = torch.stack([dataset[int(index)]["ids"][:length].long() for index in chosen])
        made = continue_texts(model, start.to(next(model.parameters()).device), NEW_TOKENS, seed).cpu()
        shown = [f"{tokens.decode(row[:length])} >>> {tokens.decode(row[length:])}\n" for row in made]
        write_text(path, "\n".join(shown))
        return made[:, length:]

    def _positive_weight(self) -> Tensor:
        """float32 [labels]: how many times more often the answer is no than yes in training."""
        labels = self.tokens.train.labels
        yes = labels.sum(dim=0)
        return ((len(labels) - yes) / yes.clamp(min=1)).clamp(min=1 / HIGHEST_WEIGHT, max=HIGHEST_WEIGHT)

    @property
    def tokens(self) -> Tokens:
        """What `prepare` has loaded."""
        if self._tokens is None:
            raise RuntimeError("prepare(cache_dir, progress) must be called before data, models or samples")
        return self._tokens


def _positive_weight_of(model: nn.Module) -> Tensor:
    assert isinstance(model, Classifier)
    return model.positive_weight


def _real(batch: Batch) -> Tensor:
    return torch.arange(batch["ids"].shape[1], device=batch["ids"].device) < batch["lengths"][:, None]


def _predictions(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, Floats, Floats, Any]:
    """Mean loss, probabilities and truth [N, labels], folds [N]."""
    loss = 0.0
    logits: list[Tensor] = []
    truth: list[Tensor] = []
    fold: list[Tensor] = []
    for batch in batches:
        out = model(batch["ids"], batch["lengths"]).float()
        loss += float(label_losses(out, batch["labels"], _positive_weight_of(model)).double().sum())
        for kept, value in ((logits, out), (truth, batch["labels"]), (fold, batch["fold"])):
            kept.append(value.cpu())
    probability = torch.cat(logits).double().sigmoid().numpy()
    return loss / len(probability), probability, torch.cat(truth).double().numpy(), torch.cat(fold).numpy()


def _language_metrics(nll: float, tokens: int, size: int) -> dict[str, float]:
    loss = nll / max(1, tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 100.0)),
        "bits_per_byte": nll / math.log(2) / max(1, size),
    }

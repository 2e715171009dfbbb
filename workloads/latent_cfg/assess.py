"""Tables and pictures of judged samples: whether they show their class, and what training pictures lie nearest."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cache import Latents
from .classifier import answers
from .judge import Judge, Nearest, nearest_training
from .pictures import GREEN, PLAIN, RED, write_grid

GRID_ROWS, GRID_COLUMNS = 12, 8
Show = Callable[[Tensor], Tensor]
"""Standardised latents [B, 4, s, s] -> pictures [B, 3, size, size] in [-1, 1], on the CPU."""


@dataclass(frozen=True)
class Judged:
    """Samples, class by class and equally many of each, and what the judge makes of them. All on the CPU."""

    samples: Tensor
    labels: Tensor
    answers: Tensor
    nearest: Nearest
    memorised: Tensor
    """bool [B]"""

    @property
    def matches(self) -> Tensor:
        return self.answers == self.labels


def judged(samples: Tensor, labels: Tensor, latents: Latents, judge: Judge) -> Judged:
    """Standardised samples [B, 4, s, s] of the classes `labels` [B]."""
    nearest = nearest_training(samples, latents.train)
    seen = answers(judge.classifier, samples.cpu())
    return Judged(samples.cpu(), labels.cpu(), seen, nearest, nearest.ratio <= judge.threshold)


def figures(found: Judged, latents: Latents, judge: Judge) -> dict[str, float]:
    """`class_match` beside what the judge reaches on real held-out pictures (guided samples may exceed it, being more
    typical than those); `memorised_share`; `nearest_distance`, 1 = as far from training pictures as held-out ones;
    `sample_deviation`, 1 = as varied as the training latents."""
    real = judge.held_out_answers == latents.valid_labels
    return {
        "class_match": float(found.matches.double().mean()),
        "class_match_real": float(real.double().mean()),
        "memorised_share": float(found.memorised.double().mean()),
        "nearest_distance": float(found.nearest.distance.median()) / max(judge.distance, 1e-9),
        "sample_deviation": float(found.samples.std()) / max(float(latents.train.std()), 1e-9),
    }


def write_class_table(found: Judged, names: Sequence[str], latents: Latents, judge: Judge, path: Path) -> Path:
    """A row for each class: how many of its samples were recognised, what they were taken for, and the same of real
    held-out pictures."""
    heads = ("class", "name", "samples", "matched", "class_match", "most_often_seen_as", "real", "class_match_real")
    rows: list[tuple[object, ...]] = []
    real = judge.held_out_answers == latents.valid_labels
    for number in found.labels.unique().tolist():
        mine, held = found.labels == number, latents.valid_labels == number
        matched, seen = int(found.matches[mine].sum()), int(found.answers[mine].mode().values)
        made = (number, names[number], int(mine.sum()), matched, _share(found.matches[mine]), names[seen])
        rows.append((*made, int(held.sum()), _share(real[held])))
    return _write_csv(path, heads, rows)


def write_nearest_table(found: Judged, latents: Latents, names: Sequence[str], path: Path) -> Path:
    """A row for each sample: its nearest training picture (row of the training split), how far, and the verdict."""
    heads = ("sample", "class", "seen_as", "distance", "ratio", "memorised", "nearest_row", "nearest_class")
    rows = (
        (
            sample,
            names[int(found.labels[sample])],
            names[int(found.answers[sample])],
            f"{float(found.nearest.distance[sample]):.5f}",
            f"{float(found.nearest.ratio[sample]):.5f}",
            int(found.memorised[sample]),
            row := int(found.nearest.rows[sample, 0]),
            names[int(latents.train_labels[row])],
        )
        for sample in range(len(found.samples))
    )
    return _write_csv(path, heads, rows)


def draw_classes(found: Judged, latents: Latents, show: Show, path: Path) -> Path:
    """A row for each class (twelve at most): a real held-out picture, then samples; green frame: class recognised."""
    classes = found.labels.unique()[:GRID_ROWS].tolist()
    rows, frames = [], []
    for number in classes:
        mine = (found.labels == number).nonzero()[:GRID_COLUMNS, 0]
        rows.append(torch.cat((latents.valid[latents.valid_labels == number][:1], found.samples[mine])))
        frames.append([PLAIN] + [GREEN if good else RED for good in found.matches[mine].tolist()])
    return write_grid(_shown(torch.stack(rows), show), path, frames)


def draw_nearest(found: Judged, latents: Latents, show: Show, path: Path) -> Path:
    """The eight samples most like copies, the most suspicious first, each beside its nearest training pictures; a red
    frame: memorised."""
    worst = found.nearest.ratio.argsort()[:GRID_COLUMNS]
    rows = [torch.cat((found.samples[i : i + 1], latents.train[found.nearest.rows[i]])) for i in worst.tolist()]
    frames = [[RED if found.memorised[i] else PLAIN] + [PLAIN] * (len(rows[0]) - 1) for i in worst.tolist()]
    return write_grid(_shown(torch.stack(rows), show), path, frames)


def _shown(grid: Tensor, show: Show) -> Tensor:
    pictures: Tensor = show(grid.flatten(0, 1)).unflatten(0, grid.shape[:2])
    return pictures


def _share(good: Tensor) -> str:
    return f"{float(good.double().mean()):.4f}"


def _write_csv(path: Path, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heads)
        writer.writerows(rows)
    partial.replace(path)
    return path

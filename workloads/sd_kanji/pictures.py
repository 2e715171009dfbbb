"""Rows of pictures behind their prompts, and how well a picture fits the prompt it was made for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

LABEL_WIDTH, LINE = 150, 11
"""Pixels the prompt gets in front of its row, and the height of a line of it."""
FEATURE_SIDE = 16


@dataclass(frozen=True)
class Row:
    label: str
    pictures: Sequence[Tensor | None]
    """float32 [3, s, s] in [-1, 1]; None leaves the place empty."""


def match_shares(made: Tensor, real: Tensor, others: Tensor, mean: Tensor) -> Tensor:
    """For each generated picture the share of `others` that look less like it than its own prompt's picture does.

    made, real: float [N, 3, s, s], row by row of one prompt; others: float [M, 3, s, s], pictures of other prompts;
    mean: float [3, s, s]. 1 = none of the others is nearer, 0.5 = chance. Likeness is the cosine between greys averaged
    over 16 x 16 places less those of the mean picture; the same measure at every picture size.
    """
    makings, own, rest = (_features(pictures, mean) for pictures in (made, real, others))
    likeness = (makings * own).sum(dim=1, keepdim=True)
    against = makings @ rest.T
    return ((against < likeness).float() + 0.5 * (against == likeness).float()).mean(dim=1)


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    """One PNG with a line for each row: its label, then its pictures, each at least 64 pixels wide."""
    from PIL import Image, ImageDraw

    size = next(picture.shape[-1] for row in rows for picture in row.pictures if picture is not None)
    side = size * max(1, round(64 / size))
    gap = max(2, side // 32)
    columns = max(len(row.pictures) for row in rows)
    canvas = Image.new("RGB", (LABEL_WIDTH + columns * (side + gap), len(rows) * (side + gap) - gap), "white")
    pen = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        top = number * (side + gap)
        pen.multiline_text((4, top + 4), _wrapped(row.label, side), fill="black", font_size=LINE - 1, spacing=1)
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                tile = Image.fromarray(_pixels(picture)).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (LABEL_WIDTH + column * (side + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    canvas.save(partial, format="PNG")
    partial.replace(path)
    return path


def _features(pictures: Tensor, mean: Tensor) -> Tensor:
    small = functional.adaptive_avg_pool2d((pictures - mean).mean(dim=1, keepdim=True), FEATURE_SIDE)
    return functional.normalize(small.flatten(1), dim=1)


def _wrapped(label: str, height: int) -> str:
    """The label in lines of the label's width; what does not fit beside the picture is cut. Other scripts than Latin
    may show as boxes: the font is the one Pillow brings."""
    lines = textwrap.wrap(label, width=LABEL_WIDTH // 6) or [""]
    return "\n".join(lines[: max(1, height // LINE)])


def _pixels(picture: Tensor) -> NDArray[np.uint8]:
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return np.asarray(pixels.cpu())

"""Grids of pictures as PNG, and latents as colours where there is no codec to decode them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

Colour = tuple[float, float, float]
PLAIN: Colour = (1.0, 1.0, 1.0)
GREEN: Colour = (-0.6, 0.4, -0.4)
RED: Colour = (0.6, -0.6, -0.6)
FALSE_COLOUR_PIXELS = 8
"""Side of the square that shows one cell of a latent."""


def write_grid(pictures: Tensor, path: Path, frames: Sequence[Sequence[Colour]] | None = None) -> Path:
    """[rows, columns, 3, size, size] in [-1, 1] -> one PNG; the first column stands apart. `frames`: the colour around
    each picture."""
    from PIL import Image

    rows, columns, _, size, _ = pictures.shape
    gap, line = max(2, size // 32), size // 4
    edge = gap if frames else 0
    pitch = size + gap + 2 * edge
    canvas = torch.ones(3, rows * pitch - gap, columns * pitch - gap + line)
    for row in range(rows):
        for column in range(columns):
            top, left = row * pitch, column * pitch + (line if column else 0)
            if frames:
                colour = torch.tensor(frames[row][column]).view(3, 1, 1)
                canvas[:, top : top + size + 2 * edge, left : left + size + 2 * edge] = colour
            inner = (slice(None), slice(top + edge, top + edge + size), slice(left + edge, left + edge + size))
            canvas[inner] = pictures[row, column]
    pixels = ((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
    return path


def false_colours(latents: Tensor, bound: float = 3.0) -> Tensor:
    """Standardised latents [B, 4, s, s] -> pictures [B, 3, 8 s, 8 s] in [-1, 1]: the first three channels as red, green
    and blue, each darkened where the fourth is low."""
    shades = (latents[:, :3] / bound).clamp(-1, 1)
    light = ((latents[:, 3:] / bound).clamp(-1, 1) + 3) / 4
    picture = (shades + 1) * light - 1
    return picture.repeat_interleave(FALSE_COLOUR_PIXELS, 2).repeat_interleave(FALSE_COLOUR_PIXELS, 3)

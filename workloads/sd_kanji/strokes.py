"""Pictures of kanji from stroke outlines: SVG path data -> points -> antialiased greys. Knows no files and no prompts.

KanjiVG draws each stroke as one path of M, C and S commands (absolute or relative) on a square of 109 units.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

CANVAS = 109.0
"""Side of KanjiVG's drawing area."""
PEN = 3.0
"""Width of a stroke, in the same units; KanjiVG's own."""
SUPERSAMPLING = 4
SEGMENTS = 12
"""Straight pieces a curve is cut into: at 128 px none bends by a quarter of a pixel."""

Points = NDArray[np.float64]
"""[n, 2] positions on the canvas."""

_Point = tuple[float, float]
_PATH = re.compile(r'<path\b[^>]*?\sd="([^"]*)"')
_TOKEN = re.compile(r"[A-Za-z]|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_VALUES = {"M": 2, "C": 6, "S": 4}
_STEPS = np.linspace(0.0, 1.0, SEGMENTS + 1)[:, None]
_BERNSTEIN = np.concatenate(
    [(1 - _STEPS) ** 3, 3 * _STEPS * (1 - _STEPS) ** 2, 3 * _STEPS**2 * (1 - _STEPS), _STEPS**3], axis=1
)
"""[SEGMENTS + 1, 4]: weights of a cubic curve's four control points."""


def strokes_of(svg: str) -> list[Points]:
    """The strokes of one KanjiVG file, in writing order. Raises ValueError for a path it cannot read."""
    return [flatten(path) for path in _PATH.findall(svg)]


def flatten(path: str) -> Points:
    """The points of an SVG path of M, C and S commands: [n, 2]; every 12th is where two curves meet.

    Raises ValueError for other commands.
    """
    curves = [_BERNSTEIN @ np.array(curve) for curve in _curves(path)]
    return np.concatenate([curves[0][:1], *(curve[1:] for curve in curves)])


def draw(strokes: Sequence[Points], size: int) -> NDArray[np.uint8]:
    """Black round strokes on white: uint8 [size, size]."""
    from PIL import Image, ImageDraw

    fine = size * SUPERSAMPLING
    scale = fine / CANVAS
    width = max(1, round(PEN * scale))
    picture = Image.new("L", (fine, fine), 255)
    pen = ImageDraw.Draw(picture)
    for stroke in strokes:
        points = [(x, y) for x, y in (stroke * scale).tolist()]
        pen.line(points, fill=0, width=width)
        for x, y in points[::SEGMENTS]:  # round ends and joints: a thick line alone leaves notches where it bends
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=0)
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


def _curves(path: str) -> Iterator[tuple[_Point, _Point, _Point, _Point]]:
    """The cubic curves of a path, each by its four control points."""
    tokens = _TOKEN.findall(path)
    place, command = 0, ""
    at = control = (0.0, 0.0)
    while place < len(tokens):
        if tokens[place].isalpha():
            command, place = tokens[place], place + 1
        count = _VALUES.get(command.upper(), 0)
        numbers = tokens[place : place + count]
        if not count or len(numbers) < count or any(token.isalpha() for token in numbers):
            raise ValueError(f"SVG path: {command or tokens[place]!r} is no complete M, C or S command: {path[:60]}")
        place += count
        x, y = at if command.islower() else (0.0, 0.0)
        values = [float(number) for number in numbers]
        points = [(x + values[i], y + values[i + 1]) for i in range(0, count, 2)]
        if command in "Mm":
            at = control = points[0]
            continue
        mirrored = (2 * at[0] - control[0], 2 * at[1] - control[1])  # S goes on as the last curve ended
        first = points[0] if command in "Cc" else mirrored
        yield at, first, points[-2], points[-1]
        at, control = points[-1], points[-2]

"""Are two runs the same to the bit, can what a kill left be read, and is every flipped bit noticed?"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch

from tuner.engine.checkpoint import Checkpointer, CheckpointError, load
from tuner.engine.tree import take_apart

TIMES = ("elapsed_s", "samples_per_s", "data_wait")
"""Columns of metrics.csv that are seconds, and so never the same twice."""


def differences(whole: Path, other: Path) -> list[str]:
    """What differs between two finished run folders, in words; empty when nothing does."""
    found = state_differences(whole / "checkpoints", other / "checkpoints")
    if curve(whole / "metrics.csv") != curve(other / "metrics.csv"):
        found.append("metrics.csv")
    evaluations = curve(other / "evaluations.csv")
    if any(row not in evaluations for row in curve(whole / "evaluations.csv")):
        found.append("evaluations.csv")
    return found


def state_differences(whole: Path, other: Path) -> list[str]:
    """Between the newest states of two checkpoint folders."""
    first, second = Checkpointer(whole).latest(), Checkpointer(other).latest()
    if first is None or second is None:
        return ["no checkpoint"]
    tensors, plain = take_apart(first)
    others, other_plain = take_apart(second)
    found = [name for name, value in tensors.items() if name not in others or not same_bits(value, others[name])]
    found += sorted(others.keys() - tensors.keys())
    return found + (["state.json"] if json.dumps(plain) != json.dumps(other_plain) else [])


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """NaN equals NaN here, and 0 is not -0."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (first, second)))


def curve(path: Path) -> list[dict[str, str]]:
    """The rows of a table without its clocks."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as source:
        return [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(source)]


def unloadable(folder: Path, had_one: bool) -> tuple[str, bool]:
    """What is wrong with the checkpoints a kill left (empty: nothing), and whether there is one now.

    `had_one`: whether there was one before, for then there must be one now.
    """
    told: list[str] = []
    try:
        state = Checkpointer(folder).latest(told.append)
    except CheckpointError as error:
        return str(error), True
    if told:
        return told[0], True
    if state is None and had_one:
        return "the checkpoints are gone", True
    return "", state is not None


def flips_found(folder: Path, flips: int, chance: random.Random) -> int:
    """Flip one bit at a random place of a random file of the newest checkpoint, `flips` times; how many are noticed."""
    checkpoint = Checkpointer(folder).all()[0]
    return sum(notices_flip(checkpoint, chance) for _ in range(flips))


def notices_flip(checkpoint: Path, chance: random.Random) -> bool:
    file = chance.choice(sorted(checkpoint.iterdir()))
    place, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
    _flip(file, place, bit)
    try:
        load(checkpoint)
    except CheckpointError:
        return True
    finally:
        _flip(file, place, bit)
    return False


def _flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as target:
        target.seek(place)
        (byte,) = target.read(1)
        target.seek(place)
        target.write(bytes([byte ^ (1 << bit)]))

"""What a run went on with instead of what its file says: a choice confirmed on the spot, or a fallback after the memory
ran out. Kept in the run's folder, so that the same command goes on with it."""

from __future__ import annotations

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.tuned import Confirmed, Promise

CONFIRMED_FILE = "confirmed.json"
FALLBACK_FILE = "fallback.json"


class Confirmation(Frozen):
    """confirmed.json: the top few configurations measured on this machine, and the one chosen."""

    asked: str
    """Digest of the configuration the file ships."""
    device: str
    at: str
    """UTC, ISO 8601."""
    sides: tuple[Confirmed, ...]
    chosen: RunConfig
    reason: str
    promise: Promise


class FellBack(Frozen):
    """One change of configuration in the middle of a run."""

    ended: RunConfig
    """What ran out of memory."""
    outcome: Outcome
    message: str
    samples: int | None
    """Where it ended; None = not told, as its process was killed."""
    chosen: RunConfig
    why: str
    at: str
    """UTC, ISO 8601."""


class Fallbacks(Frozen):
    """fallback.json: every change so far; the last one names what the folder goes on with."""

    asked: str
    """Digest of the configuration the file ships."""
    steps: tuple[FellBack, ...]

"""tuner: find the fastest safe configuration of a PyTorch training job, then run that job."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing is not imported: `python -m` looks for it in the current folder first
if TYPE_CHECKING:
    from typing import Any

    from tuner.search.public_sampler import TunerSampler as TunerSampler

__version__ = "0.1.0"
__all__ = ["TunerSampler", "__version__"]

_LAZY = {"TunerSampler": "tuner.search.public_sampler"}
"""Public names -> where they live; imported when asked for, so that `import tuner` brings neither torch nor Optuna."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

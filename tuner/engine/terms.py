"""What a workload's `loss` returned -> loss terms. The one place that knows the short ways to write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tuner.contract.errors import WorkloadError
from tuner.contract.workload import SAMPLE_SEED, Term, Terms
from tuner.engine.notices import warn_once

LOSS = "loss"
"""Name of the term where `loss` returned a tensor alone."""
_PLAIN = (
    "loss: it returned a plain tensor, which is taken as the mean over the micro-batch's samples. For a mean over "
    'anything else (tokens, unmasked cells) return {"loss": Term(sum=..., weight=...)}; '
    "a probe of kind equivalence (`tuner probe --help`) shows whether it matters"
)


def terms_of(found: Any, batch: Mapping[str, Tensor]) -> Terms:
    """Terms as they are; a scalar tensor, alone or by name, as the mean over the samples of `batch`.

    Raises WorkloadError for anything else. A tensor is told to the author, once.
    """
    if isinstance(found, Mapping):
        for value in found.values():
            if type(value) is not Term:
                break
        else:
            return found
        return {name: _term(value, f"a dict in which {name!r} is ", batch) for name, value in found.items()}
    return {LOSS: _term(found, "", batch)}


def _term(value: Any, where: str, batch: Mapping[str, Tensor]) -> Term:
    if isinstance(value, Term) and where:
        return value
    if not isinstance(value, Tensor) or value.dim():
        raise WorkloadError(
            f'loss: it returned {where}{_described(value)}; return {{"loss": Term(sum=..., weight=...)}} or a scalar '
            "tensor that is the mean over the micro-batch"
        )
    warn_once(_PLAIN)
    samples = len(batch[SAMPLE_SEED])
    return Term(sum=value * samples, weight=float(samples))


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}" + (f" ({value:g})" if isinstance(value, float) else "")

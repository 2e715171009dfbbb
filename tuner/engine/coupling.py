"""How a micro-batch's gradient is made of its parts': their sum, another combination of them, or none at all.

Of a loss that is a sum over independent samples it is the sum of the parts' gradients. A mean, or weights that depend
on the batch, leave a combination with other coefficients; samples that influence each other leave no combination.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner.contract.equivalence import Figure
from tuner.contract.workload import Term
from tuner.engine.failure import release
from tuner.engine.fixed_samples import FixedSamples
from tuner.engine.global_random import seed_all
from tuner.engine.loader import Group, Key
from tuner.engine.precision import Arithmetic
from tuner.engine.step import GradientMaker

MOST_SAMPLES = 16
MOST_PARTS = 8
COORDINATES = 1 << 20
"""At most so many numbers of a gradient are looked at, evenly spread over the parameters."""


class Pieces:
    """Gradients of one loss term on samples of one's own choosing, always from the same weights and random states."""

    def __init__(
        self,
        workload: Any,
        model: nn.Module,
        state: Mapping[str, Tensor],
        samples: FixedSamples,
        arithmetic: Arithmetic,
    ) -> None:
        self.workload = workload
        self.model = model
        self._samples = samples
        self._arithmetic = arithmetic
        self._state = state
        self._stride = 1 + sum(p.numel() for p in model.parameters()) // COORDINATES

    def terms(self, keys: Sequence[Key]) -> list[str]:
        """Names of the terms that depend on a parameter; a loss without names is called `loss`."""
        asked = _OneTerm(self.workload, None)
        self._run(asked, keys)
        return asked.seen

    def gradient(self, keys: Sequence[Key], term: str) -> Tensor:
        """Of the term's sum, divided by nothing: float64 [at most COORDINATES]."""
        self._run(_OneTerm(self.workload, term), keys)
        found = torch.cat([self._sampled(parameter) for parameter in self.model.parameters()])
        return found.to("cpu", torch.float64)

    def _run(self, workload: _OneTerm, keys: Sequence[Key]) -> None:
        self.model.load_state_dict(self._state)
        self.model.zero_grad(set_to_none=True)
        batches = self._samples.batches([list(keys)])
        seed_all(0)
        maker = GradientMaker(workload, self.model, self._arithmetic, channels_last=False)
        maker.trusting = True
        maker(Group(batches, _Ones()))

    def _sampled(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        if gradient is None:
            return parameter.new_zeros(len(range(0, parameter.numel(), self._stride)))
        return (gradient.to_dense() if gradient.is_sparse else gradient).flatten()[:: self._stride]


class _Ones(dict[str, float]):
    """Every term is divided by 1."""

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ARG002
        return 1.0


class _OneTerm:
    """The workload with one of its loss terms alone (None: all of them, looked at)."""

    def __init__(self, workload: Any, term: str | None) -> None:
        self._workload = workload
        self._term = term
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workload, name)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        found = self._workload.loss(model, batch)
        if not isinstance(found, Mapping):
            self.seen = ["loss"]
            return found
        terms: Mapping[str, Term] = found
        self.seen = [name for name, term in terms.items() if term.sum.requires_grad]
        return terms if self._term is None else {self._term: terms[self._term]}


def term_figures(pieces: Pieces, keys: Sequence[Key]) -> dict[str, float]:
    """SUM, SPAN and TOTAL of every term, and PARTS, on the first of the micro-batch's samples. Raises what the workload
    raises where no part of them runs alone."""
    few = keys[:MOST_SAMPLES]
    counts = _part_counts(len(few))
    for count in counts:
        parts = [few[len(few) * i // count : len(few) * (i + 1) // count] for i in range(count)]
        try:
            return {Figure.PARTS: float(count), **dict(_figures(pieces, few, parts))}
        except Exception as error:
            if count == counts[-1]:
                raise
            release(error)
    return {}


def _part_counts(size: int) -> list[int]:
    """The finest first; larger parts where a single sample cannot be run (a batch norm, a loss over pairs)."""
    most = min(MOST_PARTS, size)
    return [count for count in (most, most // 2, most // 4) if count > 1]


def _figures(pieces: Pieces, whole: Sequence[Key], parts: Sequence[Sequence[Key]]) -> Iterator[tuple[str, float]]:
    for name in pieces.terms(whole):
        target = pieces.gradient(whole, name)
        columns = torch.stack([pieces.gradient(part, name) for part in parts], dim=1)
        size = float(target.norm()) or float(columns.norm())
        if not size:
            continue
        residual, total = nearest_combination(target, columns)
        yield Figure.SUM.of(name), float((target - columns.sum(dim=1)).norm()) / size
        yield Figure.SPAN.of(name), residual / size
        yield Figure.TOTAL.of(name), total


def nearest_combination(target: Tensor, columns: Tensor) -> tuple[float, float]:
    """Least squares of `target` [D] on `columns` [D, n]: norm of what is left, and sum of the coefficients."""
    sizes = columns.norm(dim=0)
    used = columns[:, sizes > 0] / sizes[sizes > 0]
    found = torch.linalg.lstsq(used, target[:, None], rcond=1e-6, driver="gelsd").solution[:, 0]
    return float((target - used @ found).norm()), float((found / sizes[sizes > 0]).sum())

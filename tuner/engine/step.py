"""One optimizer step: count the group's weights, run its micro-batches, clip, update.

Each loss term is divided by the weight of the whole GROUP before the backward pass, so 8x2 and 16x1 give the same
gradient even where micro-batches weigh differently (ragged tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Term
from tuner.engine.loader import Group, TensorBatch, batch_size, to_device
from tuner.engine.precision import Arithmetic

TOTAL = "total"
Span = Callable[[str], AbstractContextManager[Any]]
"""Name of a part of the step -> a context held around it."""
_NOTHING = nullcontext()


def no_span(name: str) -> AbstractContextManager[Any]:  # noqa: ARG001
    """The span of a run that nobody profiles: one object for all, made once."""
    return _NOTHING


@dataclass
class StepResult:
    """What one step did. Tensors stay on the device: reading them waits for it."""

    samples: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Weighted mean of each term, and `total`, which was differentiated. 0-dimensional."""
    grad_norm: Tensor | None = None
    """Before clipping; None when nothing is clipped."""
    lr: float = 0.0
    wait_s: float = 0.0


class GradientMaker:
    """Turns a group of micro-batches into gradients on the model."""

    def __init__(self, workload: Any, model: nn.Module, arithmetic: Arithmetic, *, channels_last: bool) -> None:
        self.workload = workload
        self.model = model
        self.arithmetic = arithmetic
        self.channels_last = channels_last
        self.marks_steps = False
        """True when outputs live in CUDA graphs, which must be told where an iteration begins."""
        self.trusting = False
        """True once the loss was seen to say what the loop assumes (or cannot be asked, on fake tensors)."""
        self.span: Span = no_span
        """Held around the parts `transfer`, `forward` and `backward`."""

    def __call__(self, group: Group, first_context: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
        """Accumulate the group's gradient; returns the losses. `first_context` is held during the first micro-batch."""
        samples = float(group.samples)
        losses: dict[str, Tensor] = {}
        for number, batch in enumerate(group.batches):
            context = first_context if first_context is not None and number == 0 else nullcontext()
            with context:
                self._micro_batch(batch, group.weights, samples, losses)
        return losses

    def _micro_batch(
        self, batch: TensorBatch, weights: Mapping[str, float], samples: float, losses: dict[str, Tensor]
    ) -> None:
        if self.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        with self.span("transfer"):
            moved = to_device(batch, self.arithmetic.device, channels_last=self.channels_last)
        with self.span("forward"), self.arithmetic.autocast():
            terms = self.workload.loss(self.model, moved)
        if not self.trusting:
            self._check(terms, moved)
        total: Tensor | float = 0.0
        for name, term in terms.items():
            weight = weights.get(name, samples)
            mean = term.sum.float() / weight if weight else term.sum.float() * 0.0
            total = total + term.coefficient * mean
            _add(losses, name, mean)
        assert isinstance(total, Tensor)
        _add(losses, TOTAL, total)
        scaler = self.arithmetic.scaler
        with self.span("backward"):
            (total if scaler is None else scaler.scale(total)).backward()

    def _check(self, terms: Mapping[str, Term], batch: TensorBatch) -> None:
        """Once: does the loss say what the loop assumes? Raises WorkloadError."""
        if not terms:
            raise WorkloadError("loss: it returned no terms; at least one is needed")
        counted = self.workload.weights(batch) if hasattr(self.workload, "weights") else {}
        for name, term in terms.items():
            if name == TOTAL:
                raise WorkloadError("loss: the name `total` is taken by the engine; rename that term")
            if term.sum.dim() != 0:
                raise WorkloadError(f"loss: term {name}: `sum` must be a scalar (got shape {list(term.sum.shape)})")
            expected, got = float(counted.get(name, batch_size(batch))), float(term.weight)
            if abs(got - expected) > 1e-4 * max(1.0, abs(expected)):
                how = "weights(batch) counted" if name in counted else "the samples of the batch are"
                raise WorkloadError(
                    f"loss: term {name}: its weight is {got:g} but {how} {expected:g}; "
                    "make `weights` count what `loss` divides by"
                )
        self.trusting = True


def _add(losses: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    losses[name] = losses[name] + value if name in losses else value


def update(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], arithmetic: Arithmetic, max_grad_norm: float | None
) -> Tensor | None:
    """Clip and step; returns the gradient's norm before clipping. A loss scaler skips a non-finite one."""
    scaler = arithmetic.scaler
    norm: Tensor | None = None
    if max_grad_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return norm

"""One optimizer step: count the group's weights, run its micro-batches, clip, update unless something is not finite.

Each loss term is divided by the weight of the whole GROUP before the backward pass, so 8x2 and 16x1 give the same
gradient even where micro-batches weigh differently (ragged tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor, nn

from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Term
from tuner.engine.distributed import ParallelLoss
from tuner.engine.loader import Group, TensorBatch, batch_size, to_device
from tuner.engine.precision import Arithmetic
from tuner.engine.terms import terms_of

TOTAL = "total"
MOST_SHARES = 64
"""Divisors remembered; token counts hardly ever come again."""
Span = Callable[[str], AbstractContextManager[Any]]
"""Name of a part of the step -> a context held around it."""
_NOTHING = nullcontext()
_Made = TypeVar("_Made")
_Words = TypeVarTuple("_Words")


def no_span(name: str) -> AbstractContextManager[Any]:  # noqa: ARG001
    """The span of a run that nobody profiles: one object for all, made once."""
    return _NOTHING


def within(span: Span, name: str, call: Callable[[*_Words], _Made], *words: *_Words) -> _Made:
    """`call(*words)` with `span(name)` held around it where somebody profiles; even an empty context costs time."""
    if span is no_span:
        return call(*words)
    with span(name):
        return call(*words)


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
    elements: int = 0
    """Numbers in the step's batches, padding included."""
    ahead: bool = False
    """Fed from what the loader's workers had made during a break: its time is nobody's speed."""
    left_out: bool | Tensor = False
    """Was nothing updated, as the loss or the gradient was not finite? A 0-dimensional tensor where the device alone
    knows; False where nobody looked, and with a loss scaler, whose scale tells."""


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
        self.parallel: ParallelLoss | None = None
        """With several ranks: the loss whose gradients end as the mean over them."""
        self.ranks = 1
        self._shares: dict[tuple[float, float, torch.dtype], Tensor] = {}

    def __call__(self, group: Group, first_context: AbstractContextManager[Any] | None = None) -> dict[str, Tensor]:
        """Accumulate the group's gradient; returns the losses. `first_context` is held during the first micro-batch.

        With several ranks `group.weights` are those of all of them, and the losses are this rank's part of the sums.
        """
        samples = float(group.samples * self.ranks)
        losses: dict[str, Tensor] = {}
        if first_context is None and self.parallel is None:
            for batch in group.batches:
                self._micro_batch(batch, group.weights, samples, losses)
            return losses
        for number, batch in enumerate(group.batches):
            context = first_context if first_context is not None and number == 0 else _NOTHING
            last = number == len(group.batches) - 1
            with context, _NOTHING if self.parallel is None else self.parallel.during(last=last):
                self._micro_batch(batch, group.weights, samples, losses)
        if self.parallel is not None:
            self.parallel.finish()
        return losses

    def _micro_batch(
        self, batch: TensorBatch, weights: Mapping[str, float], samples: float, losses: dict[str, Tensor]
    ) -> None:
        if self.marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        moved = within(self.span, "transfer", self._moved, batch)
        terms = within(self.span, "forward", self._terms, moved)
        if not self.trusting:
            self._check(terms, moved)
        divisors = {name: weights.get(name, samples) for name in terms}
        _add_means(losses, terms, divisors)
        within(self.span, "backward", self._backward, terms, divisors)

    def _moved(self, batch: TensorBatch) -> TensorBatch:
        return to_device(batch, self.arithmetic.device, channels_last=self.channels_last)

    def _terms(self, batch: TensorBatch) -> Mapping[str, Term]:
        if not self.arithmetic.casts:
            return self._loss(batch)
        with self.arithmetic.autocast():
            return self._loss(batch)

    def _loss(self, batch: TensorBatch) -> Mapping[str, Term]:
        if self.parallel is not None:
            return self.parallel(batch)
        return terms_of(self.workload.loss(self.model, batch), batch)

    def _backward(self, terms: Mapping[str, Term], divisors: Mapping[str, float]) -> None:
        """Differentiate the total without forming it: each sum begins with its share of the total as its gradient."""
        roots = [(name, term) for name, term in terms.items() if term.sum.requires_grad]
        shares = [self._share(term, divisors[name]) for name, term in roots]
        if self.arithmetic.scaler is not None:
            shares = [self.arithmetic.scaler.scale(share) for share in shares]
        torch.autograd.backward([term.sum for _, term in roots], shares)

    def _share(self, term: Term, divisor: float) -> Tensor:
        """Derivative of the total by a term's sum: made once for each divisor, rounded as a division of losses is."""
        key = (term.coefficient, divisor, term.sum.dtype)
        share = self._shares.get(key)
        if share is None:
            # the exchange takes the mean over the ranks, while each loss is a part of a sum: hence `ranks`
            whole = torch.full((), float(self.ranks), device=term.sum.device) * term.coefficient
            share = (whole / divisor if divisor else whole * 0.0).to(term.sum.dtype)
            if len(self._shares) >= MOST_SHARES:
                self._shares.clear()
            self._shares[key] = share
        return share

    def _check(self, terms: Mapping[str, Term], batch: TensorBatch) -> None:
        """Once: does the loss say what the loop assumes? Raises WorkloadError."""
        if not terms:
            raise WorkloadError("loss: it returned no terms; at least one is needed")
        for name, term in terms.items():
            if not isinstance(term.sum, Tensor):
                raise WorkloadError(f"loss: term {name}: `sum` must be a tensor (got a {type(term.sum).__name__})")
        if not any(term.sum.requires_grad for term in terms.values()):
            raise WorkloadError("loss: no term depends on a parameter that is trained (requires_grad)")
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


def _add_means(losses: dict[str, Tensor], terms: Mapping[str, Term], divisors: Mapping[str, float]) -> None:
    """Add a micro-batch's part of each term and of the total to `losses`."""
    total: Tensor | None = None
    for name, term in terms.items():
        value, divisor = term.sum.detach().float(), divisors[name]
        mean = value / divisor if divisor else value * 0.0
        part = mean if term.coefficient == 1.0 else term.coefficient * mean
        total = part if total is None else total + part
        losses[name] = losses[name] + mean if name in losses else mean
    assert total is not None
    losses[TOTAL] = losses[TOTAL] + total if TOTAL in losses else total


def _plain_step(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's own `step`, without the profiler's mark and the hooks torch puts around it when one is made: they
    cost a small model a tenth of its step. Where an author has set hooks, or another `step`, those run."""
    own: Any = vars(optimizer)
    step: Any = type(optimizer).step
    if "step" in own or own.get("_optimizer_step_pre_hooks") or own.get("_optimizer_step_post_hooks"):
        optimizer.step()
    elif getattr(step, "hooked", False):
        step.__wrapped__(optimizer)
    else:
        step(optimizer)


class MovingBuffers:
    """What a forward pass changes in a model beside its gradients (running means of a normalisation): kept before each
    step, put back after one that is left out. The first step shows which of the buffers change at all."""

    def __init__(self, model: nn.Module) -> None:
        self._moving = list(model.buffers())
        self._kept: list[Tensor] = []
        self._known = False

    @torch.no_grad()
    def keep(self) -> None:
        if not self._known:
            self._kept = [buffer.clone() for buffer in self._moving]
        elif self._moving:
            torch._foreach_copy_(self._kept, self._moving)

    @torch.no_grad()
    def settle(self, *, left_out: bool) -> None:
        if not self._known:
            changed = [not torch.equal(kept, now) for kept, now in zip(self._kept, self._moving, strict=True)]
            self._kept = list(compress(self._kept, changed))
            self._moving = list(compress(self._moving, changed))
            self._known = True
        if left_out and self._moving:
            torch._foreach_copy_(self._moving, self._kept)


class Updated(NamedTuple):
    """What became of a gradient."""

    norm: Tensor | None
    """Before clipping; None when nothing is clipped."""
    left_out: bool | Tensor = False


def update(
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    arithmetic: Arithmetic,
    max_grad_norm: float | None,
    total: Tensor | None = None,
) -> Updated:
    """Clip and step. A loss scaler leaves out a gradient that is not finite; without one that is done here, where the
    `total` loss is given. No device is waited for, so on a GPU only a fused optimizer, which looks at a flag there, can
    leave a step out."""
    scaler = arithmetic.scaler
    norm: Tensor | None = None
    if max_grad_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
        return Updated(norm)
    if total is None:
        _plain_step(optimizer)
        return Updated(norm)
    if total.device.type == "cpu":
        sound = math.isfinite(total) and math.isfinite(_norm(parameters) if norm is None else norm)
        if sound:
            _plain_step(optimizer)
        return Updated(norm, not sound)
    return Updated(norm, _flagged_step(optimizer, parameters, norm, total))


def _flagged_step(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], norm: Tensor | None, total: Tensor
) -> bool | Tensor:
    """On a GPU: the fused kernels update nothing where the flag is 1, as with a loss scaler."""
    flagged: Any = optimizer
    begun = bool(optimizer.state) or not optimizer.defaults.get("momentum")  # torch's SGD would keep an empty momentum
    if not (begun and getattr(optimizer, "_step_supports_amp_scaling", False)):
        _plain_step(optimizer)
        return False
    wrong = torch.isfinite((_norm(parameters) if norm is None else norm) + total).logical_not_()
    flagged.found_inf = wrong.float()
    try:
        _plain_step(optimizer)
    finally:
        del flagged.found_inf
    return wrong


def _norm(parameters: list[Tensor]) -> Tensor:
    """Of all gradients together; not finite where one of them is not."""
    gradients = [_values(p.grad) for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros(())]
    whole: Tensor = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    return whole


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, of a sparse one too; half precision would overflow in a norm."""
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    return dense.float() if dense.dtype is torch.float16 else dense

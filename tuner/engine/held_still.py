"""What must not stir while gradients are compared: dropout turned off wherever it is found, batch statistics frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RATES: Mapping[Callable[..., Any], tuple[str, int]] = {
    F.dropout: ("p", 1),
    F.dropout1d: ("p", 1),
    F.dropout2d: ("p", 1),
    F.dropout3d: ("p", 1),
    F.alpha_dropout: ("p", 1),
    F.feature_alpha_dropout: ("p", 1),
    torch.dropout: ("p", 1),
    torch.alpha_dropout: ("p", 1),
    torch.feature_dropout: ("p", 1),
    torch.feature_alpha_dropout: ("p", 1),
    torch.native_dropout: ("p", 1),
    F.scaled_dot_product_attention: ("dropout_p", 4),
    F.multi_head_attention_forward: ("dropout_p", 10),
}
"""Function of torch -> its rate's name and place among the arguments."""


class HeldStill(TorchFunctionMode):
    """No dropout is done by torch's functions, however the model calls them; with `frozen`, batch norms use their
    running statistics (mean 0 and variance 1 where they keep none)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0
        """The largest dropout rate that was turned off."""
        self.batch_norms = 0
        """Calls that computed with the statistics of their batch."""
        self.frozen = False

    def silence(self, model: nn.Module) -> None:
        """Set to 0 the rates that modules keep themselves: attention layers, RNNs, stochastic depth, own kernels."""
        for module in model.modules():
            for name in [*_rate_names(module)]:
                self.rate = max(self.rate, getattr(module, name))
                setattr(module, name, 0.0)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _RATES and given.get("training", True):
            args = self._without_rate(*_RATES[func], list(args), given)
        elif func is F.batch_norm and given.get("training"):
            self.batch_norms += 1
            if self.frozen:
                args, given = _frozen_norm(*args, **given), given | {"training": False}
        return func(*args, **given)

    def _without_rate(self, name: str, place: int, args: list[Any], given: dict[str, Any]) -> list[Any]:
        """The positional arguments with the rate 0; `given` is changed where it stands by name."""
        if name in given:
            self.rate, given[name] = max(self.rate, given[name]), 0.0
        elif len(args) > place:
            self.rate, args[place] = max(self.rate, args[place]), 0.0
        return args


@contextmanager
def held_still() -> Iterator[HeldStill]:
    """A HeldStill at work. Compiled parts of the model run eagerly and the backward pass in this thread, as neither the
    compiler nor autograd's own threads (which recompute checkpoints) would be reached by it."""
    still = HeldStill()
    with torch.compiler.set_stance("force_eager"), torch.autograd.set_multithreading_enabled(False), still:
        yield still


@contextmanager
def frozen(still: HeldStill, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Batch norms on their running statistics, and the modules of these names in evaluation mode."""
    modules = [module for name, module in model.named_modules() if name in names and module.training]
    still.frozen = True
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        still.frozen = False
        for module in modules:
            module.training = True


def _rate_names(module: nn.Module) -> Iterator[str]:
    """Attributes that hold a dropout rate above 0, told by their name or by the module's."""
    own = type(module).__name__.lower()
    for name, value in vars(module).items():
        drops = "drop" in name.lower() or (name == "p" and ("drop" in own or "stochasticdepth" in own))
        if drops and isinstance(value, float) and 0.0 < value <= 1.0:
            yield name


def _frozen_norm(x: Tensor, mean: Tensor | None, variance: Tensor | None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_zeros(x.shape[1]) if mean is None else mean
    return x, mean, x.new_ones(x.shape[1]) if variance is None else variance

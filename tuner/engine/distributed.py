"""Data-parallel training: which rank this process is, what the ranks tell each other, and gradients averaged over them.

The ranks are processes on one machine. Who starts them and notices a dead one is their leader (`tuner.ranks`), so
nothing in here waits with a timeout of its own: a rank may evaluate for an hour while the others wait for it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tuner.contract.base import parse_json
from tuner.contract.config import RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.measurement import MemoryPeak
from tuner.contract.workload import Term
from tuner.engine.compiling import GRAPH_MODES
from tuner.engine.failure import Unsupported
from tuner.engine.global_random import seed_all
from tuner.engine.terms import terms_of
from tuner.randomness import sample_seeds
from tuner.ranks import FOLDER, INDEX

STORE = "store"
"""File in the ranks' folder through which forked ranks find each other; torchrun brings a store of its own."""
_PATIENCE = timedelta(days=7)
_DDP_WORDS = signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_WORDS else "broadcast_buffers"
"""What torch calls it; renamed in 2.13."""


@dataclass(frozen=True)
class Rank:
    """Which part of the global batch this process takes, and its word with the others. Alone, every word is its own."""

    index: int = 0
    world_size: int = 1
    control: Any = None
    """Process group of small words between the hosts; never waits for a GPU."""

    @property
    def leads(self) -> bool:
        """Rank 0 alone evaluates, samples, logs, and writes files."""
        return self.index == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        found: list[float] = tensor.tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Is it so on one rank at least?"""
        return self.total([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The plain value of every rank, in their order."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def largest(self, peak: MemoryPeak) -> MemoryPeak:
        """The peak of the rank that needs most."""
        peaks = [parse_json(MemoryPeak, text) for text in self.gather(peak.to_json())]
        return max(peaks, key=lambda one: one.gate_bytes)

    def share(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""
        if self.world_size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def add(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each rank's part of the losses -> their sums. On a GPU nothing is waited for."""
        if self.world_size == 1 or not losses:
            return losses
        stacked = torch.stack([value.float() for value in losses.values()])
        dist.all_reduce(stacked)
        return dict(zip(losses, stacked.unbind(), strict=True))

    def reseed(self, seed: int, samples: int) -> None:
        """Dropout on the ranks besides 0 follows from (seed, rank, position): a resumed run draws it again."""
        if self.index:
            seed_all(int(sample_seeds(seed, samples, torch.tensor([-2 - self.index]))))

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Rank 0 does what stands within before the others do."""
        if self.index:
            self.total([0.0])
        yield
        if not self.index:
            self.total([0.0])


_ALONE = Rank()
_joined: Rank = _ALONE


def rank_index() -> int:
    """The number of this process among its ranks; 0 when it is alone."""
    return int(os.environ.get(INDEX, "0"))


def this_rank(config: RunConfig) -> Rank:
    """Raises Unsupported where more ranks are asked for than were started."""
    if config.world_size == 1:
        return _ALONE
    if _joined.world_size != config.world_size:
        raise Unsupported(
            f"world_size: {config.world_size} ranks were asked for, but this process is one of {_joined.world_size}; "
            f"start them with --nproc {config.world_size}, or set world_size to 1"
        )
    return _joined


@contextmanager
def joined(config: RunConfig | None, device: torch.device) -> Iterator[Rank]:
    """Within: this process is one of `config.world_size` ranks, where it was started as one. Raises Unsupported."""
    global _joined
    if config is None or config.world_size == 1 or INDEX not in os.environ:
        yield _ALONE
        return
    refuse_illegal(config, device)
    _joined = _join(config.world_size, device)
    try:
        yield _joined
        dist.destroy_process_group()
    finally:
        _joined = _ALONE


def refuse_illegal(config: RunConfig, device: torch.device) -> None:
    """Raises Unsupported for what ranks cannot do here."""
    if device.type != "cuda":
        return
    count = torch.cuda.device_count()
    if config.world_size > count:
        raise Unsupported(
            f"world_size: {config.world_size} ranks need a GPU each; this machine has {count}. "
            f"Use --nproc {count} or fewer"
        )
    if config.compile in GRAPH_MODES:
        raise Unsupported(
            f"compile: {config.compile.value} replays CUDA graphs, into which the exchange of gradients does not fit; "
            "with several ranks use eager or default"
        )


def _join(world_size: int, device: torch.device) -> Rank:
    name = _loopback()
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    words: dict[str, Any] = {"timeout": _PATIENCE}
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        store = Path(os.environ[FOLDER]) / STORE
        words |= {"init_method": f"file://{store}", "rank": rank_index(), "world_size": world_size}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", **words)
        return Rank(rank_index(), world_size, dist.new_group(backend="gloo", timeout=_PATIENCE))
    dist.init_process_group("gloo", **words)
    return Rank(rank_index(), world_size, dist.group.WORLD)


def _loopback() -> str:
    """The network interface of 127.0.0.1: the ranks need no other, and a host's own name may lead nowhere."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == "127.0.0.1" for one in addresses):
            return str(name)
    return ""


class _LossOf(nn.Module):
    """Model and loss as one module: the workload sees its own model, and the exchange of gradients a forward pass."""

    def __init__(self, workload: Any, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._workload = workload
        self.terms: dict[str, Term] = {}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.terms = dict(terms_of(self._workload.loss(self.model, batch), batch))
        return {name: term.sum for name, term in self.terms.items()}


class ParallelLoss:
    """The loss of one rank's micro-batches, whose gradients end as the mean over all ranks.

    The first group of a run is exchanged by hand: it shows which parameters the loss uses at all, and so whether DDP
    must look for unused ones in every step. From the second group on DDP exchanges while the backward pass still runs.
    """

    def __init__(
        self,
        workload: Any,
        model: nn.Module,
        rank: Rank,
        device: torch.device,
        *,
        coupled: bool,
        compiled: bool = False,
    ) -> None:
        self._rank = rank
        self._device = device
        self._coupled = coupled
        self._inner = _LossOf(workload, model)
        self._shared: DistributedDataParallel | None = None
        self._names: list[str] | None = None
        if compiled:  # its graphs are not cut to exchange earlier: that forbids recomputed blocks (pytorch#119440)
            torch._dynamo.config.optimize_ddp = False

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Term]:
        sums = (self._inner if self._shared is None else self._shared)(batch)
        terms, self._inner.terms = self._inner.terms, {}
        return {name: replace(term, sum=sums[name]) for name, term in terms.items()}

    def during(self, *, last: bool) -> AbstractContextManager[Any]:
        """Held around forward and backward of a micro-batch: gradients are exchanged in the last of a group alone."""
        return nullcontext() if self._shared is None or last else self._shared.no_sync()

    def finish(self) -> None:
        """After a group's last backward pass."""
        if self._shared is None:
            self._shared = self._share(self._exchange())

    def weights(self, own: Mapping[str, float]) -> dict[str, float]:
        """The weights of the loss terms over all ranks. Raises WorkloadError for a term that came late."""
        if self._names is None:
            self._names = sorted(set().union(*self._rank.gather(sorted(own))))
        if unknown := sorted(set(own) - set(self._names)):
            raise WorkloadError(f"weights: term {unknown[0]} was not there at the first step; always name every term")
        if not self._names:
            return {}
        return dict(zip(self._names, self._rank.total([own.get(name, 0.0) for name in self._names]), strict=True))

    def _exchange(self) -> bool:
        """Average the gradients; True when a parameter has none on one rank at least."""
        trained = [parameter for parameter in self._inner.parameters() if parameter.requires_grad]
        used = self._rank.total([float(parameter.grad is not None) for parameter in trained])
        for parameter, ranks in zip(trained, used, strict=True):
            if ranks:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self._rank.world_size
        return min(used) < self._rank.world_size

    def _share(self, some_unused: bool) -> DistributedDataParallel:
        words: dict[str, Any] = {_SYNC_BUFFERS: self._coupled}
        return DistributedDataParallel(
            self._inner,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            find_unused_parameters=some_unused,
            gradient_as_bucket_view=True,
            **words,
        )

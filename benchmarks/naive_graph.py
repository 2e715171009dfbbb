"""graph: a training step with the cached, banded graph, against building it in every step and going sample by sample.

python -m benchmarks.naive_graph

All ways draw the same windows and hide the same channels, and begin with the same weights, without dropout; that their
losses are equal is checked first. A second table: what making the graph itself costs. One thread.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ratio import interleaved, print_table
from tuner.contract.workload import Batch
from tuner.randomness import sample_seeds
from workloads.graph.attention import EdgeAttention, edge_index
from workloads.graph.cache import ensure_graph
from workloads.graph.model import GatLayer
from workloads.graph.workload import Graph

BATCH = 16
SAME_LOSS = 1e-6
"""Relative."""
REBUILT, CACHED, EDGES, BANDED = "graph rebuilt, by sample", "graph cached, by sample", "all edges at once", "banded"


@dataclass(frozen=True)
class Way:
    """One way to do a step."""

    edges: Callable[[], Tensor] | None
    """Where the edges come from in each step; None = no edges, the band."""
    by_sample: bool


class Training:
    """A model of its own, and batches that depend on the step's number alone."""

    def __init__(self, job: Graph, model: nn.Module, way: Way) -> None:
        self._job, self._way, self._data = job, way, job.dataset("train")
        self._model = copy.deepcopy(model).eval()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=2e-3)
        self.steps = 0

    def step(self) -> float:
        """One update; returns the loss."""
        if self._way.edges is not None:
            use_edges(self._model, self._way.edges())
        total: Tensor = torch.zeros(())
        for batch in self._batches():
            terms = self._job.loss(self._model, batch)
            total = total + sum(term.sum for term in terms.values()) / BATCH
        self._optimizer.zero_grad()
        total.backward()
        self._optimizer.step()
        self.steps += 1
        return total.item()

    def _batches(self) -> Sequence[Batch]:
        count = len(self._data)  # type: ignore[arg-type]
        rows = torch.randint(count, (BATCH,), generator=torch.Generator().manual_seed(self.steps))
        if self._way.by_sample:
            return [self._batch(rows[at : at + 1]) for at in range(BATCH)]
        return [self._batch(rows)]

    def _batch(self, rows: Tensor) -> Batch:
        items: list[Mapping[str, Tensor]] = self._data.__getitems__(rows.tolist())  # type: ignore[attr-defined]
        return {**self._job.collate(items), "sample_seed": sample_seeds(0, self.steps, rows)}

    def steps_of_a_call(self, count: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(count):
                self.step()

        return call


def use_edges(model: nn.Module, edges: Tensor) -> None:
    """Let every graph layer of `model` go edge by edge."""
    attention = EdgeAttention(edges)
    for layer in model.modules():
        if isinstance(layer, GatLayer):
            layer.attention = attention


def edges_by_loops(window_size: int, time_k: int) -> Tensor:
    """The graph as a first attempt builds it."""
    edges = []
    for target in range(window_size):
        for source in range(window_size):
            if abs(source - target) <= time_k:
                edges.append((source, target))
    return torch.tensor(edges).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=("tiny", "full"))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3, help="training steps in each call")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tuner-naive-") as folder:
        job = Graph({"preset": words.preset})
        job.prepare(Path(folder), silent)
        ways = trainings(job, *shape_of(words.preset))
        apart = largest_difference(ways)
        seconds = interleaved({name: way.steps_of_a_call(words.steps) for name, way in ways.items()}, words.rounds)
        print_table(
            f"graph {words.preset}: a training step of {BATCH}",
            seconds,
            REBUILT,
            units_per_call=words.steps,
            unit="step",
        )
        print(f"losses of 5 steps equal within {apart:.1e} (relative)\n")
        for preset in ("tiny", "full"):
            graph_table(Path(folder), *shape_of(preset), words.rounds)


def shape_of(preset: str) -> tuple[int, int]:
    """(window_size, time_k)"""
    from workloads.graph.presets import PRESETS

    return PRESETS[preset].window_size, PRESETS[preset].time_k


def trainings(job: Graph, window_size: int, time_k: int) -> dict[str, Training]:
    """From the slowest way to the fastest, all with the same weights."""
    torch.manual_seed(0)
    model, cached = job.model(), edge_index(window_size, time_k)
    ways = {
        REBUILT: Way(lambda: edges_by_loops(window_size, time_k), by_sample=True),
        CACHED: Way(lambda: cached, by_sample=True),
        EDGES: Way(lambda: cached, by_sample=False),
        BANDED: Way(None, by_sample=False),
    }
    return {name: Training(job, model, way) for name, way in ways.items()}


def largest_difference(ways: Mapping[str, Training]) -> float:
    """Of the losses of the first five steps. Ends the program when the ways are not the same training."""
    losses = torch.tensor([[way.step() for _ in range(5)] for way in ways.values()], dtype=torch.float64)
    apart = float((losses / losses[0] - 1).abs().max())
    if apart > SAME_LOSS:
        raise SystemExit(f"the ways give different losses: {apart:.1e} apart (relative)")
    return apart


def graph_table(folder: Path, window_size: int, time_k: int, rounds: int) -> None:
    """Making the graph of one window, by loops, by arithmetic, and from the cache."""
    ensure_graph(folder, window_size, time_k)
    ways = {
        "python loops": lambda: none(edges_by_loops(window_size, time_k)),
        "arithmetic on tensors": lambda: none(edge_index(window_size, time_k)),
        "from the cache": lambda: none(ensure_graph(folder, window_size, time_k)),
    }
    seconds = interleaved(ways, rounds)
    title = f"the graph of {window_size} steps, {time_k} neighbours each side"
    print_table(title, seconds, "python loops", unit="graph", machine=False)


def none(made: object) -> None:
    """Nothing."""


def silent(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""


if __name__ == "__main__":
    main()

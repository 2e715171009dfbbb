"""The equivalence probe: does the gradient depend on how an effective batch is cut, and if it does, why.

It holds still what may differ between two runs for no fault of the cut (dropout, the data set's own draws), compares,
and where the gradients differ changes one thing at a time: random states, statistics, the samples of a micro-batch.
What the figures mean is told by `contract.equivalence`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tuner.contract.config import CompileMode, LoaderConfig, Precision, RunConfig
from tuner.contract.equivalence import EQUIVALENT, Figure
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply
from tuner.engine.bench import Bench, failed
from tuner.engine.compiling import checkpoint_blocks
from tuner.engine.coupling import Pieces, term_figures
from tuner.engine.failure import Diverged, details, release
from tuner.engine.fixed_samples import Cut, FixedSamples
from tuner.engine.global_random import seed_all
from tuner.engine.held_still import HeldStill, frozen, held_still
from tuner.engine.limits import memory_cap
from tuner.engine.loader import Group, ResidentSource, count_weights
from tuner.engine.precision import Arithmetic
from tuner.engine.trainer import Trainer, set_threads

WARM_STEPS = 3
"""Updates before gradients are compared: at the start zero-initialised outputs hide most of a gradient."""
Gradients = dict[str, Tensor]


def equivalence(bench: Bench) -> None:
    """Gradient of the same samples cut as in the first and as in the second point. Both get the same answer."""
    first, second = bench.request.points[:2] if len(bench.request.points) == 2 else (None, None)
    bench.phases.enter("build")
    try:
        if first is None or second is None or first.effective_batch_size != second.effective_batch_size:
            raise ConfigError("equivalence: two points of the same effective batch size are needed")
        set_threads(first.threads)
        with memory_cap(bench.request.limits.memory_bytes, bench.device), held_still() as still:
            case = _Comparison(bench, _plain(first), _plain(second), still)
            reply = PointReply(outcome=Outcome.OK, values=case.figures(), detail=case.trouble)
    except Exception as error:
        reply = failed(0, error, bench.device)
    for index in range(len(bench.request.points)):
        bench.emit(reply.model_copy(update={"index": index}))
    bench.phases.enter("teardown")


def _plain(config: RunConfig) -> RunConfig:
    """fp32, eager, no averaging, batches fetched in this process."""
    changes = {"precision": Precision.FP32, "compile": CompileMode.EAGER, "ema": None}
    return config.model_copy(update={**changes, "loader": LoaderConfig(num_workers=0)})


class _Comparison:
    """Two cuts of the same samples, from the same weights: those after a few updates."""

    def __init__(self, bench: Bench, first: RunConfig, second: RunConfig, still: HeldStill) -> None:
        self._bench = bench
        self._first = first
        self._second = second
        self._still = still
        self.trouble = ""
        """Why the loss terms could not be looked at."""
        self._start = WARM_STEPS * first.effective_batch_size

    def figures(self) -> dict[str, float]:
        samples, state = self._samples(), self._warm()
        self._bench.phases.enter("measure")
        cut, other = (samples.cut(config, self._start) for config in (self._first, self._second))
        values = samples.look_twice(cut)
        one, two = _Side(self, self._first, cut, samples, state), _Side(self, self._second, other, samples, state)
        gradient = one.gradient(0)
        apart = values[Figure.RELATIVE_L2] = distance(gradient, two.gradient(1))
        values |= {Figure.DROPOUT: self._still.rate, Figure.UNHELD: float(samples.unheld)}
        if apart >= EQUIVALENT:
            values[Figure.RERUN] = distance(gradient, one.gradient(1))
            values |= self._with_statistics_frozen(one, two)
        one.close()
        two.close()
        if apart >= EQUIVALENT:
            try:
                values |= self._of_terms(samples, state, one, two)
            except Exception as error:  # that the cuts differ is known, whether or not it can be told why
                self.trouble = details(error)
                release(error)
        return {str(name): value for name, value in values.items()}

    def _samples(self) -> FixedSamples:
        return FixedSamples(self._bench.workload(self._first), self._first, self._bench.dataset(self._first))

    def _warm(self) -> dict[str, Tensor]:
        """The weights after a few updates in the first cut."""
        samples, size = self._samples(), self._first.effective_batch_size
        cuts = [samples.cut(self._first, number * size) for number in range(WARM_STEPS)]
        trainer = self.trainer(self._first, [samples.batches(cut) for cut in cuts])
        self._bench.phases.enter("warmup")
        for _ in range(WARM_STEPS):
            trainer.step()
        trainer.close()
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def trainer(self, config: RunConfig, groups: Sequence[Sequence[dict[str, Tensor]]]) -> Trainer:
        workload = self._bench.workload(config)
        source = ResidentSource([Group([*batches], count_weights(workload, batches)) for batches in groups])
        trainer = Trainer(workload, config, device=self._bench.device, source=source)
        self._still.silence(trainer.model)
        return trainer

    def _with_statistics_frozen(self, one: _Side, two: _Side) -> dict[str, float]:
        """Empty where the model keeps none."""
        if not one.moved and not self._still.batch_norms:
            return {}
        counts = Counter(one.moved.values())
        found = {Figure.STATISTICS.of(name): float(count) for name, count in counts.items()}
        try:
            apart = distance(*(self._frozen(side, one.moved) for side in (one, two)))
        except Diverged:  # running statistics of a few steps may not fit what the model has become
            return found
        return {**found, Figure.FROZEN: apart}

    def _frozen(self, side: _Side, moved: Mapping[str, str]) -> Gradients:
        with frozen(self._still, side.model, [*moved]):
            return side.gradient(0)

    def _of_terms(self, samples: FixedSamples, state: Mapping[str, Tensor], one: _Side, two: _Side) -> dict[str, float]:
        """Figures of the loss terms, on the largest micro-batch; on each rank its own, without a word to the others."""
        keys, config = max(one.cut[0], two.cut[0], key=len), self._first
        workload = self._bench.workload(config)
        model = workload.model().to(self._bench.device).train()
        if config.gradient_checkpointing:
            checkpoint_blocks(workload, model)
        self._still.silence(model)
        pieces = Pieces(workload, model, state, samples, Arithmetic(Precision.FP32, self._bench.device))
        with frozen(self._still, model, [*one.moved]):
            values = term_figures(pieces, keys)
        if one.moved or self._still.batch_norms:
            live = Figure.SPAN.named(term_figures(pieces, keys))
            values |= {Figure.LIVE_SPAN: max(live.values())} if live else {}
        if config.world_size == 1:
            values |= _counted_apart(one.weights, two.weights)
        return values


class _Side:
    """One of the two cuts, ready to give its gradient as often as it is asked."""

    def __init__(
        self, case: _Comparison, config: RunConfig, cut: Cut, samples: FixedSamples, state: Mapping[str, Tensor]
    ) -> None:
        batches = samples.batches(cut)
        self.cut = cut
        self.moved: dict[str, str] = {}
        """Name of a module whose buffers a forward pass changed -> its class."""
        self.weights = count_weights(case._bench.workload(config), batches)
        self._trainer = case.trainer(config, [batches])
        self._state = state
        self._seed = config.seed

    @property
    def model(self) -> nn.Module:
        return self._trainer.model

    def gradient(self, number: int) -> Gradients:
        """From the same weights; the process's random states follow from `number`."""
        self.model.load_state_dict(self._state)
        before = {name: value.clone() for name, value in self.model.named_buffers()}
        seed_all(self._seed + number)
        found = self._trainer.gradients()
        self.moved |= {
            name.rpartition(".")[0]: type(self.model.get_submodule(name.rpartition(".")[0])).__name__
            for name, value in self.model.named_buffers()
            if name not in before or not torch.equal(value, before[name])
        }
        return found

    def close(self) -> None:
        """It gives no more gradients, and its model's memory is free."""
        self._trainer.close()
        del self._trainer


def distance(first: Gradients, second: Gradients) -> float:
    """|g1 - g2| / |g1| over all parameters. Raises Diverged where they are not finite."""
    names = first.keys() | second.keys()
    zero = torch.zeros(())
    apart = sum(float((first.get(n, zero) - second.get(n, zero)).double().square().sum()) for n in names)
    size = sum(float(g.double().square().sum()) for g in first.values())
    if not math.isfinite(apart) or not math.isfinite(size):
        raise Diverged("the gradients are not finite")
    return math.sqrt(apart / size) if size else 0.0


def _counted_apart(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {
        Figure.COUNTED.of(name): abs(count - second.get(name, 0.0)) / max(abs(count), 1e-12)
        for name, count in first.items()
    }

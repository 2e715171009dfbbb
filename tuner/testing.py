"""The suite a plug-in author inherits to see that a workload keeps its side of the bargain.

    class TestMyJob(WorkloadContract):
        workload = "mypackage.jobs:MyJob"
        options = {"preset": "tiny"}

Run it with pytest. Every test runs the author's real code; two of them in real worker processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tuner import registry
from tuner.contract.base import Scalar, parse_json
from tuner.contract.config import RunConfig
from tuner.contract.equivalence import Cause, Figure, causes, equivalent
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.statistics import throughput
from tuner.contract.trust import Trust
from tuner.contract.workload import Term, Trivial, WorkloadInfo
from tuner.engine.loader import Collate, tensors_of, valid_batches
from tuner.engine.terms import terms_of
from tuner.probe.runner import SubprocessRunner

SAME_SUM = 1e-4
"""Relative difference of a loss term's sum over a batch from that over its halves."""
VALID_ITEMS, TRAIN_ITEMS = 300, 3000
"""So many items of each split, evenly spread, are looked at for leakage."""
VALID_BATCHES = 64
"""The figures of an untrained model are taken on so many batches at most."""
_AUGMENTED = f"{Cause.RANDOM_DATA.cure} (`augments = True` in this suite)"


class WorkloadContract:
    """Inherit, name the workload, give the options of a small preset. Fixtures may be overridden."""

    workload: ClassVar[str]
    """A registered name or `module:Class`."""
    options: ClassVar[Mapping[str, Scalar]] = {}
    augments: ClassVar[bool] = False
    """True accepts that a training item changes from one read to the next; validation items must not."""

    @pytest.fixture(scope="class")
    @classmethod
    def cache_dir(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where `prepare` may leave what it made; override it to keep that between test runs."""
        return tmp_path_factory.mktemp("workload-cache")

    @pytest.fixture(scope="class")
    @classmethod
    def runner(cls, cache_dir: Path) -> Iterator[SubprocessRunner]:
        with SubprocessRunner(cache_dir, log_dir=cache_dir / "logs", trust=Trust.of(cls.workload)) as runner:
            reply = runner.run(cls._request(ProbeKind.PREPARE, cache_dir))
            failed = [f"{point.message}\n{point.detail}" for point in reply.points if point.outcome is not Outcome.OK]
            assert not failed, "\n".join(failed)
            yield runner

    @pytest.fixture
    def prepared(self, runner: SubprocessRunner, cache_dir: Path) -> Any:  # noqa: ARG002 - it has prepared the data
        """The workload in this process, its data ready."""
        made = self._make()
        if hasattr(made, "prepare"):
            made.prepare(cache_dir, _silent)
        return made

    def test_its_description_is_complete_and_stable(self) -> None:
        info = self._make().info()
        assert parse_json(WorkloadInfo, info.to_json()) == info
        assert self._make().info() == info, "two instances of the same options must describe themselves equally"
        named = registry.load(info.baseline.workload)
        assert named is registry.load(self.workload), "the baseline must name this workload"
        again = named(info.baseline.options).info()
        assert again.baseline == info.baseline, "the baseline's own options must lead to the same baseline"

    def test_an_unknown_option_is_refused(self) -> None:
        with pytest.raises(Exception, match="no_such_option"):
            registry.load(self.workload)({**self.options, "no_such_option": 1})

    @pytest.mark.parametrize("split", ["train", "valid"])
    def test_the_same_index_gives_the_same_item(self, prepared: Any, split: str) -> None:
        dataset = prepared.dataset(split)
        assert len(dataset) > 0
        still = split == "valid" or not self.augments
        for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
            first, second = _item(dataset, index), _item(prepared.dataset(split), index)
            again = _item(dataset, index)
            assert first, "an item has at least one tensor"
            assert first.keys() == second.keys()
            for name in first:
                same = not still or torch.equal(first[name], again[name])
                assert same, f"item {index}: {name!r} changes between reads; {_AUGMENTED}"
                same = not still or torch.equal(first[name], second[name])
                assert same, f"item {index}: {name!r} differs between data sets; {_AUGMENTED}"

    def test_preparing_again_makes_nothing_anew(self, prepared: Any, cache_dir: Path) -> None:
        """Every process prepares; all but the first must find the data there."""
        before, again = _files(cache_dir), self._make()
        if hasattr(again, "prepare"):
            again.prepare(cache_dir, _silent)
        changed = sorted(str(path.relative_to(cache_dir)) for path, _ in before ^ _files(cache_dir))
        assert not changed, f"prepare, called a second time, wrote {', '.join(dict.fromkeys(changed[:3]))} again"
        for split in ("train", "valid"):
            first, second = prepared.dataset(split), again.dataset(split)
            assert len(first) == len(second)
            for index in _spread(len(first), 0 if self.augments and split == "train" else 5):
                assert _bytes_of(first, index) == _bytes_of(second, index), f"{split} item {index} is another one"

    def test_no_item_is_in_both_splits(self, prepared: Any) -> None:
        """What is validated on must not have been trained on: no two items agree in the bytes of all their tensors."""
        train, valid = prepared.dataset("train"), prepared.dataset("valid")
        known = {_bytes_of(train, index): index for index in _spread(len(train), TRAIN_ITEMS)}
        for index in _spread(len(valid), VALID_ITEMS):
            twin = known.get(_bytes_of(valid, index))
            assert twin is None, f"leakage: item {index} of the validation split is item {twin} of the training split"

    def test_evaluation_gives_finite_figures(self, prepared: Any) -> None:
        figures = self._evaluated(prepared)
        assert figures, "evaluate gave no figures"
        for name, value in figures.items():
            assert isinstance(name, str)
            assert isinstance(value, int | float), f"evaluate: {name} is {type(value).__name__}, not a number"
            assert math.isfinite(value), f"evaluate: {name} is {value} for a model that has learned nothing"

    def test_trivial_values_belong_to_figures_that_are_given(self, prepared: Any, tmp_path: Path) -> None:
        trivial: Mapping[str, Trivial] = prepared.trivial() if hasattr(prepared, "trivial") else {}
        given = set(self._evaluated(prepared)) | set(self._assessed(prepared, tmp_path))
        unknown = sorted(trivial.keys() - given)
        assert not unknown, (
            f"trivial: {unknown[0]!r} is given by neither evaluate nor assess: {', '.join(sorted(given))}"
        )
        for name, value in trivial.items():
            assert math.isfinite(value.value), f"trivial: {name} is {value.value}"
            assert value.text, f"trivial: {name} does not say how it comes about"

    def test_a_batchs_loss_is_the_sum_of_its_halves(self, prepared: Any) -> None:
        """Terms are sums with weights, and every sample draws its own noise."""
        if prepared.info().batch_coupled:
            pytest.skip("not run: the workload says that its samples influence each other")
        torch.manual_seed(0)
        model: nn.Module = prepared.model().eval()
        whole, left, right = (self._terms(prepared, model, r) for r in (range(8), range(4), range(4, 8)))
        assert whole.keys() == left.keys() == right.keys()
        for name, term in whole.items():
            halves = left[name], right[name]
            assert term.sum.ndim == 0, f"term {name!r}: the sum must be a scalar"
            assert sum(float(half.weight) for half in halves) == pytest.approx(float(term.weight))
            assert sum(float(half.sum) for half in halves) == pytest.approx(float(term.sum), rel=SAME_SUM, abs=1e-6), (
                f"term {name!r} of 8 samples differs from its two halves: it is a mean, or its randomness is not drawn "
                "from the sample_seed of each sample"
            )

    def test_weights_counted_beforehand_are_those_of_the_loss(self, prepared: Any) -> None:
        torch.manual_seed(0)
        batch = self._batch(prepared, range(8))
        terms = terms_of(prepared.loss(prepared.model(), batch), batch)
        counted = prepared.weights(batch) if hasattr(prepared, "weights") else dict.fromkeys(terms, 8.0)
        assert {name: float(term.weight) for name, term in terms.items()} == pytest.approx(dict(counted))

    def test_accumulation_changes_no_gradient(self, runner: SubprocessRunner, cache_dir: Path) -> None:
        """8 x 2 against 16 x 1, in a worker process."""
        info = self._make().info()
        halves = info.baseline.model_copy(update={"micro_batch_size": 8, "accumulation_steps": 2})
        whole = info.baseline.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1})
        reply = self._run(runner, cache_dir, ProbeKind.EQUIVALENCE, halves, whole)
        assert reply.outcome is Outcome.OK, reply.message
        if not info.batch_coupled:
            apart = reply.values[Figure.RELATIVE_L2]
            why = "\n".join(found.line for found in causes(reply.values))
            assert equivalent(reply.values), f"the gradient of 16x1 differs from 8x2 by {apart:.2g}:\n{why}"

    def test_it_survives_a_probe(self, runner: SubprocessRunner, cache_dir: Path) -> None:
        """The baseline in a worker process: trained, evaluated, sampled and saved as in production."""
        reply = self._run(runner, cache_dir, ProbeKind.END_TO_END, self._make().info().baseline, soak=True)
        assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"
        assert reply.measurement is not None
        assert throughput(reply.measurement).value > 0
        for name, values in reply.measurement.losses.items():
            assert values, f"loss term {name!r} was not recorded"
            assert all(math.isfinite(value) for value in values), f"loss term {name!r} is not finite"

    def _make(self) -> Any:
        return registry.load(self.workload)(dict(self.options))

    def _batch(self, workload: Any, indices: range) -> dict[str, Tensor]:
        dataset = workload.dataset("train")
        return Collate(workload, 0)([((0, index), dataset[index]) for index in indices])

    def _evaluated(self, workload: Any, limit: int = VALID_BATCHES) -> Mapping[str, float]:
        """The figures of an untrained model on the first batches of the validation split."""
        model, batches = self._untrained(workload), valid_batches(workload, workload.info().baseline, limit)
        with torch.no_grad():
            figures: Mapping[str, float] = workload.evaluate(model, batches)
        return figures

    def _assessed(self, workload: Any, folder: Path) -> Mapping[str, float]:
        if not hasattr(workload, "assess"):
            return {}
        model = self._untrained(workload)
        with torch.no_grad():
            figures: Mapping[str, float] = workload.assess(model, folder, 0)
        return figures

    def _untrained(self, workload: Any) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = workload.model()
        return model.eval()

    def _terms(self, workload: Any, model: nn.Module, indices: range) -> Mapping[str, Term]:
        batch = self._batch(workload, indices)
        with torch.no_grad():
            return terms_of(workload.loss(model, batch), batch)

    @classmethod
    def _request(cls, kind: ProbeKind, cache_dir: Path, *points: RunConfig, soak: bool = False) -> ProbeRequest:
        return ProbeRequest(
            id=f"contract-{kind.value}",
            kind=kind,
            workload=cls.workload,
            options=dict(cls.options),
            points=points,
            limits=ProbeLimits(measure_s=0.5, min_steps=4, deadline_s=600.0),
            cache_dir=str(cache_dir),
            soak=soak,
        )

    def _run(
        self, runner: SubprocessRunner, cache_dir: Path, kind: ProbeKind, *points: RunConfig, soak: bool = False
    ) -> PointReply:
        return runner.run(self._request(kind, cache_dir, *points, soak=soak)).points[0]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread over `count`."""
    return [index * count // min(count, most) for index in range(min(count, most))]


def _item(dataset: Any, index: int) -> dict[str, Tensor]:
    return tensors_of(dataset[index], "dataset", "item")


def _bytes_of(dataset: Any, index: int) -> bytes:
    """A digest of all tensors of an item: names, types, shapes and content."""
    item, state = _item(dataset, index), hashlib.sha256()
    for name in sorted(item):
        value = item[name].detach().cpu().contiguous()
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return state.digest()


def _files(folder: Path) -> set[tuple[Path, int]]:
    """Every file below `folder` with the time it was written; locks are no data."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {(path, path.stat().st_mtime_ns) for path in files if "logs" not in path.relative_to(folder).parts}


def _silent(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""

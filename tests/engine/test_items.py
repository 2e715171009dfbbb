"""What a dataset or a `collate` may give: dicts and tuples of what can be a tensor. All else is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.engine_toys import answer, replies
from tests.plain_toys import Plain
from tuner.contract.config import LoaderConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind
from tuner.engine.loader import TensorBatch, first_batches

ROW = torch.arange(3.0)
Make = Callable[[int], Any]


class Rows(list[Any]):
    """As many items as the toy's training split has, made by index."""

    def __init__(self, make: Make) -> None:
        super().__init__(make(index) for index in range(64))


def batch(make: Make, collate: Callable[[Sequence[Any]], Any] | None = None) -> TensorBatch:
    job = Plain({})
    if collate is not None:
        job.collate = collate  # type: ignore[attr-defined]
    (found,) = first_batches(job, job.info().baseline, 1, dataset=Rows(make))
    return found


def test_parts_of_a_tuple_are_named_by_their_place() -> None:
    found = batch(lambda index: (ROW * index, index, 0.5 * index, np.full(2, index)))
    index = found["1"]
    assert found.keys() == {"0", "1", "2", "3", "sample_seed"}
    assert index.dtype == torch.int64
    assert torch.equal(found["0"], ROW[None] * index[:, None])
    torch.testing.assert_close(found["2"], 0.5 * index)
    assert torch.equal(found["3"], index[:, None].expand(4, 2))


def test_a_list_is_as_good_as_a_tuple_and_numbers_in_a_dict_are_tensors_too() -> None:
    assert batch(lambda index: [ROW, index])["1"].shape == (4,)
    assert batch(lambda index: {"image": ROW.numpy(), "label": index})["label"].dtype == torch.int64


def test_a_collate_gets_the_items_as_they_are_and_may_return_a_tuple() -> None:
    def collate(items: Sequence[tuple[str, int]]) -> tuple[torch.Tensor, list[int]]:
        return torch.tensor([[float(len(text))] for text, _ in items]), [label for _, label in items]

    found = batch(lambda index: ("a" * index, index), collate)
    assert torch.equal(found["0"].flatten().long(), found["1"])


REFUSED: dict[str, tuple[Make, str]] = {
    "bare": (lambda index: ROW, "dataset: the item is a Tensor; return a dict of tensors, or a tuple, whose parts"),
    "text": (lambda index: (ROW, "cat"), "dataset: part '1' of the item is a str; a tensor, a number"),
    "nested": (lambda index: (ROW, {"box": ROW}), "dataset: part '1' of the item is a dict; a tensor, a number"),
    "pair in a pair": (lambda index: (ROW, (ROW, ROW)), "dataset: part '1' of the item is a tuple; a tensor"),
    "none": (lambda index: {"x": ROW, "y": None}, "dataset: part 'y' of the item is a NoneType; a tensor"),
    "ragged": (lambda index: (torch.ones(1 + index),), "dataset: items cannot be stacked into a batch (stack expects"),
    "missing": (lambda index: (ROW,) * (1 + index % 2), "dataset: items cannot be stacked into a batch (one has no "),
}


@pytest.mark.parametrize("kind", [ProbeKind.END_TO_END, ProbeKind.COMPUTE])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_batch_is_refused_in_one_line(name: str, kind: ProbeKind) -> None:
    _refused(*REFUSED[name], kind, workers=0)


def test_a_worker_process_says_it_in_one_line_too() -> None:
    _refused(*REFUSED["text"], ProbeKind.END_TO_END, workers=1)


def _refused(make: Make, words: str, kind: ProbeKind, workers: int) -> None:
    class Job(Plain):
        def dataset(self, split: str) -> Any:
            return Rows(make)

    config = Job({}).info().baseline.model_copy(update={"loader": LoaderConfig(num_workers=workers)})
    (reply,) = replies(answer(kind, config, workload=Job))
    assert reply.outcome is Outcome.BAD_INPUT
    assert reply.message.startswith(words)
    assert "collate" in reply.message or "dict of tensors" in reply.message
    assert not reply.detail


@pytest.mark.parametrize(("returned", "got"), [(ROW, "Tensor"), (None, "NoneType"), ("x", "str")])
def test_a_collate_that_returns_no_batch_is_refused_in_one_line(returned: Any, got: str) -> None:
    class Job(Plain):
        def collate(self, items: Sequence[Any]) -> Any:
            return returned

    (reply,) = replies(answer(ProbeKind.END_TO_END, Job({}).info().baseline, workload=Job))
    assert reply.message.startswith(f"collate: the batch is a {got}; return a dict of tensors, or a tuple")
    assert not reply.detail

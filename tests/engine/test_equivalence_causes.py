"""Why the gradient depends on the cut is measured and named, each reason by its own name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.engine import coupled_toys as toys
from tests.engine.engine_toys import answer, replies, toy_config
from tests.toys import BatchNormToy, Toy
from tuner.contract.equivalence import Cause, Figure, causes, equivalent, remarks
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind


def measured(workload: type[Toy], **options: Any) -> Mapping[str, float]:
    """8x2 against 16x1."""
    base = toy_config(options)
    whole = base.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1})
    reply = replies(answer(ProbeKind.EQUIVALENCE, base, whole, workload=workload))[0]
    assert reply.outcome is Outcome.OK, reply.message + reply.detail
    return reply.values


@pytest.mark.parametrize(
    ("workload", "cause", "words"),
    [
        (BatchNormToy, Cause.BATCH_STATISTICS, "2 x BatchNorm1d"),
        (toys.OwnStatistics, Cause.BATCH_STATISTICS, "batch_norm without running statistics"),
        (toys.Mean, Cause.MEAN_FOR_SUM, "term fit is a mean"),
        (toys.EvenMean, Cause.MEAN_FOR_SUM, "term fit is a mean"),
        (toys.FreeNoise, Cause.FREE_DRAWS, "do not follow `sample_seed`"),
        (toys.Contrastive, Cause.COUPLED_SAMPLES, "term rank: a sample's gradient depends on the other samples"),
        (toys.TokenMean, Cause.UNEVEN_WEIGHTS, "term fit weighs a sample by what else"),
        (toys.Miscounted, Cause.UNEVEN_WEIGHTS, "term fit does not add up over micro-batches"),
    ],
)
def test_each_reason_is_told_by_its_own_name_and_cure(workload: type[Toy], cause: Cause, words: str) -> None:
    (found,) = causes(measured(workload))
    assert found.cause is cause
    assert words in found.text
    assert found.line == f"{found.text}; {cause.cure}"


def test_both_points_of_the_probe_get_the_answer() -> None:
    base = toy_config()
    whole = base.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1})
    found = replies(answer(ProbeKind.EQUIVALENCE, base, whole, workload=BatchNormToy))
    assert [reply.index for reply in found] == [0, 1]
    assert found[0].values == found[1].values
    assert found[0].values["relative_l2"] > 1e-2


def test_equivalence_needs_equal_batches() -> None:
    found = replies(answer(ProbeKind.EQUIVALENCE, toy_config(), toy_config(accumulation_steps=4)))
    assert all(reply.outcome is Outcome.BAD_INPUT for reply in found)
    assert "same effective batch size" in found[0].message


def test_larger_parts_are_looked_at_where_small_ones_do_not_run() -> None:
    values = measured(toys.WholeOnly)
    assert [found.cause for found in causes(values)] == [Cause.COUPLED_SAMPLES]
    assert values[Figure.PARTS] == 2


def test_two_faults_are_told_as_two() -> None:
    assert [found.cause for found in causes(measured(toys.NormedMean))] == [
        Cause.BATCH_STATISTICS,
        Cause.MEAN_FOR_SUM,
    ]


def test_a_healthy_workload_is_told_nothing() -> None:
    values = measured(Toy)
    assert equivalent(values)
    assert (causes(values), remarks(values)) == ((), ())


@pytest.mark.parametrize(
    ("workload", "options"),
    [(toys.FunctionalDropout, {}), (toys.FunctionalDropout, {"dropout": 0.2}), (Toy, {"dropout": 0.2})],
)
def test_dropout_leaves_the_cut_free(workload: type[Toy], options: Mapping[str, float]) -> None:
    values = measured(workload, **options)
    assert equivalent(values)
    (note,) = remarks(values)
    assert note.cause is Cause.DROPOUT
    assert "rate 0.2" in note.text


@pytest.mark.parametrize(
    ("workload", "words"),
    [(toys.Augmented, "fetched twice differs"), (toys.MaskingCollate, "collate, called twice, differs")],
)
def test_random_data_leaves_the_cut_free_and_is_told(workload: type[Toy], words: str) -> None:
    values = measured(workload)
    assert equivalent(values)
    (note,) = remarks(values)
    assert note.cause is Cause.RANDOM_DATA
    assert words in note.text


def test_a_row_of_an_older_tuner_names_no_cause_but_its_age() -> None:
    (found,) = causes({"relative_l2": 3e-3})
    assert found.cause is Cause.UNKNOWN
    assert "a tuner before this one" in found.text


def test_the_mode_is_gone_after_the_probe() -> None:
    measured(toys.FunctionalDropout)
    dropped = torch.nn.functional.dropout(torch.ones(1000), 0.5)
    assert float((dropped == 0).float().mean()) > 0.2


@pytest.mark.parametrize("name", ["Gpt2", "EagerGpt2", "Llama", "EagerLlama"])
def test_attention_dropout_of_transformers_leaves_the_cut_free(name: str) -> None:
    from tests.engine import coupled_texts

    values = measured(getattr(coupled_texts, name))
    assert equivalent(values), causes(values)
    assert values[Figure.DROPOUT] == coupled_texts.RATE

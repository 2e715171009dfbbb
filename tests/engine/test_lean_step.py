"""Shortcuts of the loop change nothing: gradients, losses and seeds are those of the plain way, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from tests.engine.engine_toys import toy_config, toy_trainer
from tests.toys import Toy
from tuner.contract.config import LoaderConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import SAMPLE_SEED, Batch, Term
from tuner.engine.loader import SampleOrder, StreamSource, count_weights, first_batches
from tuner.engine.step import TOTAL
from tuner.randomness import sample_seeds

CPU = torch.device("cpu")


def differentiated(workload: Toy, model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """The total of a group, written down as a formula and differentiated as one, and the gradients."""
    weights = count_weights(workload, batches)
    parts = [workload.loss(model, batch) for batch in batches]
    totals: list[Tensor] = []
    for terms in parts:
        shares = [term.coefficient * (term.sum / weights[name]) for name, term in terms.items()]
        total = shares[0] + shares[1]
        total.backward()
        totals.append(total.detach())
    return totals[0] + totals[1], [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradients_of_a_group_are_those_of_the_formula() -> None:
    """Two terms, one with a coefficient, ragged weights, two micro-batches."""
    trainer = toy_trainer(toy_config())
    batches = first_batches(trainer.workload, trainer.config, 2)
    _, wanted = differentiated(trainer.workload, trainer.model, batches)
    found = trainer.gradients()
    assert all(torch.equal(a, b) for a, b in zip(found.values(), wanted, strict=True))


def test_the_losses_are_those_of_the_formula() -> None:
    trainer = toy_trainer(toy_config())
    total, _ = differentiated(trainer.workload, trainer.model, first_batches(trainer.workload, trainer.config, 2))
    trainer.optimizer.zero_grad()
    assert torch.equal(trainer.step().losses[TOTAL], total)


class WithPenalty(Toy):
    """A third term that is a plain number, and one nobody weighs in this group."""

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {**super().weights(batch), "none": 0.0}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = dict(super().loss(model, batch))
        nothing = terms["fit"].sum * 0.0
        return {**terms, "none": Term(nothing, 0.0), "fixed": Term(torch.tensor(3.0), float(len(batch["x"])))}


def test_a_term_without_gradient_counts_in_the_loss_alone() -> None:
    plain, more = (toy_trainer(toy_config(), job({})) for job in (Toy, WithPenalty))
    wanted, found = plain.gradients(), more.gradients()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    plain, more = (toy_trainer(toy_config(), job({})) for job in (Toy, WithPenalty))
    before, after = plain.step().losses[TOTAL], more.step().losses
    assert float(after["fixed"]) == pytest.approx(2 * 3.0 / 16)
    assert float(after[TOTAL]) == pytest.approx(float(before) + 2 * 3.0 / 16)


class Untrained(Toy):
    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        return {name: Term(term.sum.detach(), term.weight) for name, term in terms.items()}


def test_a_loss_that_no_parameter_moves_is_refused_in_words() -> None:
    with pytest.raises(WorkloadError, match="no term depends on a parameter"):
        toy_trainer(toy_config(), Untrained({})).step()


def test_the_gradients_are_gone_after_a_step() -> None:
    trainer = toy_trainer(toy_config())
    trainer.step()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_keys_are_the_same_one_by_one_and_all_at_once() -> None:
    order = SampleOrder(7, seed=3)
    assert order.keys(5, 20) == [order.key(position) for position in range(5, 25)]


@pytest.mark.parametrize("workers", [0, 1])
def test_seeds_from_the_loader_are_those_of_their_samples_across_epochs(workers: int) -> None:
    """Ten samples, batches of four: every other batch lies in two epochs."""
    config = toy_config(
        {"samples": 10}, micro_batch_size=4, accumulation_steps=1, loader=LoaderConfig(num_workers=workers)
    )
    workload = Toy(config.options)
    order, source = SampleOrder(10, config.seed), StreamSource(workload, config, CPU)
    try:
        for number in range(6):
            epochs, indices = torch.tensor(order.keys(4 * number, 4)).unbind(1)
            found = source.next_group().batches[0][SAMPLE_SEED]
            assert torch.equal(found, sample_seeds(config.seed, epochs, indices))
    finally:
        source.close()

"""A loss may be a plain tensor, taken as the mean over the samples; what is no loss is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.engine_toys import answer, replies
from tests.plain_toys import MeanOverTokens, Plain
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Event, NoticeEvent, PointReply, ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.engine.step import TOTAL
from tuner.engine.trainer import Trainer
from tuner.probe.runner import SubprocessRunner
from tuner.testing import WorkloadContract

CPU = torch.device("cpu")


def trainer(loss: str) -> Trainer:
    job = Plain({"loss": loss})
    return Trainer(job, job.info().baseline, device=CPU)


@pytest.mark.parametrize(("loss", "name"), [("mean", "loss"), ("named", "nll")])
def test_a_plain_mean_trains_as_its_term_does(loss: str, name: str) -> None:
    plain, wanted = trainer(loss), trainer("term")
    for ours, theirs in zip(plain.gradients().values(), wanted.gradients().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    losses = plain.step().losses
    assert set(losses) == {name, TOTAL}
    assert float(losses[TOTAL]) == pytest.approx(float(wanted.step().losses[TOTAL]))


def test_terms_and_plain_tensors_may_stand_side_by_side() -> None:
    losses, wanted = trainer("mixed").step().losses, trainer("term").step().losses
    assert float(losses["nll"]) == pytest.approx(float(wanted["loss"]))
    assert float(losses["other"]) == pytest.approx(0.5 * float(wanted["loss"]))
    assert float(losses[TOTAL]) == pytest.approx(1.5 * float(wanted["loss"]))


def halves(job: type[Plain]) -> list[RunConfig]:
    one = job({}).info().baseline
    return [one, one.model_copy(update={"micro_batch_size": 8, "accumulation_steps": 1})]


def test_the_author_is_told_once_and_the_equivalence_probe_proves_it_harmless() -> None:
    events = answer(ProbeKind.EQUIVALENCE, *halves(Plain), workload=Plain)
    (told,) = [event.text for event in events if isinstance(event, NoticeEvent)]
    assert "plain tensor" in told
    assert "mean over the micro-batch's samples" in told
    assert all(reply.values["relative_l2"] < 1e-5 for reply in replies(events))


def test_a_mean_over_something_else_is_found_by_the_equivalence_probe() -> None:
    (reply, _) = replies(answer(ProbeKind.EQUIVALENCE, *halves(MeanOverTokens), workload=MeanOverTokens))
    assert reply.values["relative_l2"] > 1e-3


def test_terms_are_nothing_to_be_told_about() -> None:
    config = Plain({"loss": "term"}).info().baseline
    events = answer(ProbeKind.COMPUTE, config, workload=Plain)
    assert not [event for event in events if isinstance(event, NoticeEvent)]


def test_memory_is_traced_with_a_plain_loss() -> None:
    (reply,) = replies(answer(ProbeKind.TRACE, Plain({}).info().baseline, workload=Plain))
    assert reply.outcome is Outcome.OK, reply.message
    assert reply.values["predicted_peak_bytes"] > 0


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        ("float", "a float (0.25)"),
        ("none", "None"),
        ("vector", "a tensor of shape [4]"),
        ("tuple", "a tuple"),
        ("named vector", "a dict in which 'nll' is a tensor of shape [4]"),
    ],
)
def test_what_is_no_loss_is_refused_in_one_line(loss: str, got: str) -> None:
    (reply,) = replies(answer(ProbeKind.END_TO_END, Plain({"loss": loss}).info().baseline, workload=Plain))
    assert reply.outcome is Outcome.BAD_INPUT
    assert reply.message == (
        f'loss: it returned {got}; return {{"loss": Term(sum=..., weight=...)}} or a scalar tensor that is the mean '
        "over the micro-batch"
    )
    assert not reply.detail


def test_a_term_without_a_tensor_is_refused_in_one_line() -> None:
    (reply,) = replies(answer(ProbeKind.END_TO_END, Plain({"loss": "no sum"}).info().baseline, workload=Plain))
    assert (reply.message, reply.detail) == ("loss: term nll: `sum` must be a tensor (got a float)", "")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessRunner]:
    base = tmp_path_factory.mktemp("plain")
    with SubprocessRunner(base / "cache", log_dir=base / "logs", trust=ANY_CODE) as made:
        yield made


def test_several_ranks_take_a_plain_loss(runner: SubprocessRunner, tmp_path: Path) -> None:
    """Two ranks of 4 x 1 reach the losses of one of 4 x 2."""
    one = Plain({}).info().baseline
    two = one.model_copy(update={"accumulation_steps": 1, "world_size": 2})
    alone, shared = (_losses(runner, config) for config in (one, two))
    assert shared[:4] == pytest.approx(alone[:4], rel=1e-5)


def _losses(runner: SubprocessRunner, config: RunConfig) -> list[float]:
    request = ProbeRequest(
        id="plain",
        kind=ProbeKind.LR,
        workload=config.workload,
        points=(config,),
        samples=64,
        limits=ProbeLimits(measure_s=0.2, min_steps=4),
        device="cpu",
    )
    told: list[Event] = []
    reply: PointReply = runner.run(request, lambda event: told.append(event)).points[0]
    assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"
    assert len([event for event in told if isinstance(event, NoticeEvent)]) == 1
    assert reply.measurement is not None
    return list(reply.measurement.losses["loss"])


class TestPlainWorkload(WorkloadContract):
    """The author's suite takes tuples and means."""

    workload = "tests.plain_toys:Plain"

    def test_an_unknown_option_is_refused(self) -> None:
        """The toy has no options worth refusing."""

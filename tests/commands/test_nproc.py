"""--nproc: the effective batch is kept or the arithmetic is shown, and a run over two ranks starts through torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import RunTuner
from tests.toys import Toy
from tuner.commands.ranks import spread, spread_tuned
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Interval
from tuner.contract.tuned import Promise, TunedConfig

SIXTEEN = Toy({}).info().baseline
"""8 x 2."""


def test_accumulation_gives_way_to_ranks() -> None:
    two = spread(SIXTEEN, 2)
    assert (two.micro_batch_size, two.accumulation_steps, two.world_size) == (8, 1, 2)
    assert two.effective_batch_size == SIXTEEN.effective_batch_size
    assert spread(two, 1) == SIXTEEN
    assert spread(two, None) is two


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (
            3,
            "--nproc 3: the effective batch of 16 cannot be shared out: micro-batch 8 x 3 ranks = 24 samples at a time",
        ),
        (4, "over 4 ranks a micro-batch that divides 4 would do"),
        (3, "16 / 24 leaves 16"),
        (3, "With micro-batch 8 it goes over 1, 2 ranks"),
        (0, "at least 1 rank is needed"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_arithmetic(ranks: int, says: str) -> None:
    with pytest.raises(ConfigError, match="--nproc") as caught:
        spread(SIXTEEN, ranks)
    assert says in str(caught.value)


def test_a_promise_holds_for_the_ranks_it_was_made_for() -> None:
    rate = Interval(value=10.0, low=9.0, high=11.0)
    promise = Promise(samples_per_s=rate, peak_bytes=1, peak_low_bytes=1, peak_high_bytes=1, hours=1.0, gain=rate)
    odd = SIXTEEN.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1})
    tuned, said = spread_tuned(TunedConfig(config=SIXTEEN, promise=promise, runner_ups=(SIXTEEN, odd)), 2)
    assert tuned.promise is None
    assert "the promise was made for 1" in said
    assert [one.world_size for one in tuned.runner_ups] == [2], "16 samples at a time fit no second rank"
    assert spread_tuned(tuned, 2) == (tuned, "")


def test_train_over_two_ranks_through_torchrun(tuner: RunTuner, tmp_path: Path) -> None:
    config: RunConfig = SIXTEEN.model_copy(update={"horizon_samples": 320, "threads": 1})
    (tmp_path / "job.yaml").write_text(config.to_json(), encoding="utf-8")
    words = ("train", "--config", "job.yaml", "--allow-code", "--out", "run", "--json")
    ran = tuner(*words, "--nproc", "2")
    assert ran.code == 0, ran.err
    assert (ran.json["samples"], ran.json["finished"]) == (320, True)
    assert "over 2 ranks: micro-batch 8 x 1 each" in ran.err

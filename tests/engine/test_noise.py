"""The gradient noise scale is found where it is known, and the probe tells it of a real workload."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.engine.engine_toys import CPU, answer, make_request, replies, toy_config
from tests.toys import Toy
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProgressEvent
from tuner.engine.bench import Bench
from tuner.engine.noise import LEAST_GRADIENTS, MOST_GRADIENTS, Pool, estimate, fieller, moments
from tuner.engine.trainer import Trainer


def drawn(phi: float, micro: int, count: int, seed: int, dims: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Squares and projections of gradients around a true one of norm 1, each of `micro` samples: [count], [count]."""
    rng = np.random.default_rng(seed)
    true = np.full(dims, dims**-0.5)
    gradients = true + math.sqrt(phi / dims / micro) * rng.standard_normal((count, dims))
    return (gradients**2).sum(axis=1), gradients @ gradients.sum(axis=0)


@pytest.mark.parametrize(("phi", "micro", "count"), [(5.0, 4, 64), (60.0, 8, 64), (200.0, 8, 128)])
def test_a_known_noise_scale_is_found(phi: float, micro: int, count: int) -> None:
    """Gradients with a known covariance, phi / dims times the identity."""
    found = [estimate(*drawn(phi, micro, count, seed), micro) for seed in range(60)]
    assert np.median([one.phi for one in found]) == pytest.approx(phi, rel=0.1)
    assert np.mean([one.gradient_sq for one in found]) == pytest.approx(1.0, rel=0.1)
    assert np.mean([one.trace for one in found]) == pytest.approx(phi, rel=0.1)
    covered = sum(one.low <= phi <= one.high for one in found)
    assert covered >= 0.85 * len(found)


def test_numerator_and_denominator_have_no_bias() -> None:
    """The plain |mean|^2 would count the noise as gradient: at two gradients of one sample by far the larger part."""
    phi = 50.0
    pairs = [drawn(phi, 1, 2, seed) for seed in range(4000)]
    found = [moments(float(sq.mean()), float(dots.sum()) / 4, 2, 1) for sq, dots in pairs]
    gradient_sq, trace = np.mean(found, axis=0)
    assert trace == pytest.approx(phi, rel=0.05)
    assert gradient_sq == pytest.approx(1.0, abs=0.3)


def test_gradients_that_are_noise_alone_have_no_upper_end() -> None:
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((64, 100))
    found = estimate((gradients**2).sum(axis=1), gradients @ gradients.sum(axis=0), 4)
    assert found.high == math.inf
    assert found.low > 4 * 64 / 4, "even so it is known to be no small one"
    assert math.isnan(found.phi) or found.phi > found.low


def test_the_interval_of_a_ratio() -> None:
    low, high = fieller(10.0, 1.0, 0.01, 0.0001, 0.0)
    assert low == pytest.approx(9.72, abs=0.02)
    assert high == pytest.approx(10.29, abs=0.02)
    assert fieller(10.0, 0.1, 0.01, 1.0, 0.0)[1] == math.inf
    assert fieller(0.1, 1.0, 1.0, 0.01, 0.0)[0] == 0.0


def pool_of(**options: float) -> tuple[Pool, Trainer]:
    config = toy_config(options)
    trainer = Trainer(Toy(config.options), config, device=CPU)
    request = make_request(ProbeKind.NOISE, config)
    return Pool(Bench(request, Toy, CPU, lambda _: None), trainer), trainer


def test_leave_one_out_from_two_passes_equals_keeping_every_gradient() -> None:
    """The toy has dropout here: what is drawn at random must be the same in both passes."""
    pool, trainer = pool_of(dropout=0.2)
    before = [parameter.clone() for parameter in trainer.parameters]
    found = pool.estimate()
    gradients = torch.stack([torch.cat([g.flatten().clone() for g in one]) for one in pool._gradients(pool.count)])
    kept = gradients.double().numpy()
    plain = estimate((kept**2).sum(axis=1), kept @ kept.sum(axis=0), 8)
    assert found.phi == pytest.approx(plain.phi, rel=1e-3)
    assert found.low == pytest.approx(plain.low, rel=1e-2)
    assert found.high == pytest.approx(plain.high, rel=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True)), "parameters are frozen"
    trainer.close()


def test_the_probe_tells_it_after_training() -> None:
    events = answer(ProbeKind.NOISE, toy_config(), samples=256)
    (reply,) = replies(events)
    assert reply.outcome is Outcome.OK, reply.detail
    values = reply.values
    assert values["warm_samples"] == 256
    assert LEAST_GRADIENTS <= values["micro_gradients"] <= MOST_GRADIENTS
    assert values["noise_scale"] == pytest.approx(values["trace"] / values["gradient_sq"])
    assert 0 < values["noise_low"] < values["noise_scale"] < values["noise_high"]
    assert reply.measurement is not None
    assert len(reply.measurement.losses["total"]) == 256 // 16
    again = replies(answer(ProbeKind.NOISE, toy_config(), samples=256))[0].values
    assert again == values, "the same request gives the same figures"


def test_it_grows_while_the_model_learns() -> None:
    phi = [
        replies(answer(ProbeKind.NOISE, toy_config(), samples=samples))[0].values["noise_scale"]
        for samples in (16, 1536)
    ]
    assert phi[1] > phi[0]


def test_a_probe_whose_training_breaks_down_says_diverged() -> None:
    (reply,) = replies(answer(ProbeKind.NOISE, toy_config({"fail": "nan", "fail_call": 3}), samples=256))
    assert reply.outcome is Outcome.DIVERGED
    assert "noise_scale" not in reply.values


def test_it_is_heard_of_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.engine.noise.TELL_EVERY_S", 0.0)
    events = answer(ProbeKind.NOISE, toy_config(), samples=64)
    assert any(isinstance(event, ProgressEvent) and event.text == "gradients" for event in events)

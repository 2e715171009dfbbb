"""Without a GPU: the host's own speed, told by its reference work, is taken out of what the search compares."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta

from tests.search.simulated_world import World, drive, make_spec
from tuner.contract.config import LoaderConfig
from tuner.contract.probe import ProbeKind, Stage
from tuner.search.gate import Contest, Standing, judged, looks_of
from tuner.search.history import rate_of
from tuner.search.host import slowdowns
from tuner.search.objective import Figures
from tuner.search.situation import situation_of
from tuner.search.standins import standing as gate_standing
from tuner.search.view import View

RESTLESS = World(alpha=0.05, host_noise=0.12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_the_search_believes_is_near_the_truth_on_a_restless_host(seed: int) -> None:
    ended = drive(make_spec(), RESTLESS, seed=seed)
    searched = [row for row in ended.rows if row.stage not in (Stage.GATE, Stage.SOAK)]
    history = situation_of(View(ended.spec, searched)).history
    rows = [row for row in searched if row.kind is ProbeKind.END_TO_END and row.measurement is not None]
    raw = np.array([math.log(rate_of(row) / RESTLESS.rate(row.config)) for row in rows])
    without = np.array([math.log(history.rate(row) / RESTLESS.rate(row.config)) for row in rows])
    assert len(rows) >= 4
    assert without.std() < 0.5 * raw.std()


def test_on_a_steady_host_nothing_is_taken_out() -> None:
    ended = drive(make_spec(), World(alpha=0.05))
    assert slowdowns(ended.rows) == {}


def test_every_probe_whose_speed_is_compared_asks_for_reference_work() -> None:
    ended = drive(make_spec(), RESTLESS)
    told = {row.kind for row in ended.rows if row.measurement is not None and row.measurement.reference_s}
    assert told == {ProbeKind.END_TO_END, ProbeKind.COMPUTE}


def standing(slower: list[float], *, speed: float = 1.0, noise: float = 0.02, seed: int = 0) -> Standing:
    """A gate of one finalist whose pairs differ by the host as `slower` says."""
    spec, rng = make_spec(), np.random.default_rng([seed, 7])
    looks = looks_of(spec.gate)
    contest = Contest((spec.baseline,) * 2, looks[-1], looks, 1 - spec.gate.alpha / len(looks), spec)
    state = Standing(contest)
    state.pairs[1] = [
        (Figures(speed * math.exp(noise * rng.standard_normal() - host)), Figures(1.0)) for host in slower
    ]
    return state


def test_the_gate_proves_a_gain_that_the_hosts_changes_would_hide() -> None:
    hosts = [0.3, -0.25, 0.1, -0.3, 0.2, -0.05]
    hidden, told = standing(hosts, speed=1.2), standing(hosts, speed=1.2)
    told.slower[1] = list(hosts)
    assert not judged(hidden, last=True) or not hidden.won
    judged(told, last=True)
    assert told.won[1].value == pytest.approx(1.2, rel=0.03)


def test_the_gate_leaves_its_pairs_alone_where_the_reference_work_tells_nothing() -> None:
    rng = np.random.default_rng(3)
    plain = standing([0.0] * 6)
    for slower in ([math.nan] * 6, list(0.1 * rng.standard_normal(6))):
        told = standing([0.0] * 6)
        told.slower[1] = slower
        assert told.gain(1) == plain.gain(1)


def test_false_gains_stay_below_the_error_level_with_the_host_taken_out() -> None:
    """The reference work feels the host 5 % wrong each time; SIMULATION."""
    found, gates, spec = 0, 600, make_spec()
    for seed in range(gates):
        rng = np.random.default_rng([seed, 11])
        hosts = [float(h) for h in 0.12 * rng.standard_normal(max(looks_of(spec.gate)))]
        whole = standing(hosts, seed=seed)
        told = [host + 0.05 * float(rng.standard_normal()) for host in hosts]
        for look in looks_of(spec.gate):
            state = Standing(whole.contest)
            state.pairs[1], state.slower[1] = whole.pairs[1][:look], told[:look]
            if judged(state, last=look == looks_of(spec.gate)[-1]):
                found += bool(state.won)
                break
    assert beta.ppf(0.95, found + 1, gates - found) <= 0.05


def test_configurations_with_other_workers_are_compared_as_measured() -> None:
    """A busy host does not slow them as much as it slows the others."""
    world = World(alpha=0.05, host_noise=0.12, data_per_sample=0.02)
    baseline = make_spec().baseline.model_copy(update={"loader": LoaderConfig(num_workers=0)})
    ended = drive(make_spec(baseline=baseline), world)
    state = gate_standing(situation_of(View(ended.spec, ended.rows)))
    workers = [side.loader.num_workers for side in state.contest.sides]
    assert workers[0] == 0 < workers[1]
    assert all(math.isnan(log) for log in state.slower[1])

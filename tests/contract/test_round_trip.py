"""What is written comes back equal: as JSON between processes, and as YAML in files."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.contract import contract_strategies as made
from tuner.contract.base import Frozen, parse_json
from tuner.contract.config import RunConfig
from tuner.contract.documents import load_document, write_mapping
from tuner.contract.gpu import GpuProfile, gpu_profiles
from tuner.contract.measurement import Interval, Measurement
from tuner.contract.probe import EVENT, Event, PointReply, ProbeRequest
from tuner.contract.space import SearchSpace
from tuner.contract.tuned import TunedConfig

relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def comes_back(value: Frozen) -> None:
    cls = type(value)
    assert parse_json(cls, value.to_json()) == value
    assert load_document(cls, write_mapping(value.model_dump(mode="json")), "x.yaml") == value


@relaxed
@given(made.configs)
def test_run_config(config: RunConfig) -> None:
    comes_back(config)
    assert parse_json(RunConfig, config.to_json()).digest() == config.digest()


@relaxed
@given(made.tuned)
def test_tuned_config(document: TunedConfig) -> None:
    comes_back(document)


@relaxed
@given(made.spaces)
def test_search_space(space: SearchSpace) -> None:
    comes_back(space)


@relaxed
@given(made.measurements)
def test_measurement(measurement: Measurement) -> None:
    comes_back(measurement)


@relaxed
@given(made.intervals)
def test_interval(interval: Interval) -> None:
    comes_back(interval)


@relaxed
@given(made.requests)
def test_probe_request(request: ProbeRequest) -> None:
    comes_back(request)


@relaxed
@given(made.replies)
def test_point_reply(reply: PointReply) -> None:
    comes_back(reply)


@relaxed
@given(made.events)
def test_an_event_is_one_line_and_names_its_own_type(event: Event) -> None:
    line = event.model_dump_json().encode()
    assert b"\n" not in line
    assert EVENT.validate_json(line) == event


@pytest.mark.parametrize("name", gpu_profiles())
def test_gpu_profile(name: str) -> None:
    profile: GpuProfile = gpu_profiles()[name]
    comes_back(profile)


def test_a_diverged_measurement_survives_its_nan() -> None:
    text = '{"event": "point", "outcome": "diverged", "values": {"final_loss": NaN, "peak": Infinity}}'
    reply = parse_json(PointReply, text)
    again = parse_json(PointReply, reply.to_json())
    assert again.values["final_loss"] != again.values["final_loss"]
    assert again.values["peak"] == float("inf")

"""The guide's targets beside what was measured: ok, missed, or unknown, which is never zero."""

from __future__ import annotations

import pytest

from tests.store.rows import BASELINE, WINNER, example_decision, example_rows, example_spec
from tuner.contract.measurement import Telemetry
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec, Targets
from tuner.contract.tuned import Decision, Side
from tuner.report.page import render
from tuner.report.targets import in_words, reached, target_results
from tuner.report.words import note

ALL = Targets(gpu_utilisation_min=0.9, memory_share_max=0.8, data_wait_max=0.1, speedup_min=2.0)


def spec(**changes: object) -> StudySpec:
    return example_spec().model_copy(update={"targets": Targets.model_validate({**ALL.model_dump(), **changes})})


def busy(rows: list[ProbeRow], share: float | None) -> list[ProbeRow]:
    """`rows` as a GPU that is busy for `share` of the time would have given them."""
    telemetry = Telemetry(gpu_utilization=share)
    return [
        row.model_copy(update={"measurement": row.measurement.model_copy(update={"telemetry": telemetry})})
        if row.measurement
        else row
        for row in rows
    ]


def by_name(study: StudySpec, rows: list[ProbeRow], decision: Decision | None = None) -> dict[str, str]:
    found = target_results(study, rows, decision or example_decision())
    return {result.name: reached(result) for result in found}


def test_each_target_is_held_against_the_configuration_to_ship() -> None:
    """The example waits 5 % of each step, peaks at 780 MiB of a P100's 16,280, and gains 42 %."""
    said = in_words(target_results(spec(), example_rows(), example_decision()))
    assert said == (
        "memory < 80 %: 4.8 % ok (this host's memory held against the Tesla P100 16 GB's); "
        "data wait < 10 %: 5.0 % ok; GPU utilisation > 90 %: unknown (no GPU); speed-up > 2x: 1.42x missed"
    )


def test_a_limit_that_is_passed_is_missed() -> None:
    found = by_name(spec(memory_share_max=0.04, data_wait_max=0.03, speedup_min=1.4), list(example_rows()))
    assert found["memory"].startswith("4.8 % missed")
    assert found["data wait"] == "5.0 % missed"
    assert found["speed-up"] == "1.42x ok"


@pytest.mark.parametrize(
    ("share", "text"), [(0.75, "75 % ok"), (0.95, "95 % missed"), (0.5, "50 % missed"), (1.0, "100 % missed")]
)
def test_utilisation_may_have_a_range(share: float, text: str) -> None:
    study = spec(gpu_utilisation_min=0.7, gpu_utilisation_max=0.9)
    rows = busy(list(example_rows()), share)
    assert by_name(study, rows)["GPU utilisation"] == text
    assert target_results(study, rows, example_decision())[2].wanted == "70-90 %"


def test_a_driver_that_does_not_tell_is_unknown_and_not_zero() -> None:
    study = spec()
    gpu = study.model_copy(update={"device": study.device.model_copy(update={"kind": "cuda"})})
    assert by_name(gpu, busy(list(example_rows()), None))["GPU utilisation"] == "unknown (the driver does not tell)"


def test_without_a_gain_the_speed_up_is_one() -> None:
    side = Side(config=BASELINE)
    decision = Decision(kind="no_gain", reason="noise", baseline=side, winner=side, gain=example_decision().gain)
    assert by_name(spec(), list(example_rows()), decision)["speed-up"] == "1.00x missed (the baseline stays)"


def test_nothing_is_said_where_the_study_has_no_targets_or_nothing_to_ship() -> None:
    assert target_results(example_spec(), example_rows(), example_decision()) == ()
    assert target_results(spec(), example_rows(), None) == ()
    assert target_results(spec(), example_rows(), Decision(kind="failed", reason="it died")) == ()
    rowless = target_results(spec(), (), example_decision())
    assert [result.verdict for result in rowless] == ["unknown", "unknown", "unknown", "missed"]


def test_the_page_and_the_dashboard_s_note_show_them() -> None:
    page = render(spec(), example_rows(), example_decision())
    assert "<tr><th>data wait</th><td>&lt; 10 %</td><td>5.0 % ok</td></tr>" in page
    assert "Guide's target, data wait &lt; 10 %: 5.0 % ok" in note(spec(), example_decision(), example_rows())
    assert 'id="targets"' not in render(example_spec(), example_rows(), example_decision())


def test_labels_tell_models_apart_where_a_study_searches_them() -> None:
    study = spec()
    study = study.model_copy(update={"space": study.space.model_copy(update={"options": {"preset": ("tiny", "full")}})})
    page = render(study, example_rows(), example_decision())
    assert f"{WINNER.label} preset=tiny is 42.0 %" in page

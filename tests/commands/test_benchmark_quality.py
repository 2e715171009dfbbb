"""`benchmarks.quality` calls a metric clearly better only where it is, and fails for a workload that is not."""

from __future__ import annotations

import pytest

from benchmarks.quality import judged, passed, verdict


@pytest.mark.parametrize(
    ("value", "without", "higher", "said"),
    [
        (0.76, 0.5, True, "yes"),
        (0.52, 0.5, True, "a little"),
        (0.5, 0.5, True, "NO"),
        (0.4, 0.5, True, "NO"),
        (0.5, 1.0, False, "yes"),
        (0.95, 1.0, False, "a little"),
        (1.2, 1.0, False, "NO"),
        (24.0, 8.0, True, "yes"),
        (8.4, 8.0, True, "a little"),
        (float("nan"), 0.5, True, "NO"),
        (None, 0.5, True, "NO"),
    ],
)
def test_verdict(value: float | None, without: float, higher: bool, said: str) -> None:
    assert verdict(value, {"value": without, "text": "", "higher_is_better": higher}) == said


def test_what_lies_within_its_noise_is_no_better() -> None:
    trivial = {"match": {"value": 0.5, "text": "chance", "higher_is_better": True}}
    for value, error, said in ((0.514, 0.048, "NO"), (0.7, 0.048, "yes"), (0.7, 0.2, "NO")):
        result = {"samples": 1, "trivial": trivial, "metrics": {"match": value, "match_se": error}}
        assert judged("sd_kanji", result)[0][4] == said


def test_a_workload_passes_by_the_metric_it_judges_by() -> None:
    trivial = {
        "macro_auc": {"value": 0.5, "text": "chance", "higher_is_better": True},
        "loss": {"value": 1.0, "text": "frequencies", "higher_is_better": False},
    }
    result = {"samples": 1000, "trivial": trivial, "metrics": {"macro_auc": 0.7, "loss": 0.98}}
    rows = judged("gpt2", result)
    assert rows[0] == ("gpt2", "macro_auc", "0.7", "0.5 (chance)", "yes", "1,000")
    assert passed(rows, "macro_auc")
    assert not passed(rows, "loss")
    assert not passed(rows, ""), "without one that decides, all must be clear"
    assert not passed(judged("gpt2", {**result, "trivial": {}}), "macro_auc"), "nothing to compare with is no success"

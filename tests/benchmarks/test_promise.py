"""The benchmark that holds production against its promise: what counts as kept, and runs that are long enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.promise import longer, text_of
from tests.engine.engine_toys import toy_config
from tuner.contract.measurement import Interval
from tuner.contract.tuned import Promise, TunedConfig
from tuner.export.tuned import load, write


def result(of: str, reached: float, beyond: float | None, peak: float, verdict: str) -> dict[str, Any]:
    return {
        "of": of,
        "promised_samples_per_s": {"value": 100.0, "low": 90.0, "high": 110.0},
        "samples_per_s": {"value": reached},
        "deviation": reached / 100 - 1,
        "deviation_beyond_drift": beyond,
        "host_drift": None if beyond is None else reached / 100 / (1 + beyond),
        "promised_peak_bytes": 100 << 20,
        "peak_bytes": round((1 + peak) * (100 << 20)),
        "peak_deviation": peak,
        "verdict": verdict,
    }


def test_what_counts_as_kept() -> None:
    """A slow host is taken out of the judged figure, never out of the raw ones; faster than promised is kept too."""
    runs = [
        result("one", 80.0, -0.01, 0.04, "kept"),
        result("one", 89.0, None, 0.06, "below"),
        result("two", 118.0, 0.18, -0.01, "above"),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text_of(runs).splitlines() if line]
    assert ["one", "2", "1", "0", "1", "1"] in rows
    assert ["two", "1", "0", "0", "1", "1"] in rows
    assert ["all", "3", "1", "0", "2", "2"] in rows


def test_a_short_horizon_is_made_longer_than_the_run(tmp_path: Path) -> None:
    config = toy_config({"samples": 200}, horizon_samples=160)
    promise = Promise(
        samples_per_s=Interval(value=90.0, low=80.0, high=100.0),
        peak_bytes=2,
        peak_low_bytes=1,
        peak_high_bytes=3,
        hours=1.0,
        gain=Interval(value=1.0, low=0.9, high=1.1),
    )
    write(tmp_path / "best.yaml", TunedConfig(config=config, promise=promise))
    copy, of = longer(tmp_path / "best.yaml", tmp_path / "copy.yaml", seconds=10.0)
    assert of == config.workload
    assert load(copy).config.horizon_samples >= 1000
    assert load(copy).config.model_copy(update={"horizon_samples": 160}) == config

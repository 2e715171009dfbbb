"""Values that are none, and names and paths that can be none: one line with the path or option, the rule and the value,
and nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunTuner
from tests.store.rows import example_exchanges, example_spec
from tuner.commands.optimize import SearchWords, study_name
from tuner.commands.setup import JobWords
from tuner.contract.documents import load_document
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Measurement, MemoryPeak
from tuner.contract.study import StudyFile
from tuner.contract.tuned import TunedConfig
from tuner.store.store import StudyStore

TOY = "tests.toys:Toy"
CONFIG = {"workload": "graph", "micro_batch_size": 8, "horizon_samples": 64, "optimizer": {"lr": 0.1}}
PROMISE = {
    "samples_per_s": {"value": 9.0, "low": 8.0, "high": 10.0},
    "peak_bytes": 1,
    "peak_low_bytes": 1,
    "peak_high_bytes": 1,
    "hours": 1.0,
    "gain": {"value": 1.0, "low": 0.9, "high": 1.1},
}
DIGITS = "9" * 400
BROKEN = [
    ("promise.samples_per_s.value", "0", "promise.samples_per_s"),
    ("promise.samples_per_s.value", ".nan", "promise.samples_per_s"),
    ("promise.samples_per_s.value", "-5.0", "promise.samples_per_s"),
    ("promise.samples_per_s.value", ".inf", "promise.samples_per_s"),
    ("promise.samples_per_s.value", "1e-300", "promise.samples_per_s"),
    ("promise.samples_per_s.low", ".nan", "promise.samples_per_s"),
    ("promise.gain.value", "0.0", "promise.gain"),
    ("promise.reference_s", "[0.0]", "promise.reference_s"),
    ("promise.reference_s", "[.nan]", "promise.reference_s"),
    ("promise.hours", "-1.0", "promise.hours"),
    ("promise.peak_bytes", "-1", "promise.peak_bytes"),
    ("promise.peak_bytes", DIGITS, "promise"),
    ("config.horizon_samples", DIGITS, "config.horizon_samples"),
    ("config.optimizer.eps", ".inf", "config.optimizer.eps"),
    ("config.optimizer.weight_decay", ".nan", "config.optimizer.weight_decay"),
    ("config.optimizer.betas", "[0.9, .nan]", "config.optimizer.betas"),
    ("config.max_grad_norm", ".inf", "config.max_grad_norm"),
    ("config.schedule.warmup_samples", DIGITS, "config.schedule.warmup_samples"),
    ("config.cadence.log_samples", DIGITS, "config.cadence.log_samples"),
    ("config.loss_bands", "{normal_low: .nan, normal_high: 1, warn_low: 0, warn_high: 2}", "config.loss_bands"),
    ("config.options", "{width: .inf}", "config.options"),
    ("config.options", f"{{width: {DIGITS}}}", "config.options"),
    ("runner_up_peaks", f"[{DIGITS}]", "runner_up_peaks"),
]


def document(path: str, value: str) -> str:
    """The text of a tuned file with one value of another kind."""
    data: dict[str, Any] = json.loads(json.dumps({"config": CONFIG, "promise": PROMISE}))
    *above, last = path.split(".")
    place = data
    for key in above:
        place = place.setdefault(key, {})
    place[last] = "HERE"
    return json.dumps(data).replace('"HERE"', value)


@pytest.mark.parametrize(("path", "value", "said"), BROKEN)
def test_a_value_that_is_none_is_refused_with_its_path(path: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_document(TunedConfig, document(path, value), "best.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"best.yaml: {said}")
    assert "(got " in line
    assert len(line) < 400


def test_unknown_ends_of_an_interval_are_a_promise_still() -> None:
    text = document("promise.samples_per_s", "{value: 9.0, low: 0.0, high: .inf}")
    assert load_document(TunedConfig, text, "best.yaml").promise is not None


def test_measured_figures_may_be_no_numbers() -> None:
    measured = Measurement(
        samples_per_step=1, step_s=(1.0,), losses={"total": (float("nan"),)}, memory=MemoryPeak(process_bytes=1)
    )
    assert "NaN" in measured.to_json()


@pytest.mark.parametrize(
    "text",
    ["budget_s: .inf", "budget_s: .nan", "space: {lr: [.inf]}", "gate: {min_gain: .nan}", "baseline: {seed: .nan}",
     "targets: {speedup_min: .inf}", "options: {x: .nan}", f"lr: {{samples: {DIGITS}}}"],
)  # fmt: skip
def test_a_study_file_holds_finite_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"study.yaml: \w+"):
        load_document(StudyFile, f"workload: graph\n{text}\n", "study.yaml")


@pytest.mark.parametrize(("path", "value"), [("promise.samples_per_s.value", "0"), ("config.optimizer.eps", ".inf")])
def test_the_command_says_so_in_one_line(tuner: RunTuner, tmp_path: Path, path: str, value: str) -> None:
    (tmp_path / "best.yaml").write_text(document(path, value))
    for words in (("train", "--config", "best.yaml"), ("explain", "--config", "best.yaml")):
        ran = tuner(*words)
        assert ran.code == 2, ran.err
        assert ran.err.startswith("tuner: best.yaml: ")
        assert len(ran.err.splitlines()) == 1


LONG = "x" * 300
REFUSED = [
    (("optimize", "-w", TOY, "--study", "a b"), "--study: 1 to 128 letters, digits"),
    (("optimize", "-w", TOY, "--study", "../x"), "--study: 1 to 128 letters, digits"),
    (("optimize", "-w", TOY, "--study", "x" * 129), "--study: 1 to 128 letters, digits"),
    (("optimize", "-w", TOY, "--study", ""), "--study: 1 to 128 letters, digits"),
    (("optimize", "-w", TOY, "--study", "line\nbreak"), "--study: 1 to 128 letters, digits"),
    (("optimize", "-w", TOY, "--data", LONG), "--data: a path has at most 255 letters"),
    (("optimize", "-w", TOY, "--spec", LONG), "--spec: a path has at most 255 letters"),
    (("optimize", "-w", TOY, "--out", ""), "--out: the path of a file or folder is expected (got '')"),
    (("optimize", "-w", TOY, "--out", "."), "--out: the path of a file is expected, and . is a folder"),
    (("optimize", "-w", f"a:{LONG}"), "--workload: "),
    (("optimize", "-w", LONG), "--workload: unknown workload"),
    (("train", "-w", TOY, "--out", "a/" * 3000), "--out: a path has at most 255 letters between two slashes"),
    (("train", "--config", ""), "--config: the path of a file or folder is expected (got '')"),
    (("train", "--config", LONG), "--config: a path has at most 255 letters"),
    (("bench", "-w", TOY, "--out", ""), "--out: the path of a file or folder is expected (got '')"),
    (("probe", "-w", TOY, "--profile", "--out", LONG), "--out: a path has at most 255 letters"),
    (("explain", "--config", ""), "--config: the path of a file or folder is expected (got '')"),
    (("export", "x", "--out", "."), "--out: the path of a file is expected, and . is a folder"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_a_name_or_path_that_can_be_none_is_refused(tuner: RunTuner, words: tuple[str, ...], said: str) -> None:
    ran = tuner(*words)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert len(ran.err.splitlines()) == 1
    assert len(ran.err) < 700
    assert ran.out == ""


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_a_page_is_not_written_over_a_folder(tuner: RunTuner, tmp_path: Path, out: str) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/studies/studies.db") as store:
        store.create_study(example_spec("mine"))
        for item in example_exchanges():
            store.add_reply("mine", item.request, item.reply, item.trial)
    for words in (("report", "mine"), ("export", "mine", "--format", "csv")):
        ran = tuner(*words, "--out", out)
        assert ran.code == 2, ran.err
        assert ran.err.startswith("tuner: --out: the path of a file")
        assert len(ran.err.splitlines()) == 1


def test_a_study_named_after_odd_words_has_a_name_that_can_be_stored() -> None:
    words = JobWords(workload="mine.jobs:" + "J" * 128)
    assert study_name(words, SearchWords(gpu="t4"), "my preset") == f"{'j' * 128}"
    assert study_name(words, SearchWords(gpu="t4", aa=True), "my preset") == f"{'j' * 125}-aa"
    assert study_name(JobWords(workload="graph"), SearchWords(gpu="t4"), "my preset") == "graph-my_preset-t4"

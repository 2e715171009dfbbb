"""Nothing that a file names is imported without --allow-code: a canary module over every file that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RunTuner
from tests.store.rows import example_exchanges, example_spec
from tuner.commands.setup import load_study_file
from tuner.contract.base import Frozen
from tuner.contract.choice import Confirmation, Fallbacks, FellBack
from tuner.contract.config import OptimizerConfig, RunConfig
from tuner.contract.errors import ConfigError, StoreError
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest
from tuner.contract.trust import Trust
from tuner.contract.tuned import Promise, TunedConfig
from tuner.export.tuned import write
from tuner.probe.runner import SubprocessRunner
from tuner.store.store import StudyStore

EVIL = "evilmod:Job"
TOY = "tests.toys:Toy"
GOOD = RunConfig(workload="graph", micro_batch_size=8, optimizer=OptimizerConfig(lr=0.1), horizon_samples=64)
BAD = GOOD.model_copy(update={"workload": EVIL})
PROMISE = Promise(
    samples_per_s=Interval(value=9.0, low=8.0, high=10.0),
    peak_bytes=1,
    peak_low_bytes=1,
    peak_high_bytes=1,
    hours=1.0,
    gain=Interval(value=1.0, low=1.0, high=1.0),
)
CANARY = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"


@pytest.fixture(autouse=True)
def canary(tmp_path: Path) -> Path:
    """The module that must not be imported, in the folder where the commands run; what it would leave behind."""
    (tmp_path / "evilmod.py").write_text(CANARY)
    return tmp_path / "imported"


def confirmation(chosen: RunConfig) -> Confirmation:
    return Confirmation(
        asked=GOOD.digest(), device="here", at="", sides=(), chosen=chosen, reason="fast", promise=PROMISE
    )


def fallbacks(chosen: RunConfig) -> Fallbacks:
    step = FellBack(ended=GOOD, outcome=Outcome.OOM_HOST, message="", samples=8, chosen=chosen, why="", at="")
    return Fallbacks(asked=GOOD.digest(), steps=(step,))


def leaner(**changes: object) -> RunConfig:
    return GOOD.model_copy(update={"micro_batch_size": 4, "accumulation_steps": 2, **changes})


@pytest.mark.parametrize(
    ("name", "kept", "key"),
    [
        ("fallback.json", fallbacks(BAD), "steps.0.chosen.workload"),
        ("confirmed.json", confirmation(BAD), "chosen.workload"),
        ("fallback.json", fallbacks(leaner(workload="gpt2")), "steps.0.chosen.workload"),
        ("fallback.json", fallbacks(leaner(options={"data": "/etc"})), "steps.0.chosen.options"),
        ("confirmed.json", confirmation(leaner(horizon_samples=1 << 40)), "chosen.horizon_samples"),
        ("confirmed.json", confirmation(leaner(optimizer=OptimizerConfig(lr=9.0))), "chosen.optimizer"),
    ],
)
def test_what_a_run_folder_keeps_cannot_change_the_training(
    tuner: RunTuner, tmp_path: Path, canary: Path, name: str, kept: Frozen, key: str
) -> None:
    write(tmp_path / "good.yaml", TunedConfig(config=GOOD))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(kept.to_json())
    ran = tuner("train", "--config", "good.yaml", "--out", "run")
    assert ran.code == 2, ran.err
    assert f"tuner: run/{name}: {key}: it is another training than the one asked for" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not canary.exists()


STUDY_FILES = [
    (f"workload: {EVIL}\n", "workload"),
    (f"workload: graph\nbaseline: {{workload: {EVIL}}}\n", "baseline.workload"),
    ("workload: gpt2\n", "workload"),
    ("workload: graph\nbaseline: {workload: [1]}\n", "baseline.workload"),
]


@pytest.mark.parametrize("command", [("train",), ("optimize", "--gpu", "cpu"), ("probe",), ("bench",)])
@pytest.mark.parametrize(("text", "key"), STUDY_FILES)
def test_a_study_file_cannot_change_the_workload_asked_for(
    tuner: RunTuner, tmp_path: Path, canary: Path, command: tuple[str, ...], text: str, key: str
) -> None:
    found = tmp_path / "studies" / "graph" / "study.yaml"
    found.parent.mkdir(parents=True)
    found.write_text(text)
    ran = tuner(*command, "-w", "graph")
    assert ran.code == 2, ran.err
    assert f"tuner: studies/graph/study.yaml: {key}: it is for " in ran.err
    assert "but --workload graph was asked for" in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        f"workload: {EVIL}\n",
        f"workload: {TOY}\npresets: {{wide: {{workload: {EVIL}}}}}\n",
        f"workload: {TOY}\npresets: {{wide: {{baseline: {{workload: {EVIL}}}}}}}\n",
        f"workload: {TOY}\ntiers: [{{above_gib: 0, baseline: {{workload: {EVIL}}}}}]\n",
    ],
)
def test_nor_does_one_that_is_named_nor_its_presets_and_tiers(
    tuner: RunTuner, tmp_path: Path, canary: Path, text: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    ran = tuner("optimize", "-w", TOY, "--gpu", "cpu", "--spec", "mine.yaml", "-o", "preset=wide")
    assert ran.code == 2, ran.err
    assert EVIL in ran.err or "preset" in ran.err
    assert not canary.exists()
    assert not list(tmp_path.glob("studies/*/best.*.yaml"))


def test_a_class_called_as_a_shipped_workload_does_not_get_its_study_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_study_file("graph", None).workload == "graph"
    assert load_study_file("mine.jobs:Graph", None).workload == "mine.jobs:Graph"


@pytest.mark.parametrize("key", ["config", "runner_ups", "baseline"])
def test_a_tuned_file_names_one_workload_and_no_code(tuner: RunTuner, tmp_path: Path, canary: Path, key: str) -> None:
    document = json.loads(TunedConfig(config=GOOD).to_json()) | {
        key: [json.loads(BAD.to_json())] if key == "runner_ups" else json.loads(BAD.to_json())
    }
    (tmp_path / "best.yaml").write_text(json.dumps(document))
    ran = tuner("train", "--config", "best.yaml", "--confirm")
    assert ran.code == 2, ran.err
    assert ran.err.startswith("tuner: best.yaml: ")
    assert EVIL in ran.err
    assert not canary.exists()


def test_the_files_of_a_run_folder_import_nothing_when_it_is_gone_on_with(
    tuner: RunTuner, tmp_path: Path, canary: Path
) -> None:
    words = ("train", "-w", TOY, "--out", "run", "-o", "samples=64")
    ran = tuner(*words, "--max-samples", "32")
    assert ran.code in (0, 75), ran.err
    named = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".yaml", ".json", ".jsonl")]
    changed = [path for path in named if TOY in path.read_text()]
    assert {path.name for path in changed} >= {"config.yaml", "status.json"}
    for path in named:
        path.write_text(path.read_text().replace(TOY, EVIL))
    tuner(*words, "--max-samples", "64")
    tuner("runs")
    assert not canary.exists()


@pytest.mark.parametrize("shadow", ["torch.py", "numpy.py", "psutil.py"])
def test_what_lies_in_the_current_folder_is_not_taken_for_a_library(
    tuner: RunTuner, tmp_path: Path, canary: Path, shadow: str
) -> None:
    (tmp_path / shadow).write_text(CANARY)
    ran = tuner("doctor")
    assert ran.code == 0, ran.err
    assert not canary.exists()


def test_the_door_itself_starts_no_process_for_a_name_nobody_typed(tmp_path: Path) -> None:
    request = ProbeRequest(id="x", kind=ProbeKind.DESCRIBE, workload=TOY)
    sneaked = ProbeRequest(id="x", kind=ProbeKind.COMPUTE, workload="graph", points=(BAD,))
    with SubprocessRunner(tmp_path / "cache", log_dir=tmp_path / "logs") as runner:
        for asked in (request, sneaked):
            with pytest.raises(ConfigError, match="--allow-code"):
                runner.run(asked)
    assert not list((tmp_path / "logs").glob("*")), "nothing was started"
    assert Trust.of(TOY).allows(TOY)
    assert not Trust.of(TOY).allows(EVIL)


SHOWN: list[Callable[[str], tuple[str, ...]]] = [
    lambda study: ("show", study, "--probes"),
    lambda study: ("explain", study),
    lambda study: ("report", study),
    lambda study: ("export", study),
]


def test_rows_of_another_workload_are_refused(tuner: RunTuner, tmp_path: Path, canary: Path) -> None:
    """What a search ships comes from its rows."""
    url = f"sqlite:///{tmp_path}/mine.db"
    with StudyStore.open(url) as store:
        store.create_study(example_spec("mine"))
        item = example_exchanges()[0]
        points = tuple(point.model_copy(update={"workload": EVIL}) for point in item.request.points)
        store.add_reply("mine", item.request.model_copy(update={"points": points}), item.reply, None)
        with pytest.raises(StoreError, match=r"probe 0 of study 'mine': config\.workload: it is 'evilmod:Job'"):
            store.rows("mine")
    for words in SHOWN:
        ran = tuner(*words("mine"), "--storage", url)
        assert ran.code in (2, 3) or "it is 'evilmod:Job', but the study is of" in ran.out
    assert not canary.exists()

"""What lies in the folder a command is typed in takes the place of nothing: not of Python's modules, nor of torch, nor
of the shipped workloads, in no process that a command starts. What is asked for by name there is found all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.gpu_preflight import register
from tests.conftest import ROOT, tuner_environment
from tuner.contract.trust import Trust
from tuner.probe.launch import Host, HostLost, worker_environment

SHADOW = (
    "from pathlib import Path\nPath(__file__).with_name('taken').touch()\nraise ImportError('not the module meant')\n"
)
NAMES = (
    *("random", "token", "profile", "logging", "select", "queue", "typing", "pathlib", "signal", "json", "shutil"),
    *("numpy", "torch", "datasets", "optuna", "typer", "psutil", "sitecustomize", "usercustomize", "benchmarks"),
)
BEFORE_OUR_FIRST_LINE = ("types", "tuner", "functools", "warnings", "enum", "re")
"""Of these Python itself takes what `python -m` and PYTHONPATH put in front."""
JOB = "from tests.plain_toys import Plain\nimport helper\nclass Job(Plain): pass\n"
STUB = "class Mine:\n" + "".join(
    f"    def {name}(self): ...\n" for name in ("info", "model", "dataset", "loss", "evaluate")
)
SCRIPT = (str(Path(sys.executable).with_name("tuner")),)
MODULE = (sys.executable, "-m", "tuner.cli")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's entry points as installing it gives them."""
    return register(tmp_path_factory.mktemp("site"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: files of every name, and a job of their own that needs another file of theirs."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(SHADOW)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "__init__.py").write_text(SHADOW)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "jobs.py").write_text(JOB)
    (tmp_path / "helper.py").write_text("")
    return tmp_path


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> str:
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert not (folder / "taken").exists()
    return ran.stdout


@pytest.mark.parametrize(
    ("program", "words", "path"),
    [
        (SCRIPT, ("train", "-w", "mine.jobs:Job", "--max-samples", "64", "--out", "run", "--nproc", "2"), ""),
        (MODULE, ("probe", "-w", "mine.jobs:Job", "--kind", "compute", "--seconds", "0.1s"), ""),
        (SCRIPT, ("probe", "-w", "mine.jobs:Job", "--kind", "loader", "--set", "num_workers=1"), "."),
        (SCRIPT, ("doctor", "--json"), f"{os.pathsep}{ROOT}{os.pathsep}"),
    ],
    ids=["script and torchrun", "module", "PYTHONPATH names the folder", "PYTHONPATH has an empty place"],
)
def test_commands_run_beside_files_of_any_name(
    folder: Path, cache: Path, program: Sequence[str], words: Sequence[str], path: str
) -> None:
    env = tuner_environment(cache)
    if path:
        env["PYTHONPATH"] = os.pathsep.join([path, str(ROOT)])
    elif program is SCRIPT:
        for name in BEFORE_OUR_FIRST_LINE:
            (folder / f"{name}.py").write_text(SHADOW)
    run([*program, *words], folder, env)


def load(name: str, folder: Path, cache: Path, site: Path, *, path: str = "") -> str:
    """Load a workload as a worker does, in `folder`; the file and the name it was loaded from."""
    parent = tuner_environment(cache)
    parent["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(site)]))
    here = os.getcwd()
    os.chdir(folder)
    try:
        env = worker_environment(parent, cache, 1)
    finally:
        os.chdir(here)
    code = (
        "import inspect, sys; from tuner import importing, registry; importing.named_before_last(); "
        f"found = registry.load({name!r}); print(inspect.getfile(found), found.__module__)"
    )
    return run([sys.executable, "-c", code], folder, env).strip()


@pytest.fixture(params=["package", "folder"])
def own_workloads(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A user's `workloads/gpt2/workload.py`, as a package and as plain folders."""
    inside = tmp_path / "workloads" / "gpt2"
    inside.mkdir(parents=True)
    (inside / "workload.py").write_text(STUB)
    if request.param == "package":
        for place in (tmp_path / "workloads", inside):
            (place / "__init__.py").write_text("")
    return tmp_path


@pytest.mark.parametrize("path", ["", "."])
def test_a_folder_called_workloads_and_the_shipped_ones_do_not_meet(
    own_workloads: Path, cache: Path, registered: Path, path: str
) -> None:
    shipped = load("graph", own_workloads, cache, registered, path=path)
    assert shipped == f"{ROOT}/workloads/graph/workload.py tuner.workloads.graph.workload"
    own = load("workloads.gpt2.workload:Mine", own_workloads, cache, registered, path=path)
    assert own == f"{own_workloads}/workloads/gpt2/workload.py workloads.gpt2.workload"


def test_what_older_files_call_a_shipped_workload_is_still_found(tmp_path: Path, cache: Path, registered: Path) -> None:
    found = load("workloads.graph.workload:Graph", tmp_path, cache, registered)
    assert found.startswith(f"{ROOT}/workloads/graph/workload.py")


@pytest.mark.parametrize("name", ["tests", "benchmarks", "docs", "studies"])
def test_the_folders_of_a_checkout_hide_no_package_of_a_user_s(
    tmp_path: Path, cache: Path, registered: Path, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "jobs.py").write_text(STUB)
    assert load(f"{name}.jobs:Mine", tmp_path, cache, registered).startswith(f"{tmp_path}/{name}/jobs.py")


def test_the_shipped_workloads_do_not_know_under_which_name_they_are_imported() -> None:
    for path in (ROOT / "workloads").rglob("*.py"):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        named = {words[1].partition(".")[0] for words in lines if words[:1] in (["from"], ["import"])}
        assert "workloads" not in named, path


@pytest.mark.parametrize(
    ("name", "other"),
    [("profile:Mine", "profile.py"), ("torch.jobs:Mine", "torch/__init__.py"), ("time:Mine", "Python itself")],
)
def test_a_job_that_another_module_hides_is_told_so(tmp_path: Path, cache: Path, name: str, other: str) -> None:
    top = name.partition(":")[0].partition(".")[0]
    (tmp_path / f"{top}.py").write_text(STUB)
    code = f"from tuner import registry\ntry: registry.load({name!r})\nexcept Exception as error: print(error)"
    said = run([sys.executable, "-P", "-c", code], tmp_path, tuner_environment(cache))
    assert f"{tmp_path}/{top}.py is hidden by " in said
    assert other in said
    assert "give yours another name" in said


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("print('one line', file=sys.stderr); os._exit(9)", r"\(exit code 9\): one line"),
        ("os.kill(os.getpid(), 11)", r"\(signal 11\)"),
        (
            "print('ValueError: no', file=sys.stderr); print('advice', file=sys.stderr); os._exit(1)",
            r"1\): ValueError: no",
        ),
        ("os._exit(0)", r"the worker host has ended \(exit code 0\)$"),
    ],
)
def test_the_last_words_of_a_worker_host_are_in_the_message(tmp_path: Path, last: str, told: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\n{last}\n")
    env = worker_environment({**os.environ, "PYTHONPATH": str(tmp_path)}, tmp_path, 1)
    with pytest.raises(HostLost, match=told):
        Host.start(env, tmp_path / "host.log", preload="", timeout_s=30.0)


def test_a_job_that_ends_its_host_is_told_with_its_last_words(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "jobs.py").write_text("import os, sys\nprint('licence expired', file=sys.stderr)\nos._exit(7)\n")
    ran = subprocess.run(
        [*MODULE, "train", "-w", "jobs:Job", "--out", "run"],
        cwd=tmp_path,
        env=tuner_environment(cache),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode in (2, 3)
    assert "licence expired" in ran.stdout + ran.stderr


def test_what_a_file_names_is_still_not_imported_unasked() -> None:
    assert not Trust.of("graph").allows("tuner.workloads.graph.workload:Graph")

"""Cores and memory of the container: from made-up cgroup trees of every kind, and from real ones where possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tuner.commands.optimize import memory_budget
from tuner.contract.allowance import allowance, quota_periods, usable_cores
from tuner.contract.gpu import DeviceInfo, gpu_profile

ROOT = Path(__file__).resolve().parents[2]
CGROUPS = Path("/sys/fs/cgroup")
MIB, GIB = 1 << 20, 1 << 30
NO_LIMIT_V1 = 0x7FFFFFFFFFFFF000
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
HALF_V1 = {"cpu.cfs_quota_us": 50_000, "cpu.cfs_period_us": 100_000}


class Tree:
    """A made-up /proc/self with the cgroup mounts it names, under a folder with a blank in its name."""

    def __init__(self, base: Path) -> None:
        self.base = base / "cgroup root"
        self.proc = base / "proc"
        self.proc.mkdir()
        self.own, self.mounts = "", "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"

    def belongs(self, *lines: str) -> Tree:
        self.own = "".join(f"{line}\n" for line in lines)
        return self

    def mount(self, place: str, kind: str, options: str = "rw", root: str = "/") -> Tree:
        point = str(self.base / place).replace(" ", "\\040")
        self.mounts += f"30 22 0:28 {root} {point} rw,nosuid - {kind} cgroup {options}\n"
        return self

    def files(self, place: str, files: Mapping[str, object]) -> Tree:
        folder = self.base / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
        return self

    def read(self) -> tuple[int, int]:
        """Cores, MiB."""
        found = allowance(self.written())
        assert found.free_bytes <= found.memory_bytes
        assert usable_cores(self.proc) == found.cores
        return found.cores, found.memory_bytes // MIB

    def written(self) -> Path:
        (self.proc / "cgroup").write_text(self.own)
        (self.proc / "mountinfo").write_text(self.mounts)
        return self.proc


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_no_container_leaves_the_whole_machine(tree: Tree) -> None:
    tree.belongs("0::/user.slice").mount("", "cgroup2").files(
        "user.slice", {"memory.max": "max", "cpu.max": "max 100000"}
    )
    found = allowance(tree.written())
    assert (found.cores, found.memory_bytes) == (CORES, psutil.virtual_memory().total)
    assert not [line for line in found.limits if "affinity" not in line]
    assert quota_periods(tree.proc) is None
    assert allowance(tree.base / "nowhere").cores == CORES, "no /proc: no Linux, no limit"


def test_version_1_as_docker_mounts_it_without_a_namespace(tree: Tree) -> None:
    for name, files in (("cpu,cpuacct", HALF_V1), ("memory", {"memory.limit_in_bytes": 2 * GIB})):
        tree.mount(name, "cgroup", f"rw,{name}", root="/docker/abc").files(name, files)
    tree.belongs("4:memory:/docker/abc", "3:cpu,cpuacct:/docker/abc", "1:name=systemd:/docker/abc")
    assert tree.read() == (1, 2048)
    cores, memory = allowance(tree.proc).limits
    assert "a CPU quota of 0.5 cores" in cores
    assert "memory.limit_in_bytes" in memory


def test_version_2_in_a_namespace_of_its_own(tree: Tree) -> None:
    tree.belongs("0::/").mount("", "cgroup2").files("", {"memory.max": 2 * GIB, "cpu.max": "50000 100000"})
    assert tree.read() == (1, 2048)


def test_every_ancestor_binds_and_the_narrowest_counts(tree: Tree) -> None:
    tree.belongs("0::/kubepods/pod1/job").mount("", "cgroup2")
    tree.files("kubepods", {"memory.max": 8 * GIB, "cpu.max": "400000 100000"})
    tree.files("kubepods/pod1", {"memory.max": 1 * GIB, "cpu.max": "30000 100000"})
    tree.files("kubepods/pod1/job", {"memory.max": "max", "cpu.max": "max 100000"})
    assert tree.read() == (1, 1024)
    assert all("pod1" in line for line in allowance(tree.proc).limits)


def test_controllers_of_both_versions_side_by_side(tree: Tree) -> None:
    tree.belongs("4:memory:/job", "3:cpu:/", "0::/job")
    tree.mount("memory", "cgroup", "rw,memory").files("memory/job", {"memory.limit_in_bytes": 3 * GIB})
    tree.mount("cpu", "cgroup", "rw,cpu").files("cpu", {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100_000})
    tree.mount("unified", "cgroup2").files("unified/job", {"cpu.max": "80000 100000"})
    assert tree.read() == (1, 3072)


@pytest.mark.parametrize(("path", "root"), [("/../..", "/"), ("/../..", "/../.."), ("/gone", "/"), ("/", "/..")])
def test_where_the_own_cgroup_is_not_shown_the_mounted_one_counts(tree: Tree, path: str, root: str) -> None:
    tree.belongs(f"0::{path}").mount("", "cgroup2", root=root)
    tree.files("", {"memory.max": 2 * GIB, "cpu.max": "50000 100000"})
    assert tree.read() == (1, 2048)


def test_a_mount_from_outside_the_namespace_is_searched_for_ourselves(tree: Tree) -> None:
    tree.belongs("0::/").mount("", "cgroup2", root="/../..")
    tree.files("pod/other", {"memory.max": 1 * GIB, "cgroup.procs": "1"})
    tree.files("pod/ours", {"memory.max": 2 * GIB, "cgroup.procs": f"7\n{os.getpid()}"})
    assert tree.read() == (CORES, 2048)


def test_the_limits_of_others_are_not_ours(tree: Tree) -> None:
    """A monitoring container sees its host's tree beside its own."""
    tree.belongs("0::/ours").mount("", "cgroup2").mount("host", "cgroup2", root="/../other")
    tree.files("ours", {"memory.max": 2 * GIB}).files("host", {"memory.max": 1 * GIB, "cpu.max": "1000 100000"})
    assert tree.read() == (CORES, 2048)


def test_version_1_tells_of_ancestors_that_are_not_shown(tree: Tree) -> None:
    tree.belongs("4:memory:/").mount("memory", "cgroup", "rw,memory")
    stat = f"cache 1\nhierarchical_memory_limit {2 * GIB}"
    tree.files("memory", {"memory.limit_in_bytes": NO_LIMIT_V1, "memory.stat": stat})
    assert tree.read() == (CORES, 2048)
    assert "a cgroup above" in allowance(tree.proc).limits[-1]


def test_above_memory_high_a_job_crawls_so_that_it_is_a_limit_too(tree: Tree) -> None:
    tree.belongs("0::/").mount("", "cgroup2").files("", {"memory.max": 4 * GIB, "memory.high": 3 * GIB})
    assert tree.read() == (CORES, 3072)


@pytest.mark.parametrize(
    ("used", "stat"),
    [
        ({"memory.max": GIB, "memory.current": 700 * MIB}, "anon 1\ninactive_file {0}\nactive_file {0}\nshmem {0}"),
        (
            {"memory.limit_in_bytes": GIB, "memory.usage_in_bytes": 700 * MIB},
            "inactive_file 0\ntotal_inactive_file {0}\ntotal_active_file {0}\ntotal_shmem {0}",
        ),
    ],
)
def test_free_is_what_the_limit_leaves_and_page_cache_counts_as_free(
    tree: Tree, used: Mapping[str, object], stat: str
) -> None:
    tree.belongs("0::/", "4:memory:/").mount("", "cgroup2").mount("", "cgroup", "rw,memory")
    tree.files("", {**used, "memory.stat": stat.format(100 * MIB)})
    assert allowance(tree.written()).free_bytes == (1024 - 700 + 200) * MIB


@pytest.mark.parametrize(("quota", "cores"), [(1_000, 1), (100_000, 1), (150_000, 2), (10_000_000, CORES)])
def test_a_part_of_a_core_counts_as_a_core(tree: Tree, quota: int, cores: int) -> None:
    tree.belongs("0::/").mount("", "cgroup2").files(
        "", {"cpu.max": f"{quota} 100000", "cpu.stat": "nr_periods 5\nnr_throttled 3"}
    )
    assert tree.read()[0] == min(cores, CORES)
    assert quota_periods(tree.proc) == (5, 3)


def test_a_limit_above_the_machine_is_none(tree: Tree) -> None:
    tree.belongs("0::/").mount("", "cgroup2").files("", {"memory.max": 1 << 50})
    assert allowance(tree.written()).memory_bytes == psutil.virtual_memory().total


class Container:
    """Real cgroups (version 1) of 2 GiB and half a core; `run` runs a command in them."""

    def __init__(self, name: str) -> None:
        self.folders = [CGROUPS / "cpu" / name, CGROUPS / "memory" / name]
        for folder in self.folders:
            folder.mkdir()
        for file, value in HALF_V1.items():
            (self.folders[0] / file).write_text(str(value))
        (self.folders[1] / "memory.limit_in_bytes").write_text(str(2 * GIB))

    def run(self, *words: str, cwd: Path, inner: str = "", before: str = "") -> str:
        """inner: a cgroup below to run in; before: put before the command."""
        joins = [f"mkdir -p {folder}/{inner} && echo $$ > {folder}/{inner}/cgroup.procs" for folder in self.folders]
        script = " && ".join([*joins, f'exec {before} "$@"'])
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TUNER_CACHE": str(cwd / "cache")}
        ran = subprocess.run(
            ["sh", "-c", script, "sh", sys.executable, *words],
            cwd=cwd, env=env, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def close(self) -> None:
        for folder in self.folders:
            for part in (*folder.glob("*/"), folder):
                part.rmdir()


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    try:
        made = Container(f"tuner-test-{uuid.uuid4().hex[:8]}")
    except OSError as error:
        pytest.skip(f"not run: no cgroup of version 1 can be made here ({error})")
    yield made
    made.close()


def test_doctor_and_the_memory_budget_keep_to_a_real_container(container: Container, tmp_path: Path) -> None:
    told = json.loads(container.run("-m", "tuner.cli", "doctor", "--json", cwd=tmp_path))
    device = DeviceInfo.model_validate(told["device"])
    assert (device.cpu_count, device.host_bytes) == (1, 2 * GIB)
    assert told["environment"]["cpu_count"] == 1
    assert memory_budget(gpu_profile("cpu"), device) < 2 * GIB
    assert [word in line for word, line in zip(("quota", "memory.limit_in_bytes"), device.limits, strict=True)] == [
        True
    ] * 2


def test_a_probe_in_a_real_container_takes_a_thread_and_says_what_the_quota_took(
    container: Container, tmp_path: Path
) -> None:
    words = ["probe", "--workload", "tests.toys:Toy", "--seconds", "0.5", "--json"]
    (point,) = json.loads(container.run("-m", "tuner.cli", *words, cwd=tmp_path))["points"]
    assert point["environment"]["threads"] == point["environment"]["cpu_count"] == 1
    assert point["measurement"]["telemetry"]["cpu_throttled"] is not None


@pytest.mark.parametrize(("inner", "before"), [("", ""), ("below", ""), ("", "unshare -C"), ("below", "unshare -C")])
def test_a_real_container_is_seen_from_below_and_from_a_namespace(
    container: Container, tmp_path: Path, inner: str, before: str
) -> None:
    if before and subprocess.run([*before.split(), "true"], capture_output=True, check=False).returncode:
        pytest.skip("not run: no cgroup namespace can be made here")
    ask = "from tuner.contract.allowance import *; a = allowance(); print(a.cores, a.memory_bytes, a.free_bytes)"
    cores, memory, free = map(int, container.run("-c", ask, cwd=tmp_path, inner=inner, before=before).split())
    assert (cores, memory) == (1, 2 * GIB)
    assert 0 < free <= 2 * GIB

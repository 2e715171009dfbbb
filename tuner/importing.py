"""Where every process of ours looks for modules. The folder a command is typed in comes last, and is looked at only for
code that somebody named: what lies there (random.py, torch.py, workloads/) must not become ours.

It imports nothing that Python's own start has not imported: it comes before the path is in order.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

PACKAGE = os.path.dirname(os.path.realpath(__file__))
PLACE = os.path.dirname(PACKAGE)
NAMED_BEFORE, LENT = "TUNER_PATH_LAST", "TUNER_PATH_LENT"
"""Environment of a worker: the current folder, where PYTHONPATH had named it; our own place, where it had not."""


def current_folder_last() -> None:
    """Where PYTHONPATH has put the current folder in front, it comes last from now on."""
    here = _here()
    sys.path.sort(key=lambda place: _same(place, here))


def worker_paths(base: Mapping[str, str]) -> dict[str, str]:
    """The variables of `base` that decide where a worker looks: without the current folder, which comes last there
    (`named_before_last`), and with a checkout of ours, which is on the path of its parent process alone."""
    here = _here()
    given = base["PYTHONPATH"].split(os.pathsep) if base.get("PYTHONPATH") else []
    kept = [place for place in given if not _same(place, here)]
    lent = [] if PLACE in (*site.getsitepackages(), *kept) else [PLACE]
    return {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([*kept, *lent]),
        NAMED_BEFORE: here if len(kept) < len(given) else "",
        LENT: os.pathsep.join(lent),
    }


def named_before_last() -> None:
    """In a worker: what PYTHONPATH had named of the current folder is found there, after all else."""
    if place := os.environ.get(NAMED_BEFORE):
        sys.path.append(place)


def look_here_last() -> None:
    """The current folder is importable from now on, after all else. A checkout of ours is not, unless PYTHONPATH names
    it: its own folders (tests, benchmarks) would hide a user's, and where this package lies is known."""
    here, lent = _here(), bool(os.environ.get(LENT))
    sys.path[:] = [place for place in sys.path if not (_same(place, here) or (lent and _is_checkout(place)))] + [here]


def shipped(folder: str) -> str:
    """Where `workloads` or `studies` lies: below this package where it is installed, beside it in a checkout."""
    return os.path.join(PLACE if _is_checkout(PLACE) else PACKAGE, folder)


def hidden(module: str) -> str:
    """Which other module is found in place of what lies in the current folder under the first name of `module`; empty
    where nothing is hidden."""
    top = module.partition(":")[0].partition(".")[0]
    mine, found = PathFinder.find_spec(top, [_here()]), _spec(top)
    if mine is None or found is None or set(_places(mine)) & set(_places(found)):
        return ""
    other = next((place for place in _places(found) if os.path.isabs(place)), "a module of Python itself")
    return f"{_places(mine)[0]} is hidden by {other}: give yours another name"


def _spec(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except (ImportError, ValueError):  # ValueError: a module that was made by hand has no spec
        return None


def _places(spec: ModuleSpec) -> list[str]:
    """Where a module lies; all folders of one that is nothing but folders."""
    return [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])


def _is_checkout(place: str) -> bool:
    """Is it a folder with our sources, and not one where packages are installed?"""
    return all(os.path.isfile(os.path.join(place, file)) for file in ("pyproject.toml", "tuner/importing.py"))


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _same(place: str, folder: str) -> bool:
    return bool(folder) and os.path.realpath(place or os.curdir) == os.path.realpath(folder)

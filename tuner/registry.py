"""Workload names: a registered one (entry point group `tuner.workloads`) or `module:Class`.

The parent process only lists and checks names; `load` imports the user's code and belongs to worker processes.
A registered name whose package is not installed, e.g. in a plain checkout, is simply not known.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import traceback
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from tuner import importing
from tuner.contract.errors import WorkloadError

GROUP = "tuner.workloads"
REQUIRED = {
    "info": "info(self) -> WorkloadInfo",
    "model": "model(self) -> nn.Module",
    "dataset": 'dataset(self, split: "train" | "valid") -> Dataset',
    "loss": "loss(self, model, batch) -> Terms",
    "evaluate": "evaluate(self, model, batches) -> Mapping[str, float]",
}
"""Methods every workload has, with what they look like."""

_MODULE_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,127}:[A-Za-z_][A-Za-z0-9_.]{0,127}")


class WorkloadImportError(WorkloadError):
    """The user's module failed; `detail` keeps their own traceback, without our frames."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


def known_workloads() -> list[EntryPoint]:
    """The registered workloads, by name; `.value` is `module:Class`, `.dist` the package. Imports none of them."""
    return sorted(entry_points(group=GROUP), key=lambda entry: entry.name)


def check_name(name: str) -> None:
    """Raises WorkloadError when `name` is neither registered nor of the form `module:Class`. Imports nothing."""
    if ":" in name:
        if not _MODULE_CLASS.fullmatch(name):
            raise WorkloadError(
                f"--workload: {name[:300]!r} is not of the form `module:Class` (at most 128 letters each), "
                "e.g. mypackage.jobs:MyJob"
            )
        return
    known = [entry.name for entry in known_workloads()]
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listing = ", ".join(known) or "none installed"
    raise WorkloadError(
        f"--workload: unknown workload {name[:300]!r}{hint}; known: {listing}. Your own is given as `module:Class`"
    )


def target(name: str) -> str:
    """The `module:Class` behind `name`; `name` itself where it is not registered.

    Shipped ones were once registered, and are written down in older files, as `workloads.gpt2.workload:Gpt2`.
    """
    known = known_workloads()
    value = next((entry.value for entry in known if entry.name == name), name)
    renamed = f"tuner.{value}"
    return renamed if any(entry.value == renamed for entry in known) else value


def load(name: str) -> type[Any]:
    """Import the workload class called `name`; worker side only, as this runs the user's code.

    For `module:Class` the current directory is importable, after all that is installed; a registered one comes from
    an installed package, and nothing that lies in the current directory can take its place. Raises WorkloadError for
    an unknown name, WorkloadImportError (with the user's traceback) when the import fails or what it names is no
    workload.
    """
    check_name(name)
    if ":" in name:
        importing.look_here_last()
    module_name, _, attribute = (name if ":" in name else target(name)).partition(":")
    try:
        found: Any = _module(module_name, target(name).partition(":")[0])
    except (Exception, SystemExit) as error:
        summary = f"workload {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        raise WorkloadImportError(summary + _hidden(name), _user_traceback(error)) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            has_none = f"workload {name!r}: {module_name} has no {attribute}{_classes_of(found)}"
            raise WorkloadImportError(has_none + _hidden(name))
        found = getattr(found, part)
    return _checked(name, found)


def _module(name: str, renamed: str) -> ModuleType:
    """The module of that name, or where there is none, what a shipped one that was called so is called now."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if renamed == name or not f"{name}.".startswith(f"{error.name}."):
            raise
        return importlib.import_module(renamed)


def _hidden(name: str) -> str:
    why = importing.hidden(name) if ":" in name else ""
    return f"; {why}" if why else ""


def _checked(name: str, found: Any) -> type[Any]:
    if not inspect.isclass(found):
        kind = type(found).__name__
        raise WorkloadImportError(f"workload {name!r}: a class is expected, but this is a {kind}")
    missing = [look for method, look in REQUIRED.items() if not callable(getattr(found, method, None))]
    if missing:
        listing = "; ".join(missing)
        raise WorkloadImportError(f"workload {name!r}: class {found.__name__} lacks what every workload has: {listing}")
    return found


def _classes_of(module: Any) -> str:
    """The classes this module defines itself."""
    here = getattr(module, "__name__", "")
    classes = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == here]
    public = [name for name in classes if not name.startswith("_")]
    return f"; classes there: {', '.join(public[:12])}" if public else ""


def _user_traceback(error: BaseException) -> str:
    """The traceback from the user's first frame on: the import machinery and this file are left out."""
    stack = error.__traceback__
    ours = {__file__, importlib.__file__}
    while stack is not None and (
        stack.tb_frame.f_code.co_filename in ours or "importlib" in stack.tb_frame.f_code.co_filename
    ):
        stack = stack.tb_next
    return "".join(traceback.format_exception(type(error), error, stack))

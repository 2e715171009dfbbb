"""Exceptions -> outcomes: what happened to a probe, in one word and one line, with the memory it held let go."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator

import torch

from tuner.contract.errors import ConfigError, TunerError, WorkloadError
from tuner.contract.measurement import Outcome

DETAIL_CHARS = 6000
_DEVICE_OOM = (
    "cuda out of memory",
    "_status_alloc_failed",
    "cuda error: out of mem",
    "cuda driver error: out of mem",
)
_HOST_OOM = (
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "std::bad_alloc",
    "cannot allocate memory",
    "unable to allocate",
)
_COMPILE_MODULES = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")
_UNSUPPORTED = ("not supported", "not implemented for", "unsupported", "no kernel image is available")


class Unsupported(Exception):
    """This machine, torch build, or workload cannot do what the configuration asks."""


class Diverged(Exception):
    """The loss is not finite, or has exploded."""


class Disturbed(Exception):
    """What was measured is no measurement: something outside the job held it up."""


class LoaderFailed(Exception):
    """The data loader raised; its own exception is the cause."""


def classify(error: BaseException) -> tuple[Outcome, str]:
    """The outcome an exception means, and one line for people. Causes and contexts are looked through."""
    chain = list(_chain(error))
    for outcome, found in (
        (Outcome.OOM_DEVICE, next(filter(_is_device_oom, chain), None)),
        (Outcome.OOM_HOST, next(filter(_is_host_oom, chain), None)),
        (Outcome.CONTENDED, _first(chain, Disturbed)),
        (Outcome.UNSUPPORTED, _first(chain, Unsupported)),
        (Outcome.DIVERGED, _first(chain, Diverged)),
        (Outcome.BAD_INPUT, _first(chain, (WorkloadError, ConfigError))),
        (Outcome.LOADER_ERROR, _first(chain, LoaderFailed) or next(filter(_is_loader, chain), None)),
        (Outcome.CRASHED, _first(chain, TunerError)),
        (Outcome.COMPILE_ERROR, next(filter(_is_compile, chain), None)),
        (Outcome.UNSUPPORTED, next(filter(_is_unsupported, chain), None)),
    ):
        if found is not None:
            return outcome, one_line(found)
    return Outcome.CRASHED, one_line(error)


def one_line(error: BaseException) -> str:
    """`Type: first words`, without addresses of a C++ stack; a TunerError speaks for itself."""
    source = _source(error)
    lines = [line.strip() for line in str(source).splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if "Error: " in line), "") if _wrapped_by_worker(lines) else ""
    text = text or (lines[0] if lines else "")
    if isinstance(source, TunerError):
        text = text.removeprefix(f"{type(source).__module__}.{type(source).__qualname__}: ")
    elif not isinstance(source, Unsupported | Diverged | Disturbed):
        text = text if text.startswith(type(source).__name__) else f"{type(source).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."


def _source(error: BaseException) -> BaseException:
    """What a loader failed of, where it is a loader that failed."""
    return error.__cause__ if isinstance(error, LoaderFailed) and error.__cause__ else error


def details(error: BaseException) -> str:
    """The end of the traceback, for people who look closer. Empty for errors whose message says it all."""
    if isinstance(_source(error), TunerError | Unsupported | Disturbed):
        return ""
    return "".join(traceback.format_exception(error))[-DETAIL_CHARS:]


def release(error: BaseException) -> None:
    """Let go of what an exception holds: its frames keep tensors alive, and with them the memory it died of."""
    for item in list(_chain(error)):
        if item.__traceback__ is not None:
            traceback.clear_frames(item.__traceback__)
            item.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        item = waiting.pop(0)
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        waiting += [item.__cause__, item.__context__, getattr(item, "inner_exception", None)]


def _first(
    chain: list[BaseException], kind: type[BaseException] | tuple[type[BaseException], ...]
) -> BaseException | None:
    return next((item for item in chain if isinstance(item, kind)), None)


def _is_device_oom(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(mark in text for mark in _DEVICE_OOM)


def _is_host_oom(error: BaseException) -> bool:
    text = str(error).lower()
    if isinstance(error, Unsupported):  # it may name a refused allocation as its reason
        return False
    if isinstance(error, MemoryError) or any(mark in text for mark in _HOST_OOM):
        return True
    return isinstance(error, OSError) and error.errno == 12


def _is_loader(error: BaseException) -> bool:
    return "DataLoader worker" in str(error)


def _is_compile(error: BaseException) -> bool:
    return type(error).__module__.startswith(_COMPILE_MODULES)


def _is_unsupported(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError | RuntimeError) and any(mark in text for mark in _UNSUPPORTED)


def _wrapped_by_worker(lines: list[str]) -> bool:
    return bool(lines) and lines[0].startswith("Caught ") and "DataLoader worker" in lines[0]

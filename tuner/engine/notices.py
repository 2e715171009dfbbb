"""What a workload's author should read, said once per request, from places in the loop that know no emitter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tuner.contract.probe import NoticeEvent
from tuner.engine.hooks import Emit

_say: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)


@contextmanager
def told(emit: Emit) -> Iterator[None]:
    """Within: what `warn_once` is given goes to `emit`, each text once."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            emit(NoticeEvent(level="warning", text=text))

    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def warn_once(text: str) -> None:
    """Tell whoever runs this request; nobody where none is being answered."""
    if (say := _say.get()) is not None:
        say(text)

"""Commands that we print for people to type: complete, quoted for a shell, and made in this one place.

They are made from the words of the command that prints them: whatever was typed is typed again, unless it is changed.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import MISSING, fields
from typing import Any

ONCE = frozenset({"fresh", "accept_new_data"})
"""Options that are said for one start: typed again, they would throw away what it has done."""
OPTION = "option"
"""Key of a field's metadata: its option, where that has another name than the field."""


def typed(command: str, *arguments: object, **options: object) -> str:
    """`tuner COMMAND ARGUMENT --an-option VALUE`. None and () are left out, True is `--option`, False `--no-option`,
    and a sequence repeats its option. A store's password is never printed."""
    if options.get("storage") is not None:
        options["storage"] = _store(str(options["storage"]))
    named = [str(argument) for argument in arguments]
    words = [word for name, value in options.items() for word in _words(name.replace("_", "-"), value)]
    ordered = [*words, "--", *named] if any(name.startswith("-") for name in named) else [*named, *words]
    return shlex.join(["tuner", *command.split(), *ordered])


def retyped(command: str, *given: Any, **changes: object) -> str:
    """The command that was typed as the dataclasses `given`, with `changes` by the name of their option."""
    return typed(command, **{**options_of(*given), **changes})


def first_study(storage: str | None) -> str:
    """What somebody who has nothing yet may type."""
    return typed("optimize", workload="latent_cfg", gpu="auto", storage=storage)


def options_of(*given: Any) -> dict[str, object]:
    """What differs from its default in the words of a command, by the name of its option."""
    found: dict[str, object] = {}
    for words in given:
        for field in fields(words):
            name, value = field.metadata.get(OPTION, field.name), getattr(words, field.name)
            if name and name not in ONCE and (field.default is MISSING or value != field.default):
                found[name] = value
    return found


def from_anywhere(command: str) -> str:
    """The same for another day and folder: what is relative in it, and a job's own modules, lie in the current one."""
    return f"cd {shlex.quote(os.getcwd())} && {command}"


def _words(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple | list):
        return [word for item in value for word in _words(name, item)]
    text = str(value)
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def _store(url: str) -> str | None:
    """Without its password: one that the environment holds is found there again, another one must be written in."""
    from tuner.store.engine import as_typed

    masked = as_typed(url)
    return None if masked != url and url == os.environ.get("TUNER_STORAGE") else masked

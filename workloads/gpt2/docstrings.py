"""The default texts: docstrings of Python's standard library, labelled with six facts of the function below them.

A text is `name(parameters)` and the docstring; the labels are read off the body by `ast`, which the text does not
show. Only modules that every installation of one Python version has are read (no tkinter, tests or tools), so the rows
are equal on every machine. Whole modules are held out, and a docstring that occurs twice counts once.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tuner.contract.errors import WorkloadError

from .rows import Parts, Report, Rows, halves, hashed, same_text

SKIPPED = {
    "__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "site-packages",
    "test", "tests", "tkinter", "turtledemo", "turtle.py",
}  # fmt: skip
"""Folders and files that are packaged apart, are tests, or are no part of the library."""
TRAIN_ROWS, VALID_ROWS = 3_800, 600
"""Somewhat less than Python 3.11 has; rows beyond are left out, so that the numbers are known beforehand."""
SPARE_ROWS = 120
"""Candidates for validation beyond those wanted: some will be found in training."""
LONG_PARAGRAPH = 30
"""Characters."""
LEAST_ROWS = 1_000
SIZE_BYTES = 4 << 20


class Docstrings:
    """Functions and methods of the running Python's library that have a docstring."""

    remarks: tuple[str, ...] = ()

    def train_count(self) -> int:
        return TRAIN_ROWS

    def size_bytes(self) -> int:
        return SIZE_BYTES

    def digest(self) -> str:
        """Names and sizes of the files read: a hundredth of the time their content would take."""
        listed = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for root, path in _files())
        return hashlib.sha256(f"{sys.version_info[:3]}\n{listed}".encode()).hexdigest()

    def load(self, report: Report) -> tuple[Rows, Parts]:
        rows, modules = Rows(label_names=tuple(FACTS)), list(_files())
        seen: set[str] = set()
        for number, (root, path) in enumerate(modules):
            if number % 20 == 0:
                report(number, len(modules), "reading docstrings")
            module = path.relative_to(root).as_posix()
            for text, docstring, labels in _functions(path.read_bytes()):
                if (key := same_text(docstring)) not in seen:
                    seen.add(key)
                    rows.add(text, labels, group=module)
        if len(rows.texts) < LEAST_ROWS:
            raise WorkloadError(
                f"the default data are the docstrings of Python's standard library, but only {len(rows.texts)} were"
                f" found in {_root()} (is it zipped or stripped?); give your own texts: --data FILE"
            )
        return rows, _split(rows)


def _split(rows: Rows) -> Parts:
    """Modules in the order of their hash: the first for validation, the others for training, up to the wanted numbers.

    Modules copy from each other: a validation text that shares a paragraph with a training text is left out."""
    by_hash = sorted(range(len(rows.texts)), key=lambda index: hashed(rows.groups[index]))
    first, others = by_hash[: VALID_ROWS + SPARE_ROWS], by_hash[VALID_ROWS + SPARE_ROWS :]
    last = rows.groups[first[-1]]
    train = sorted(index for index in others if rows.groups[index] != last)[:TRAIN_ROWS]
    known = {paragraph for index in train for paragraph in _paragraphs(rows.texts[index])}
    fresh = [index for index in first if known.isdisjoint(_paragraphs(rows.texts[index]))]
    valid = sorted(fresh[:VALID_ROWS])
    return Parts(train, valid, halves([rows.groups[index] for index in valid]), len(first) - len(fresh))


def _paragraphs(text: str) -> Iterator[str]:
    """The docstring's paragraphs of more than a few words."""
    parts = (same_text(part) for part in text.partition("\n")[2].split("\n\n"))
    return (part for part in parts if len(part) >= LONG_PARAGRAPH)


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files() -> Iterator[tuple[Path, Path]]:
    """(root, file), in an order that is the same everywhere."""
    root = _root()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(files):
            if name.endswith(".py") and name not in SKIPPED and not name.startswith("_sysconfigdata"):
                yield root, Path(folder) / name


def _functions(source: bytes) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(text, docstring, labels) of each documented function; none for a file this Python cannot parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library file escapes wrongly is not ours to tell
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and docstring.strip():
                yield _text(node, docstring), docstring, _labels(node)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below `node`, in their order; expressions, most of a tree, hold none and are passed by."""
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        parts = getattr(node, name, None)
        for part in parts if isinstance(parts, list) else ():
            yield part
            yield from _statements(part)


def _text(node: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str) -> str:
    names = ", ".join(argument.arg for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
    return f"{node.name}({names})\n{docstring}"


def _labels(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, ...]:
    body = list(_own(node))
    return tuple(int(any(fact(part) for part in body)) for fact in FACTS.values())


def _own(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """Everything of the body but what lies in functions and classes defined in it."""
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        part = waiting.pop()
        if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield part
            waiting.extend(ast.iter_child_nodes(part))


def _returns_value(part: ast.AST) -> bool:
    return isinstance(part, ast.Return) and not (
        part.value is None or (isinstance(part.value, ast.Constant) and part.value.value is None)
    )


def _returns_truth(part: ast.AST) -> bool:
    """True, False, a comparison, a negation, or a call that can only give one of the two."""
    value = part.value if isinstance(part, ast.Return) else None
    if isinstance(value, ast.Constant):
        return isinstance(value.value, bool)
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in {"isinstance", "issubclass", "bool", "any", "all"}
    return isinstance(value, ast.Compare) or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not))


def _stores_attribute(part: ast.AST) -> bool:
    return isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)


def _loops(part: ast.AST) -> bool:
    return isinstance(part, ast.For | ast.While | ast.AsyncFor | ast.comprehension)


def _raises(part: ast.AST) -> bool:
    return isinstance(part, ast.Raise)


def _names_a_value(part: ast.AST) -> bool:
    return isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)


FACTS: dict[str, Callable[[ast.AST], bool]] = {
    "returns_value": _returns_value,
    "returns_truth": _returns_truth,
    "stores_attribute": _stores_attribute,
    "loops": _loops,
    "raises": _raises,
    "names_a_value": _names_a_value,
}
"""Label -> does this part of a body make it true?"""

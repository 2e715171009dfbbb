"""The docs are true: commands and options they name exist, the README's tree is the tree, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "studies" / "README.md"]
ROOMS = ("tuner", "workloads", "benchmarks")


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"```[a-z]*\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S)


def tuner_commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCS:
        for block in code_blocks(path):
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [
                (path.name, line.strip().removeprefix("$ "))
                for line in lines
                if line.strip().removeprefix("$ ").startswith("tuner ")
            ]
    return found


WITH_PARTS = ("cache",)
"""Commands that have commands of their own."""


@cache
def help_of(*command: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "tuner.cli", *command, "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, f"there is no command `tuner {' '.join(command)}`"
    return ran.stdout


@pytest.mark.parametrize(("source", "line"), tuner_commands())
def test_a_documented_command_and_its_options_exist(source: str, line: str) -> None:
    words = line.partition("#")[0].split()
    has_part = words[1] in WITH_PARTS and words[2:] and not words[2].startswith("-")
    text = help_of(*words[1 : 3 if has_part else 2])
    for option in (word for word in words[2:] if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option.partition('=')[0])}(?![\w-])", text), (
            f"{source}: {line}: {option}"
        )


def test_the_readme_shows_commands() -> None:
    assert len([line for source, line in tuner_commands() if source == "README.md"]) >= 3


def test_make_targets_named_in_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {
        name
        for path in DOCS
        for name in re.findall(r"(?:`|^)make ([a-z][a-z-]+)", path.read_text(encoding="utf-8"), flags=re.M)
    }
    assert {"optimize", "test"} <= named
    for name in named:
        assert re.search(rf"^{name}:", makefile, flags=re.M), f"make {name}"


def test_the_readme_tree_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "__init__.py" and "versions" not in path.parts:
                assert re.search(rf"\b{re.escape(path.name)}\b", readme), (
                    f"README's tree lacks {path.relative_to(ROOT)}"
                )


def test_the_readme_tree_names_no_file_that_is_gone() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for block in code_blocks(ROOT / "README.md") if "pyproject.toml" in block)
    known = {path.name for room in (*ROOMS, "tests", "studies", "docs") for path in (ROOT / room).rglob("*")}
    assert tree in readme
    for name in re.findall(r"\b[a-z_]+\.py\b", tree):
        assert name in known, f"README's tree names {name}, which does not exist"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"

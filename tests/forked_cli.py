"""The `tuner` command for tests, each in a process of its own that need not import the package again.

`python -m tests.forked_cli` has imported what the commands import, and forks for every line of JSON on its stdin:
{"words", "cwd", "env", "out", "err", "timeout_s"}. It answers with the exit code, or with null after the timeout.
Importing takes one to two seconds, which a test would otherwise pay for every command it types.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ASIDE = ("torch", "diffusers", "transformers")
"""What no command imports into its own process."""


class ForkedCli:
    """The process that forks; closed with the test session."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = {**env, "OPENBLAS_NUM_THREADS": "1"}
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.forked_cli"],
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], aside: Path, timeout_s: float) -> int:
        """Exit code; what it printed lies in `aside`/out and `aside`/err. Raises TimeoutExpired."""
        asked = {
            "words": [*words],
            "cwd": str(cwd),
            "env": {**env},
            "out": str(aside / "out"),
            "err": str(aside / "err"),
            "timeout_s": timeout_s,
        }
        try:
            code = self._answer(json.dumps(asked))
        except BaseException:  # the test's own timeout too: a reply that nobody read would answer the next command
            self._replace()
            raise
        if code is None:
            raise subprocess.TimeoutExpired(["tuner", *words], timeout_s, (aside / "out").read_bytes())
        return int(code)

    def _answer(self, line: str) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        code: int | None = json.loads(self._process.stdout.readline())
        return code

    def _replace(self) -> None:
        """End the process and the command it runs, and start another."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self._process.kill()
        self._process.communicate()
        self._process = self._start()

    def close(self) -> None:
        self._process.communicate(timeout=20)


def serve() -> None:
    import_commands()
    for line in sys.stdin:
        asked = json.loads(line)
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            become(asked)
            return
        sys.stdout.write(json.dumps(wait(child, asked["timeout_s"])) + "\n")
        sys.stdout.flush()


def import_commands() -> None:
    """All that the commands import when they are called."""
    import tuner.commands

    for name in ("tuner.cli", "tuner.probe.runner", "sqlalchemy.dialects.sqlite", "rich.live", "rich.table"):
        importlib.import_module(name)
    for module in pkgutil.iter_modules(tuner.commands.__path__, "tuner.commands."):
        importlib.import_module(module.name)
    assert not [name for name in ASIDE if name in sys.modules]


def wait(child: int, timeout_s: float) -> int | None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def become(asked: Mapping[str, Any]) -> None:
    """In the child: the command, from its own folder, environment and files to its exit code."""
    from tuner.cli import main

    os.setsid()
    for number, (path, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (asked["out"], os.O_WRONLY | os.O_CREAT), (asked["err"], os.O_WRONLY | os.O_CREAT))
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - as long as the process
    os.chdir(asked["cwd"])
    sys.path[0] = asked["cwd"]
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["tuner", *asked["words"]]
    main()


if __name__ == "__main__":
    serve()

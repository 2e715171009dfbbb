"""The first moment of a command: a signal to stop is noted from here on, while the commands are still imported."""

from __future__ import annotations

import sys

from tuner import stopping

LONG = ("optimize", "train")
"""Commands whose stop keeps something."""


def main() -> None:
    if next((word for word in sys.argv[1:] if not word.startswith("-")), "") in LONG:
        stopping.listen()
    from tuner.cli import main as run

    run()


if __name__ == "__main__":
    main()

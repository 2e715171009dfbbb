"""The first moment of a command: modules are looked for where they should be, and a signal to stop is noted, while the
commands are still imported."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # `python -m` has put the current folder there: nothing of ours is looked for in it

from tuner import importing

importing.current_folder_last()

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

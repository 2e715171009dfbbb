"""Every workload's fast way against the naive one: what it gains, and that both compute the same.

python -m benchmarks.naive            all of them
python -m benchmarks.naive gpt2       one of them

Each runs in a process of its own, so that none finds the other's imports, threads or memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

WORKLOADS = ("sd_kanji", "latent_cfg", "gpt2", "graph")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default: all")
    chosen: list[str] = parser.parse_args().workloads or list(WORKLOADS)
    unknown = [name for name in chosen if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}; known: {', '.join(WORKLOADS)}")
    failed = [name for name in chosen if not succeeded(name)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def succeeded(workload: str) -> bool:
    """Run one benchmark; what it says goes straight to the terminal."""
    module = f"benchmarks.naive_{workload}"
    print(f"== {module} ==\n", flush=True)
    code = subprocess.run([sys.executable, "-m", module], check=False).returncode
    print(flush=True)
    return code == 0


if __name__ == "__main__":
    main()

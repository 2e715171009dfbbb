"""A workload's module that cannot be imported."""

from __future__ import annotations


def _needs_a_library() -> None:
    raise ImportError("No module named 'speclib'; pip install speclib")


_needs_a_library()

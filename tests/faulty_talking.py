"""A workload module that prints without end while it is imported; see `test_log`."""

from __future__ import annotations

from tests.toys import Toy

for _number in range(100_000):
    print(f"imported {_number} {'.' * 60}")  # noqa: T201


class Talking(Toy):
    """A toy."""

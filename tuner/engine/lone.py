"""A step that took longer than all others together: something from outside, or the job's own?

The probe measures on, for as long as that step took: what is the job's own comes again, and then everything counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ALONE = 10.0
"""Such a step takes more than so many times what any other takes."""
LEAST_STEPS = 6
"""A stretch of fewer steps is no stretch without it."""


class LoneStep:
    """Of one measurement. measure_s: seconds of its first stretch; most_s: of a second one at most."""

    def __init__(self, measure_s: float, most_s: float) -> None:
        self.wanted_s = measure_s
        """Seconds that the present stretch is to have."""
        self._most_s = most_s
        self._seconds = 0.0
        self._since = 0

    @property
    def seen(self) -> bool:
        return self._seconds > 0

    def calls_for_more(self, step_s: Sequence[float], since: int) -> bool:
        """Asked at the end of a stretch, which began with step number `since`: must another one follow?"""
        if self.seen:
            return False
        *others, longest = sorted(step_s[since:])
        if not others or longest <= max(ALONE * others[-1], math.fsum(others)):
            return False
        self._seconds, self._since = longest, since
        self.wanted_s = max(self.wanted_s, min(longest, self._most_s))
        return True

    def begin(self, step_s: Sequence[float], since: int) -> int:
        """Where what counts begins: with the last stretch, or with the first, if such a step came again."""
        again = self.seen and ALONE * max(step_s[since:], default=0.0) >= self._seconds
        return self._since if again else since

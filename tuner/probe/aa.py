"""A/A: a runner that runs the baseline whatever is asked, so that a whole search meets nothing that differs.

An honest tuner then answers "no gain". It knows nothing of the search.
"""

from __future__ import annotations

from tuner.contract.config import RunConfig
from tuner.contract.probe import Listener, ProbeKind, ProbeReply, ProbeRequest, ProbeRunner

_MEASURED = frozenset(
    {
        ProbeKind.LOADER,
        ProbeKind.COMPUTE,
        ProbeKind.LR,
        ProbeKind.NOISE,
        ProbeKind.QUALITY,
        ProbeKind.INFERENCE,
        ProbeKind.END_TO_END,
    }
)
"""Kinds that measure the configuration; the others (equivalence, trace, describe ...) prove or predict, and pass as
they are."""


class BaselineRunner:
    """A ProbeRunner in front of another: every measuring point becomes the baseline, seed and lr stay as asked.

    Replies keep the request's id and the points' order, so the rows name what was asked for and not what ran.
    """

    def __init__(self, runner: ProbeRunner, baseline: RunConfig) -> None:
        self._runner = runner
        self._baseline = baseline

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        return self._runner.run(self._instead(request), listener)

    def close(self) -> None:
        self._runner.close()

    def _instead(self, request: ProbeRequest) -> ProbeRequest:
        if request.kind not in _MEASURED:
            return request
        points = tuple(self._as_baseline(point) for point in request.points)
        return request.model_copy(update={"points": points, "options": dict(self._baseline.options)})

    def _as_baseline(self, asked: RunConfig) -> RunConfig:
        """With the seed and the lr asked for, and the metric it is judged by: they change no speed."""
        optimizer = self._baseline.optimizer.model_copy(update={"lr": asked.optimizer.lr})
        return self._baseline.model_copy(update={"seed": asked.seed, "optimizer": optimizer, "quality": asked.quality})

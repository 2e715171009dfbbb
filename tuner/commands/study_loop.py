"""The loop of a search: ask the planner, run the probe, store the reply, tell Optuna. It holds no state of its own:
everything it decides comes from the stored rows, so it can be killed anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.commands.live import LiveProbes
from tuner.commands.setup import cache_dir
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeReply, ProbeRequest, ProbeRow
from tuner.contract.study import SamplerName, StudySpec
from tuner.contract.tuned import Decision
from tuner.report.dashboard import write_note
from tuner.search.planner import Ask, Done, forbidden, next_probe, sampler_request
from tuner.search.sampler import StagedSampler, make_sampler, proposed
from tuner.search.tracing import with_foresight
from tuner.store.trials import TrialBook, distributions, params

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.contract.probe import ProbeRunner
    from tuner.store.store import StudyStore


class StudyLoop:
    def __init__(self, spec: StudySpec, store: StudyStore, runner: ProbeRunner, url: str, console: Console) -> None:
        self._spec = spec
        self._store = store
        self._runner = runner
        self._console = console
        self._staged = StagedSampler()
        staged = spec.sampler is SamplerName.STAGED
        self._proposer = TrialBook(
            url, spec.name, sampler=self._staged if staged else make_sampler(spec.sampler, spec.seed)
        )
        self._book = self._proposer if staged else TrialBook(url, spec.name, sampler=self._staged)
        self._distributions = distributions(spec.space, spec.baseline)

    def run(self) -> None:
        """Until the planner is done."""
        rows = self._store.rows(self._spec.name)
        self._book.repair(rows, self._spec)
        with LiveProbes(self._console, self._spec) as live:
            live.earlier(rows)
            while True:
                plan = next_probe(self._spec, rows)
                if isinstance(plan, Done):
                    self._console.print(f"     {plan.reason}", style="dim")
                    return
                if isinstance(plan, Ask) and self._spec.sampler is SamplerName.STAGED:
                    self._planned(proposed(self._spec, rows), live)
                elif isinstance(plan, Ask):
                    self._proposed(rows, live)
                else:
                    self._planned(plan, live)
                rows = self._store.rows(self._spec.name)

    def _planned(self, request: ProbeRequest, live: LiveProbes) -> None:
        trial = None
        if request.kind is ProbeKind.END_TO_END:
            values = params(request.points[0], self._distributions)
            self._staged.propose(values)
            trial, _ = self._book.ask({name: self._distributions[name] for name in values})
        self._measure(request, trial, live)

    def _proposed(self, rows: Sequence[ProbeRow], live: LiveProbes) -> None:
        """One trial of Optuna's own sampler."""
        trial, values = self._proposer.ask(self._distributions)
        request = sampler_request(self._spec, rows, values)
        reason = forbidden(self._spec, rows, request)
        self._measure(request, trial, live, refused(request, reason) if reason else None)

    def _measure(
        self, request: ProbeRequest, trial: int | None, live: LiveProbes, known: ProbeReply | None = None
    ) -> None:
        request = request.model_copy(update={"cache_dir": str(cache_dir())})
        live.begin(request)
        reply = known or self._runner.run(request, live.listen)
        if trial is not None:
            reply = with_foresight(self._spec, self._store.rows(self._spec.name), request, reply)
        rows = self._store.add_reply(self._spec.name, request, reply, trial)
        if trial is not None:
            self._book.tell(trial, rows[0], self._spec)
        live.done(rows)

    def note(self, decision: Decision) -> None:
        """The decision in words, beside the study in the dashboard."""
        write_note(self._book.storage, self._spec, decision, self._store.rows(self._spec.name))


def refused(request: ProbeRequest, reason: str) -> ProbeReply:
    """The answer to a proposal that is known not to fit: stored and told, never run."""
    point = PointReply(outcome=Outcome.UNSUPPORTED, message=f"not run: {reason}")
    return ProbeReply(request_id=request.id, points=(point,), seconds=0.0)

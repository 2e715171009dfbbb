"""The loop of a search: ask the planner, run the probe, store the reply, tell Optuna. It holds no state of its own:
everything it decides comes from the stored rows, so it can be killed anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.commands.live import LiveProbes
from tuner.commands.setup import cache_dir
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Score
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.report.dashboard import write_note
from tuner.search.objective import VALUE_OF
from tuner.search.planner import Ask, Done, next_probe
from tuner.search.sampler import proposed
from tuner.search.score import score
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
        self._book = TrialBook(url, spec.name, measure=VALUE_OF[spec.objective])
        self._distributions = distributions(spec.space, spec.baseline)

    def run(self) -> None:
        """Until the planner is done."""
        rows = self._store.rows(self._spec.name)
        self._book.repair(rows, self._spec, self._scored)
        with LiveProbes(self._console, self._spec) as live:
            live.earlier(rows)
            while True:
                plan = next_probe(self._spec, rows)
                if isinstance(plan, Done):
                    self._console.print(f"     {plan.reason}", style="dim")
                    return
                self._measure(proposed(self._spec, rows) if isinstance(plan, Ask) else plan, live)
                rows = self._store.rows(self._spec.name)

    def _measure(self, request: ProbeRequest, live: LiveProbes) -> None:
        request = request.model_copy(update={"cache_dir": str(cache_dir())})
        trial = self._begun(request)
        live.begin(request)
        reply = self._runner.run(request, live.listen)
        if trial is not None:
            reply = with_foresight(self._spec, self._store.rows(self._spec.name), request, reply)
        rows = self._store.add_reply(self._spec.name, request, reply, trial)
        if trial is not None:
            self._book.tell(trial, rows[0], self._spec, self._scored(rows[0]))
        live.done(rows)

    def _begun(self, request: ProbeRequest) -> int | None:
        """The trial beside an end-to-end probe, with the parameters that are about to run, whoever proposed them."""
        if request.kind is not ProbeKind.END_TO_END:
            return None
        return self._book.ask(self._distributions, params(request.points[0], self._distributions)).number

    def _scored(self, row: ProbeRow) -> Score:
        return score(self._spec, self._store.rows(self._spec.name), row)

    def note(self, decision: Decision) -> None:
        """The decision in words, beside the study in the dashboard."""
        write_note(self._book.storage, self._spec, decision, self._store.rows(self._spec.name))

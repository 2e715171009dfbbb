"""Follows one probe: reads its events, knows its phase and how long it may stay silent, and makes up the reply."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pydantic import ValidationError

from tuner.contract.awake import AwakeClock
from tuner.contract.measurement import Outcome
from tuner.contract.probe import (
    EVENT,
    DescribeEvent,
    Event,
    Finished,
    Listener,
    NoticeEvent,
    PhaseEvent,
    PointReply,
    ProbeKind,
    ProbeLimits,
    ProbeReply,
    ProbeRequest,
    TrainResult,
)
from tuner.probe.verdict import Ending, judge

LONGEST_LINE = 64 << 20
FIXED_PHASES = frozenset({"start", "import", "teardown", "end"})
"""Phases that serve no point: the process itself."""
PATIENCE = {"build": 2.0, "compile": 10.0}
"""How many times the deadline a phase may be silent."""
TRAIN_SILENCE_S = 600.0
"""Production may be silent at least this long: an evaluation, a checkpoint on a slow disk."""
SAVING = frozenset({"checkpoint"})
"""Phases that a request to stop does not hurry."""
END_S = 10.0
"""Longest time from the last word to the end of the process."""

Clock = Callable[[], float]


class PhaseClock:
    """When which phase began, by arrival of its event, and how long the present one may be silent."""

    def __init__(self, limits: ProbeLimits, kind: ProbeKind, start_s: float, now: float) -> None:
        self._limits = limits
        self._kind = kind
        self._start_s = start_s
        self._marks = [(now, "start")]
        self.last_sign = now
        self.grace_s = math.inf
        """Longest silence since the process was asked to end."""

    @property
    def phase(self) -> str:
        return self._marks[-1][1]

    @property
    def began(self) -> float:
        return self._marks[0][0]

    def enter(self, phase: str, now: float) -> None:
        self._marks.append((now, phase))

    def silence_s(self) -> float:
        """Longest silence allowed in the present phase. The last one belongs to the process alone."""
        return min(self._usual_silence_s(), math.inf if self.phase in SAVING else self.grace_s)

    def _usual_silence_s(self) -> float:
        if self.phase == "end":
            return END_S
        deadline = self._limits.deadline_s
        if self._kind is ProbeKind.TRAIN:
            deadline = max(deadline, TRAIN_SILENCE_S)
        if self.phase in ("start", "import"):
            return max(deadline, self._start_s)
        if self.phase in ("warmup", "measure"):
            return deadline + self._limits.measure_s
        return deadline * PATIENCE.get(self.phase, 1.0)

    def fixed_s(self, since: float, until: float) -> float:
        """Seconds between two moments that fell into fixed phases."""
        ends = [*(at for at, _ in self._marks[1:]), until]
        spans = zip(self._marks, ends, strict=True)
        return sum(
            max(0.0, min(end, until) - max(begin, since)) for (begin, phase), end in spans if phase in FIXED_PHASES
        )


class Watch:
    """The tuner's view of one running probe."""

    def __init__(self, request: ProbeRequest, listener: Listener, start_s: float, now: Clock = time.monotonic) -> None:
        self._request = request
        self._listener = listener
        self._now = AwakeClock(now)
        self._clock = PhaseClock(request.limits, request.kind, start_s, self._now())
        self._buffer = b""
        self._answers: dict[int, tuple[PointReply, float]] = {}
        self._description: DescribeEvent | None = None
        self._train_result: TrainResult | None = None
        self._finished = False
        self._closed = False
        self.garbage = ""
        self._asked_by = ""
        listener(PhaseEvent(phase="start"))

    def tell(self, event: Event) -> None:
        """Tell the listener something the tuner itself has to say about this probe."""
        self._listener(event)

    def restart_clock(self) -> None:
        """The process has been started: its silence counts from now on."""
        self._now.begin()
        self._clock.last_sign = self._now()

    def expect_end(self, grace_s: float, asked_by: str) -> None:
        """The process was asked to end: from now on it may be silent for `grace_s`."""
        self._clock.grace_s = grace_s
        self._clock.last_sign = self._now()
        self._asked_by = asked_by

    def turn(self) -> None:
        """At every turn of waiting, before what has arrived is taken in: what the tuner itself slept through is no
        silence of the probe, and no cost of it."""
        self._now.turn()

    def close(self) -> None:
        """What arrives from now on was said under the knife, and does not count."""
        self._closed = True

    def feed(self, data: bytes) -> None:
        """Take in what arrived on the reply pipe, in whatever pieces."""
        if self._closed:
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LONGEST_LINE:
            lines.append(self._buffer)
            self._buffer = b""
        for line in lines:
            self._take_line(line)

    def end_of_input(self) -> None:
        """No more will come: a line without its end is no event."""
        if self._buffer and not self._closed:
            self._note_garbage(self._buffer)
        self._buffer = b""

    def seconds_left(self) -> float:
        """Until the present silence is too long."""
        return self._clock.last_sign + self._clock.silence_s() - self._now()

    def overdue(self) -> str:
        """Empty, or the line that says which phase was silent for too long."""
        if self.seconds_left() > 0:
            return ""
        if self._asked_by and self._clock.phase not in SAVING:
            return (
                f"did not end within {self._clock.silence_s():g} s of {self._asked_by} (stuck in phase "
                f"{self._clock.phase!r}); its process group was ended"
            )
        return (
            f"no sign of life for {self._clock.silence_s():g} s in phase {self._clock.phase!r}; "
            "its process group was ended"
        )

    def _take_line(self, line: bytes) -> None:
        try:
            event = EVENT.validate_json(line)
        except ValidationError:
            self._note_garbage(line)
            return
        if not (self._asked_by and isinstance(event, NoticeEvent)):  # what is stuck may still be talked about
            self._clock.last_sign = self._now()
        self._note(event)
        self._listener(event)

    def _note(self, event: Event) -> None:
        match event:
            case PhaseEvent():
                self._clock.enter(event.phase, self._clock.last_sign)
            case PointReply():
                if event.index < max(1, len(self._request.points)):
                    self._answers.setdefault(event.index, (event, self._clock.last_sign))
            case DescribeEvent():
                self._description = event
            case TrainResult():
                self._train_result = event
            case Finished():
                self._finished = True
                self._clock.enter("end", self._clock.last_sign)

    def _note_garbage(self, line: bytes) -> None:
        self.garbage = self.garbage or line[:120].decode(errors="replace")

    def reply(self, ending: Ending) -> ProbeReply:
        """One reply per point, whatever happened; a request without points gets one only when it failed."""
        now = self._now()
        self._fill_in(ending, now)
        fixed = self._clock.fixed_s(self._clock.began, now)
        return ProbeReply(
            request_id=self._request.id,
            points=self._with_seconds(fixed, now),
            seconds=now - self._clock.began,
            fixed_s=fixed,
            description=self._description,
            train_result=self._train_result,
        )

    def _fill_in(self, ending: Ending, now: float) -> None:
        """Answer what the process left open: the first open point is where it ended, the others were not reached."""
        if not self._request.points and (self._answers or self._succeeded()):
            return
        outcome, message = judge(ending)
        if self._train_result is not None:
            done = PointReply(outcome=Outcome.OK, measurement=self._train_result.measurement)
            self._answers.setdefault(0, (done, now))
        first = PointReply(outcome=outcome, message=message, detail=ending.log)
        for index in range(max(1, len(self._request.points))):
            if index in self._answers:
                continue
            self._answers[index] = (first.model_copy(update={"index": index}), now)
            if not ending.refused:
                missed = f"not reached: {message} at point {index}"
                first = PointReply(outcome=Outcome.NO_RESULT, message=missed)

    def _succeeded(self) -> bool:
        """Did a request without points do what it was for?"""
        match self._request.kind:
            case ProbeKind.DESCRIBE:
                return self._description is not None
            case ProbeKind.TRAIN:
                return self._train_result is not None
            case _:
                return self._finished

    def _with_seconds(self, fixed: float, now: float) -> tuple[PointReply, ...]:
        """Each point costs the time up to its answer, and an equal share of what the process itself cost."""
        share = fixed / max(1, len(self._answers))
        since = self._clock.began
        timed = []
        for reply, at in sorted(self._answers.values(), key=lambda pair: (pair[1], pair[0].index)):
            own = at - since - self._clock.fixed_s(since, at)
            timed.append(reply.model_copy(update={"seconds": own + share}))
            since = at
        if timed:
            rest = now - since - self._clock.fixed_s(since, now)
            timed[-1] = timed[-1].model_copy(update={"seconds": timed[-1].seconds + rest})
        return tuple(sorted(timed, key=lambda reply: reply.index))

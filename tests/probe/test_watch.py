"""The tuner's view of a probe, on a clock that the test turns."""

from __future__ import annotations

import pytest

from tuner.contract.config import OptimizerConfig, RunConfig
from tuner.contract.measurement import Measurement, MemoryPeak, Outcome
from tuner.contract.probe import (
    Event,
    Finished,
    NoticeEvent,
    PhaseEvent,
    PointReply,
    ProbeKind,
    ProbeLimits,
    ProbeRequest,
    TrainPlan,
    TrainResult,
)
from tuner.probe.verdict import Ending
from tuner.probe.watch import TRAIN_SILENCE_S, Watch

CONFIG = RunConfig(workload="x", micro_batch_size=8, optimizer=OptimizerConfig(lr=1e-3), horizon_samples=100)
CLEAN = Ending(status=0)
KILLED = Ending(status=9, log="the log's end")


class Turned:
    """A clock, and a watch on it."""

    def __init__(self, points: int = 1, kind: ProbeKind = ProbeKind.COMPUTE, deadline_s: float = 10.0) -> None:
        self.time = 100.0
        self.heard: list[Event] = []
        plan = TrainPlan(out_dir="out") if kind is ProbeKind.TRAIN else None
        limits = ProbeLimits(deadline_s=deadline_s, measure_s=3.0)
        request = ProbeRequest(id="r", kind=kind, workload="x", points=(CONFIG,) * points, limits=limits, train=plan)
        self.watch = Watch(request, self.hear, start_s=60.0, now=lambda: self.time)

    def hear(self, event: Event) -> None:
        self.heard.append(event)

    def at(self, seconds: float, *events: Event) -> None:
        """`seconds` after the start these events arrive."""
        self.time = 100.0 + seconds
        for event in events:
            self.watch.feed(event.model_dump_json().encode() + b"\n")


def ok(index: int) -> PointReply:
    return PointReply(index=index, outcome=Outcome.OK)


def test_events_arrive_in_any_pieces() -> None:
    turned = Turned()
    stream = b"".join(
        event.model_dump_json().encode() + b"\n" for event in (PhaseEvent(phase="build"), ok(0), Finished())
    )
    for i in range(len(stream)):
        turned.watch.feed(stream[i : i + 1])
    assert [event.event for event in turned.heard] == ["phase", "phase", "point", "finished"]
    assert turned.watch.reply(CLEAN).points[0].outcome is Outcome.OK


def test_what_is_no_event_is_kept_as_evidence_and_does_no_harm() -> None:
    turned = Turned()
    turned.watch.feed(b'not json\n{"event": "unheard of"}\n' + ok(0).model_dump_json().encode() + b"\n")
    assert turned.watch.garbage == "not json"
    assert turned.watch.reply(CLEAN).points[0].outcome is Outcome.OK


def test_half_a_line_is_no_event() -> None:
    turned = Turned()
    turned.watch.feed(ok(0).model_dump_json().encode())
    turned.watch.end_of_input()
    assert turned.watch.garbage.startswith('{"event"')
    assert turned.watch.reply(Ending(status=0, garbage=turned.watch.garbage)).points[0].outcome is Outcome.NO_RESULT


def test_an_answer_to_a_point_nobody_asked_for_is_dropped() -> None:
    turned = Turned(points=1)
    turned.at(1, ok(7), ok(0), PointReply(index=0, outcome=Outcome.CRASHED))
    reply = turned.watch.reply(CLEAN)
    assert [(point.index, point.outcome) for point in reply.points] == [(0, Outcome.OK)]


def test_the_fixed_cost_is_what_serves_no_point() -> None:
    turned = Turned(points=2)
    turned.at(1, PhaseEvent(phase="import"))
    turned.at(3, PhaseEvent(phase="build"))
    turned.at(4, PhaseEvent(phase="compile"))
    turned.at(10, PhaseEvent(phase="measure"))
    turned.at(12, ok(0), PhaseEvent(phase="measure"))
    turned.at(15, ok(1), PhaseEvent(phase="teardown"))
    turned.at(16, Finished())
    turned.at(18)
    reply = turned.watch.reply(CLEAN)
    assert reply.seconds == pytest.approx(18)
    assert reply.fixed_s == pytest.approx(3 + 1 + 2)
    assert [point.seconds for point in reply.points] == pytest.approx([9 + 3, 3 + 3])


def test_points_seconds_add_up_also_when_some_were_lost() -> None:
    turned = Turned(points=3)
    turned.at(2, PhaseEvent(phase="build"))
    turned.at(5, ok(1), PhaseEvent(phase="measure"))
    turned.at(9)
    reply = turned.watch.reply(KILLED)
    assert [point.outcome for point in reply.points] == [Outcome.CRASHED, Outcome.OK, Outcome.NO_RESULT]
    assert sum(point.seconds for point in reply.points) == pytest.approx(reply.seconds) == pytest.approx(9)
    assert reply.points[0].detail == "the log's end"
    assert reply.points[2].message.startswith("not reached: killed by signal 9")


@pytest.mark.parametrize(
    ("phase", "silence_s"),
    [
        ("import", 60),
        ("build", 20),
        ("compile", 100),
        ("warmup", 13),
        ("measure", 13),
        ("evaluate", 10),
        ("teardown", 10),
    ],
)
def test_every_phase_has_its_own_patience(phase: str, silence_s: float) -> None:
    turned = Turned(deadline_s=10.0)
    turned.at(5, PhaseEvent(phase=phase))
    turned.at(5 + silence_s - 0.1)
    assert not turned.watch.overdue()
    turned.at(5 + silence_s + 0.1)
    assert turned.watch.overdue() == (
        f"no sign of life for {silence_s:g} s in phase {phase!r}; its process group was ended"
    )


def test_any_event_is_a_sign_of_life() -> None:
    turned = Turned(deadline_s=10.0)
    turned.at(0, PhaseEvent(phase="evaluate"))
    for second in range(5, 100, 5):
        turned.at(second, NoticeEvent(text="still here"))
    assert turned.watch.seconds_left() == pytest.approx(10)


def test_what_the_tuner_itself_slept_through_is_neither_silence_nor_cost() -> None:
    """Ctrl-Z, a paused container, a lid that was closed: it wakes up, and finds what was said in the meantime."""
    turned = Turned(deadline_s=10.0)
    turned.at(1, PhaseEvent(phase="evaluate"))
    turned.watch.turn()
    turned.at(3601)
    turned.watch.turn()
    assert not turned.watch.overdue()
    turned.at(3602, ok(0))
    reply = turned.watch.reply(CLEAN)
    assert reply.seconds == pytest.approx(2)
    assert reply.points[0].seconds <= 2


def test_a_probe_that_is_silent_while_the_tuner_is_awake_is_overdue() -> None:
    turned = Turned(deadline_s=10.0)
    turned.at(0, PhaseEvent(phase="evaluate"))
    for second in range(12):
        assert bool(turned.watch.overdue()) == (second >= 10)
        turned.at(second + 1)
        turned.watch.turn()


def test_production_may_be_silent_for_long() -> None:
    turned = Turned(kind=ProbeKind.TRAIN, deadline_s=10.0)
    turned.at(0, PhaseEvent(phase="checkpoint"))
    turned.at(TRAIN_SILENCE_S - 1)
    assert not turned.watch.overdue()


def test_after_the_last_word_a_process_has_ten_seconds() -> None:
    turned = Turned(deadline_s=300.0)
    turned.at(0, ok(0), Finished())
    turned.at(10.1)
    assert turned.watch.overdue()
    assert turned.watch.reply(Ending(status=9, timed_out="teardown")).points[0].outcome is Outcome.OK


def test_words_under_the_knife_do_not_count() -> None:
    turned = Turned()
    turned.watch.close()
    turned.at(1, PointReply(index=0, outcome=Outcome.CRASHED, message="interrupted by SIGTERM"))
    reply = turned.watch.reply(Ending(status=15, timed_out="no sign of life"))
    assert reply.points[0].outcome is Outcome.TIMEOUT


def test_a_request_without_points_is_answered_only_when_it_failed() -> None:
    done = Turned(points=0, kind=ProbeKind.PREPARE)
    done.at(1, Finished())
    assert done.watch.reply(CLEAN).points == ()
    lost = Turned(points=0, kind=ProbeKind.PREPARE)
    assert [point.outcome for point in lost.watch.reply(KILLED).points] == [Outcome.CRASHED]
    mute = Turned(points=0, kind=ProbeKind.DESCRIBE)
    mute.at(1, Finished())
    assert [point.outcome for point in mute.watch.reply(CLEAN).points] == [Outcome.NO_RESULT]


def test_a_finished_production_run_answers_its_point() -> None:
    turned = Turned(kind=ProbeKind.TRAIN)
    measured = Measurement(samples_per_step=8, step_s=(0.1,), memory=MemoryPeak(process_bytes=1))
    result = TrainResult(samples=80, step=10, finished=True, reason="horizon", elapsed_s=1.0, measurement=measured)
    turned.at(1, result, Finished())
    reply = turned.watch.reply(CLEAN)
    assert reply.train_result == result
    assert reply.points[0].outcome is Outcome.OK
    assert reply.points[0].measurement == measured

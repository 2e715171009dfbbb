"""The soak's evaluation: the whole split where its time allows that, otherwise the peak of the whole by its growth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.engine_toys import CPU, QUICK, answer, make_request, read_events, replies, start_apart, toy_config
from tests.engine.soaked_toys import BATCHES, Choosy, Keeping
from tuner.contract.config import EmaConfig
from tuner.contract.measurement import EvaluationPart, MemoryPeak, Outcome
from tuner.contract.probe import NoticeEvent, PointReply, ProbeKind
from tuner.engine.growth import STRANDED, Heap, Part, whole
from tuner.engine.memory import PeakMemory
from tuner.search.selection import expected_peak

MIB = 1 << 20
NO_TIME = QUICK.model_copy(update={"evaluate_s": 1e-6})
HEAP = Heap(free=0, resolution=MIB, stranded=STRANDED["cpu"])


def soaked(name: str, folder: Path, *, limits: object = QUICK) -> MemoryPeak:
    """The peak of a soak in a process of its own."""
    request = make_request(ProbeKind.END_TO_END, toy_config(), soak=True, limits=limits)
    request = request.model_copy(update={"workload": f"tests.engine.soaked_toys:{name}"})
    (reply,) = [event for event in read_events(start_apart(request, folder)) if isinstance(event, PointReply)]
    assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"
    assert reply.measurement is not None
    return reply.measurement.memory


@pytest.fixture(scope="module")
def modest(tmp_path_factory: pytest.TempPathFactory) -> MemoryPeak:
    """The same job where nothing is kept."""
    return soaked("Keeping", tmp_path_factory.mktemp("modest"))


def part_of(peak: MemoryPeak) -> EvaluationPart:
    assert peak.evaluation is not None
    return peak.evaluation


@pytest.mark.parametrize(("name", "more"), [("Hungry", 80), ("Joining", 160)])
def test_an_evaluation_that_keeps_something_is_seen_whole_or_foretold(
    name: str, more: int, modest: MemoryPeak, tmp_path: Path
) -> None:
    hungry = soaked(name, tmp_path)
    assert part_of(hungry).words == "peak of the whole evaluation"
    assert (part_of(hungry).seen, part_of(hungry).batches) == (BATCHES, BATCHES)
    assert hungry.gate_bytes == hungry.process_bytes
    drawing = 50 * MIB  # what makes the modest one's peak: the curves, and the library that draws them
    assert hungry.process_bytes - modest.process_bytes > more * MIB - drawing

    foretold = soaked(name, tmp_path, limits=NO_TIME)
    assert part_of(foretold).words == f"extrapolated from 8 of {BATCHES} evaluation batches"
    assert foretold.process_bytes < hungry.process_bytes - more / 2 * MIB, "it was never that large itself"
    assert foretold.gate_bytes == pytest.approx(hungry.process_bytes, rel=0.05)
    bar = expected_peak([foretold], "cuda")
    assert bar.low <= hungry.process_bytes <= bar.high


def test_a_part_that_has_no_figures_fails_nothing() -> None:
    events = answer(ProbeKind.END_TO_END, toy_config(), workload=Choosy, soak=True, limits=NO_TIME)
    (reply,) = replies(events)
    assert reply.outcome is Outcome.OK
    told = [event.text for event in events if isinstance(event, NoticeEvent)]
    assert any(
        f"of 8 of {BATCHES} batches gave no figures: ValueError: only one class present" in text for text in told
    )


def test_the_weights_as_trained_are_evaluated_too_where_production_does_so() -> None:
    seen: list[str] = []

    class Counting(Keeping):
        def evaluate(self, model, batches):  # type: ignore[no-untyped-def]
            found = super().evaluate(model, batches)
            seen.append(f"{found['kept']:.0f}")
            return found

    both = toy_config(ema=EmaConfig(half_life_samples=200, evaluate_raw=True))
    answer(ProbeKind.END_TO_END, both, workload=Counting, soak=True)
    assert seen == [str(BATCHES)] * 2


def test_starting_anew_keeps_the_peak_until_then() -> None:
    memory = PeakMemory(CPU)
    held = torch.ones(96 * MIB, dtype=torch.uint8)
    del held
    memory.start_anew()
    assert memory.most_lately < memory.read().process_bytes - 64 * MIB


def part(seen: int, *, kept: float, end: float = 0.0, base: int = 300 * MIB) -> Part:
    """A part whose every batch leaves `kept` bytes behind and brings `end` bytes at the end."""
    in_use = tuple(round(100 * MIB + kept * number) for number in range(1, seen + 1))
    return Part(in_use, level=round(base + kept * seen), within=5 * MIB, after=round(end * seen))


def test_growth_is_affine_in_the_batches_and_so_is_what_is_made_of_it() -> None:
    found = whole(part(20, kept=4 * MIB, end=4 * MIB), part(10, kept=4 * MIB, end=4 * MIB), 200, HEAP)
    assert found.value == (300 + 200 * 4 + 200 * 4) * MIB
    assert found.low < found.value < found.high


def test_what_is_too_small_to_be_told_makes_no_wide_bar() -> None:
    """Sixteen bytes a batch are counted exactly; what is made of them is a few times that, however long the split."""
    noisy = Part(part(20, kept=16).in_use, level=300 * MIB + 4096 * 40, within=5 * MIB, after=4096 * 90)
    found = whole(noisy, part(10, kept=16), 100_000, HEAP)
    assert found.high - found.value < 20 * MIB
    assert found.value - 305 * MIB < 20 * MIB


def test_what_the_heap_does_not_know_of_is_seen_in_the_levels() -> None:
    flat = part(20, kept=0)
    held, before = (Part(flat.in_use[:n], level=(300 + 3 * n) * MIB, within=0, after=0) for n in (20, 10))
    found = whole(held, before, 100, HEAP)
    assert found.value == 600 * MIB
    assert found.low < found.value < found.high


def test_a_growth_that_begins_late_or_ends_early_is_in_the_bar() -> None:
    first = part(32, kept=MIB)
    late = Part((*(first.in_use[0],) * 14, *first.in_use[14:]), first.level, first.within, first.after)
    found = whole(late, part(16, kept=MIB), 100, HEAP)
    assert found.low < found.value
    assert found.value <= 405 * MIB <= found.high


def test_a_table_of_all_against_all_is_in_the_bar() -> None:
    large, small = (Part(part(n, kept=0).in_use, 300 * MIB, 0, n * n * MIB // 4) for n in (16, 8))
    found = whole(large, small, 64, HEAP)
    assert found.high >= (300 + 64 * 64 // 4) * MIB


def test_what_training_leaves_free_is_of_use_or_not() -> None:
    found = whole(part(20, kept=MIB), part(10, kept=MIB), 40, Heap(100 * MIB, MIB, STRANDED["cpu"]))
    assert found.value == (345 + 50) * MIB
    assert found.high - found.low >= 100 * MIB

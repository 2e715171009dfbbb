"""The page, opened in a real browser: answer first, pictures drawn, table works, nothing of a user's text is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.browser import browser, show, text_of, wait
from tests.store.rows import (
    BASELINE,
    environment,
    example_decision,
    example_rows,
    example_runs,
    example_spec,
)
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.space import Dropped, Knob
from tuner.contract.tuned import Decision, Side
from tuner.report.page import render, write_report
from tuner.report.words import reality

__all__ = ["browser"]

SPEC = example_spec()
ROWS = example_rows()
FIGURES = ("throughput", "memory", "gate", "loss", "seconds")
EVIL = '<img src=x onerror="window.pwned=1"></script><script>window.pwned=1</script>\'&{{7*7}}'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    return write_report(path, SPEC, ROWS, example_decision(), example_runs())


def drawn(browser: Any) -> None:
    wait(browser, lambda it: it.execute_script("return document.querySelectorAll('svg.main-svg').length") >= 5)


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_the_answer_comes_first(browser: Any, page: Path) -> None:
    show(browser, page)
    said = text_of(browser, "#answer")
    assert "16x1 fp32 eager w0 fused is 42.0 % (95 % interval 39.2 … 44.8 %) faster than the baseline" in said
    assert "16x1 needs half as many passes as 8x2." in said
    assert "measured on Example CPU" in text_of(browser, "#where")
    assert "Transfer: unverified" in said
    assert "190.0 (188.1 … 191.9)" in said
    assert "780 MiB" in said


def test_the_pictures_are_drawn(browser: Any, page: Path) -> None:
    show(browser, page)
    drawn(browser)
    for name in FIGURES:
        assert browser.find_elements("css selector", f"#figure-{name} svg.main-svg"), name
    points = browser.execute_script("return document.querySelectorAll('#figure-throughput .point').length")
    assert points >= 20
    assert browser.find_elements("css selector", "#figure-throughput .errorbar")
    assert "budget 1,000 MiB" in text_of(browser, "#figure-memory")
    assert complaints(browser) == []


def test_the_page_fits_a_phone(browser: Any, page: Path) -> None:
    size = browser.get_window_size()
    browser.set_window_size(420, 900)
    try:
        show(browser, page)
        drawn(browser)
        over = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.execute_script(over) <= 0
    finally:
        browser.set_window_size(size["width"], size["height"])


def visible(browser: Any) -> list[str]:
    rows = browser.find_elements("css selector", "#probes tbody tr")
    return [row.text for row in rows if row.is_displayed()]


def test_the_table_sorts_and_searches(browser: Any, page: Path) -> None:
    show(browser, page)
    assert len(visible(browser)) == len(ROWS)
    column = [button.text for button in browser.find_elements("css selector", "#probes thead button")]
    at = column.index("samples/s")
    button = browser.find_elements("css selector", "#probes thead button")[at]
    script = f"return [...document.querySelectorAll('#probes tbody tr')].map(r => r.cells[{at}].textContent)"
    for wanted in (False, True):
        button.click()
        rates = [float(text) for text in browser.execute_script(script) if text != "–"]
        assert rates == sorted(rates, reverse=wanted)
        assert len(rates) > 20
    browser.find_element("css selector", "#search").send_keys("allocate 64x1")
    (line,) = visible(browser)
    assert "oom_host" in line
    assert "can't allocate memory: 1200 MiB" in line


def test_production_is_held_against_its_promise(browser: Any, page: Path) -> None:
    show(browser, page)
    lines = text_of(browser, "#runs tbody").splitlines()
    assert lines[0].startswith("run-1 finished")
    assert "270.0 (261.9 … 278.1)" in lines[0]
    assert "780 MiB" in lines[0]
    assert lines[1].startswith("run-2 running")
    shown = reality(example_runs()[0])
    assert re.fullmatch(r"[+-]\d\.\d %", shown.deviation)
    assert re.fullmatch(r"[+-]\d\.\d %", shown.beyond_drift)


def test_no_text_from_a_user_is_run(browser: Any, tmp_path: Path) -> None:
    label = {"label": EVIL}
    spec = SPEC.model_copy(
        update={
            "options": {"data": EVIL},
            "target": SPEC.target.model_copy(update=label),
            "device": SPEC.device.model_copy(update={"name": EVIL}),
            "dropped": (Dropped(knob=Knob.PRECISION, value=EVIL, reason=EVIL, because="rule"),),
        }
    )
    machine = environment().model_copy(update={"device": EVIL, "cpu": EVIL, "host": EVIL, "torch": EVIL})
    texts = {"message": EVIL, "detail": EVIL, "environment": machine, "request_id": EVIL, "finished_at": EVIL}
    rows = [row.model_copy(update=texts) for row in ROWS]
    decision = example_decision().model_copy(update={"reason": EVIL, "notes": (EVIL,)})
    runs = [run.model_copy(update={"id": EVIL, "out_dir": EVIL, "started_at": EVIL}) for run in example_runs()]
    show(browser, write_report(tmp_path / "evil.html", spec, rows, decision, runs))
    drawn(browser)
    assert browser.execute_script("return window.pwned") is None
    assert browser.find_elements("css selector", "img") == []
    assert len(browser.find_elements("css selector", "script:not([type])")) == 2
    shown = text_of(browser, "#answer")
    assert EVIL in shown
    assert complaints(browser) == []


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    text = render(SPEC, ROWS, example_decision(), example_runs())
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=", own.replace("script-src", ""))
    assert "default-src 'none'" in own
    assert text.count("<script>") == 2


@pytest.mark.parametrize(
    ("decision", "headline"),
    [
        (None, "No decision yet: 25 probes so far."),
        (Decision(kind="failed", reason="it died"), "Not even the baseline could be measured."),
        (
            Decision(kind="no_gain", reason="noise", baseline=Side(config=BASELINE)),
            "No configuration beat the baseline beyond the noise. Keep it: 8x2 fp32 eager w0.",
        ),
    ],
)
def test_other_endings_are_said_plainly(decision: Decision | None, headline: str) -> None:
    assert headline in render(SPEC, ROWS, decision)


def test_a_study_without_probes_or_success_still_has_a_page() -> None:
    assert "0 probes (none)" in render(SPEC, (), None)
    gone = [row.model_copy(update={"outcome": Outcome.CRASHED, "measurement": None}) for row in ROWS]
    assert "25 crashed" in render(SPEC, gone, None)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", SPEC, ROWS, None)

"""optuna-dashboard, served for real: shows the study in a browser, and answers nobody else."""

from __future__ import annotations

import base64
import http.client
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

import pytest

from tests.report.browser import browser, wait
from tests.store.rows import example_decision, example_rows, example_spec, scored
from tuner.contract.errors import ConfigError
from tuner.contract.probe import ProbeKind
from tuner.report.dashboard import address_of, make_dashboard, write_note
from tuner.report.words import note
from tuner.store.store import StudyStore
from tuner.store.trials import TrialBook

__all__ = ["browser"]

SPEC = example_spec()
SERVE = """
import sys
from tuner.report.dashboard import serve
serve(sys.argv[1], 0, ready=lambda address: print(address, flush=True))
"""


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialBook]:
    url = f"sqlite:///{tmp_path_factory.mktemp('store')}/studies.db"
    StudyStore.open(url).close()
    found = TrialBook(url, SPEC.name)
    found.repair(example_rows(), SPEC, scored)
    write_note(found.storage, SPEC, example_decision(), example_rows())
    yield found
    found.close()


@contextmanager
def running(server: WSGIServer) -> Iterator[int]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(port: int, path: str = "/api/studies", method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for key, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        if value:
            connection.putheader(key, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_only_requests_to_this_machine_by_its_own_name_are_answered(book: TrialBook) -> None:
    with running(make_dashboard(book.storage, 0)) as port:
        status, body = get(port)
        assert status == 200
        assert SPEC.name.encode() in body
        assert get(port, Host=f"localhost:{port}")[0] == 200
        assert get(port, Host=f"[::1]:{port}")[0] == 200
        for foreign in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "192.0.2.1", "[::1", ""):
            status, body = get(port, Host=foreign)
            assert status == 403, foreign
            assert SPEC.name.encode() not in body


def test_requests_from_other_sites_are_refused(book: TrialBook) -> None:
    with running(make_dashboard(book.storage, 0)) as port:
        own = f"http://127.0.0.1:{port}"
        assert get(port, Origin=own)[0] == 200
        for foreign in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{port}"):
            assert get(port, "/api/studies/1", "DELETE", Origin=foreign)[0] == 403
        assert book.study.user_attrs["workload"] == "latent_cfg"


def test_other_machines_need_a_flag_and_a_password(book: TrialBook) -> None:
    with pytest.raises(ConfigError, match="--allow-remote"):
        make_dashboard(book.storage, 0, "0.0.0.0")
    with pytest.raises(ConfigError, match="TUNER_DASHBOARD_PASSWORD"):
        make_dashboard(book.storage, 0, "0.0.0.0", allow_remote=True)
    server = make_dashboard(book.storage, 0, "0.0.0.0", allow_remote=True, password="canary")
    with running(server) as port:
        assert get(port)[0] == 401
        wrong = base64.b64encode(b"tuner:guess").decode()
        assert get(port, Authorization=f"Basic {wrong}")[0] == 401
        right = base64.b64encode(b"tuner:canary").decode()
        assert get(port, Authorization=f"Basic {right}")[0] == 200
        assert get(port, Host="evil.example", Authorization=f"Basic {right}")[0] == 403


def test_a_taken_port_is_named(book: TrialBook) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: 127.0.0.1:{port} cannot be used"):
            make_dashboard(book.storage, port)


def test_the_address_is_one_to_click_on(book: TrialBook) -> None:
    server = make_dashboard(book.storage, 0)
    assert address_of(server) == f"http://127.0.0.1:{server.server_address[1]}/dashboard"
    server.server_close()


def test_the_note_says_the_decision(book: TrialBook) -> None:
    from optuna_dashboard import get_note

    said = get_note(book.study)
    assert "42.0 % (95 % interval 39.2 … 44.8 %) faster" in said
    assert "Transfer: unverified" in said
    evil = example_decision().model_copy(update={"reason": "<img onerror=x>"})
    assert "<" not in note(SPEC, evil, ())


@pytest.fixture
def served(book: TrialBook) -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, book.storage.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def test_the_dashboard_shows_the_trials_of_a_study(browser: Any, served: str, tmp_path: Path) -> None:
    trials = sum(row.kind is ProbeKind.END_TO_END for row in example_rows())
    body = "return document.body.innerText"
    browser.get(served)
    wait(browser, lambda it: SPEC.name in it.execute_script(body))
    browser.get(f"{served}/studies/1/trials")
    text = wait(browser, lambda it: found if "Trial 0" in (found := it.execute_script(body)) else None)
    assert f"{trials} Trials" in text
    assert "Best Trial" in text
    assert "micro_batch_size 8" in text
    assert "batch_label 8x2" in text
    browser.get(f"{served}/studies/1")
    wait(browser, lambda it: "Infeasible" in it.execute_script("return document.body.textContent"))
    browser.save_screenshot(str(tmp_path / "dashboard.png"))
    assert (tmp_path / "dashboard.png").stat().st_size > 10_000

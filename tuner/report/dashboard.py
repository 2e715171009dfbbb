"""optuna-dashboard on the study store: on this machine alone unless asked otherwise, and deaf to foreign web pages.

A page elsewhere could point a name of its own at 127.0.0.1 and read the store through the visitor's browser; so
requests whose Host is not one of ours, or whose Origin is another site, are refused.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tuner.contract.errors import ConfigError
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.report.words import note

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from optuna.storages import BaseStorage

DEFAULT_PORT = 8080
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_USER = "tuner"
PASSWORD_VARIABLE = "TUNER_DASHBOARD_PASSWORD"


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(
    storage: str | BaseStorage,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    *,
    allow_remote: bool = False,
    password: str | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted; `ready` gets the address once it answers. See `make_dashboard`.

    `password`: None = that of the environment variable TUNER_DASHBOARD_PASSWORD, if set.

    Hushes warnings in this process: Optuna's hints about small studies would fill the terminal at every click.
    """
    warnings.simplefilter("ignore")
    password = password or os.environ.get(PASSWORD_VARIABLE)
    with make_dashboard(storage, port, host, allow_remote=allow_remote, password=password) as server:
        if ready is not None:
            ready(address_of(server))
        server.serve_forever()


def make_dashboard(
    storage: str | BaseStorage,
    port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    *,
    allow_remote: bool = False,
    password: str | None = None,
) -> WSGIServer:
    """A server that listens already; port 0 = any free one.

    Beyond this machine it wants both `allow_remote` and a password (HTTP basic, user `tuner`). Raises ConfigError.
    """
    from optuna_dashboard import wsgi

    remote = not _is_loopback(host)
    if remote and not allow_remote:
        raise ConfigError(
            f"--host: {host} can be reached from other machines; the dashboard can change studies. "
            "Use 127.0.0.1, or add --allow-remote if that is meant"
        )
    if remote and not password:
        raise ConfigError(f"--allow-remote: set {PASSWORD_VARIABLE} first; others must not get in without one")
    app = guarded(wsgi(_opened(storage)), remote=remote, password=password)
    return _listen(app, host, port)


def _opened(storage: str | BaseStorage) -> BaseStorage:
    """A URL is opened as the store does: waiting for a lock instead of failing at once."""
    if not isinstance(storage, str):
        return storage
    from optuna.storages import RDBStorage

    options = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(storage, engine_kwargs=options)


def _listen(app: WSGIApplication, host: str, port: int) -> WSGIServer:
    kind = _Server6 if ":" in host else _Server
    try:
        return make_server(host, port, app, server_class=kind, handler_class=_QuietHandler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--port: {host}:{port} cannot be used: {reason}; choose another with --port") from None


def address_of(server: WSGIServer) -> str:
    host, port = server.server_address[:2]
    name = f"[{host!s}]" if ":" in str(host) else str(host)
    return f"http://{name}:{port}/dashboard"


def guarded(app: WSGIApplication, *, remote: bool = False, password: str | None = None) -> WSGIApplication:
    """`app` behind the checks of Host, Origin and, if given, the password."""

    def checked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "")
        if not _own_name(host, remote):
            return _refuse(start_response, HTTPStatus.FORBIDDEN, "this Host is not served here")
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return _refuse(start_response, HTTPStatus.FORBIDDEN, "requests from other sites are refused")
        if password and not _knows(environ.get("HTTP_AUTHORIZATION", ""), password):
            return _refuse(start_response, HTTPStatus.UNAUTHORIZED, "a password is needed")
        return app(environ, start_response)

    return checked


def _own_name(host: str, remote: bool) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    if name is None:
        return False
    if name in _LOCAL_NAMES:
        return True
    return remote and (_is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower()))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _knows(header: str, password: str) -> bool:
    wanted = base64.b64encode(f"{_USER}:{password}".encode())
    return hmac.compare_digest(header.encode(), b"Basic " + wanted)


def _refuse(start_response: StartResponse, status: HTTPStatus, text: str) -> list[bytes]:
    headers = [("Content-Type", "text/plain; charset=utf-8")]
    if status is HTTPStatus.UNAUTHORIZED:
        headers.append(("WWW-Authenticate", 'Basic realm="tuner"'))
    start_response(f"{status.value} {status.phrase}", headers)
    return [f"{status.value}: {text}\n".encode()]


def write_note(storage: BaseStorage, spec: StudySpec, decision: Decision, rows: Sequence[ProbeRow]) -> None:
    """Put the decision beside the study in the dashboard. `rows`: what it came from. KeyError: no such study."""
    import optuna
    from optuna_dashboard import save_note

    study = optuna.load_study(study_name=spec.name, storage=storage)
    save_note(study, note(spec, decision, rows))

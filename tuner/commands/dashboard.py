"""`tuner dashboard`: optuna-dashboard on our store."""

from __future__ import annotations

from tuner.commands import console as speak
from tuner.commands import setup


def run(storage: str | None, host: str, port: int, allow_remote: bool) -> None:
    from tuner.report.dashboard import serve
    from tuner.store.trials import open_storage

    url = setup.storage_url(storage)
    setup.open_for_reading(storage).close()
    console = speak.make_console(as_json=False)
    serve(
        open_storage(url),
        port,
        host=host,
        allow_remote=allow_remote,
        ready=lambda address: console.print(f"dashboard at {address}  (Ctrl-C ends it)"),
    )

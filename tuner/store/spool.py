"""Results that could not reach the database wait here as files, each written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from sqlalchemy import URL

from tuner.contract.base import Frozen
from tuner.contract.documents import load_json
from tuner.contract.errors import ConfigError, StoreError
from tuner.contract.own_files import replace_text
from tuner.contract.probe import ProbeReply, ProbeRequest
from tuner.store.engine import is_sqlite, shown, sqlite_path

MOST_BYTES = 256 << 20


class Spooled(Frozen):
    """One undelivered result."""

    study: str
    request: ProbeRequest
    reply: ProbeReply
    trial: int | None = None


def default_spool_dir(url: URL) -> Path:
    """Beside a SQLite file; for a server, in the user's state folder under a name made from the URL."""
    if is_sqlite(url):
        path = sqlite_path(url)
        return path.with_name(path.name + ".spool")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "tuner" / "spool" / sha256(shown(url).encode()).hexdigest()[:12]


class Spool:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, item: Spooled) -> Path:
        """Write `item` durably. Redelivery of the same request replaces its file. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = sha256(f"{item.study}\n{item.request.id}".encode()).hexdigest()[:24]
        path = self.folder / f"{name}.json"
        replace_text(path, item.to_json(), durable=True)
        self._sync_folder()
        return path

    def _sync_folder(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def waiting(self) -> Iterator[tuple[Path, Spooled]]:
        """Every undelivered result, oldest first. Raises StoreError for a file that is none."""
        files = sorted(self.folder.glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in files:
            try:
                item = load_json(Spooled, path, MOST_BYTES)
            except ConfigError:
                raise StoreError(f"{path}: this spooled result cannot be read; move it away to go on") from None
            if item is not None:
                yield path, item

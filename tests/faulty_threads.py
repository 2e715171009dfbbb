"""A workload whose module starts a thread when imported, as some libraries do: no process may fork after that."""

from __future__ import annotations

import threading

from tests.toys import Toy

threading.Thread(target=threading.Event().wait, daemon=True).start()


class Threaded(Toy):
    pass

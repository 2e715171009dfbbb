"""A tuner in small, to be killed: runs one probe and says how that ended. Arguments: a request's file, a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from tuner.contract.base import parse_json
from tuner.contract.errors import TunerError
from tuner.contract.probe import ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.probe.runner import SubprocessRunner


def main() -> int:
    request = parse_json(ProbeRequest, Path(sys.argv[1]).read_text(encoding="utf-8"))
    base = Path(sys.argv[2])
    runner = SubprocessRunner(base / "cache", log_dir=base / "logs", isolation=sys.argv[3], trust=ANY_CODE)  # type: ignore[arg-type]
    try:
        reply = runner.run(request)
    except KeyboardInterrupt:
        return 130
    except TunerError as error:
        return error.exit_code
    finally:
        runner.close()
    (base / "reply.json").write_text(reply.to_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

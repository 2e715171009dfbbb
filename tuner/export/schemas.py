"""JSON Schemas of the documents people write and machines read, for editors and scripts.

`python -m tuner.export.schemas docs/schema` writes them; a test keeps them current.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.explanation import ExplainResult
from tuner.contract.production import LiveStatus
from tuner.contract.result import BenchResult, OptimizeResult, RunResult, RunsResult, TrainResultJson
from tuner.contract.study import StudyFile
from tuner.contract.tuned import TunedConfig

SCHEMAS: dict[str, type[Frozen]] = {
    "run-config": RunConfig,
    "tuned": TunedConfig,
    "study": StudyFile,
    "optimize-result": OptimizeResult,
    "train-result": TrainResultJson,
    "run-status": LiveStatus,
    "runs-result": RunsResult,
    "run-result": RunResult,
    "bench-result": BenchResult,
    "explain-result": ExplainResult,
}


def schema_text(name: str) -> str:
    """The schema as JSON text. Raises KeyError for an unknown name."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SCHEMAS[name].model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def main(folder: str) -> None:
    for name in SCHEMAS:
        Path(folder, f"{name}.json").write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

"""The shipped workloads, as they are imported: `tuner.workloads.gpt2`, a name that no folder of a user's can take. In a
checkout they lie beside this package; installed, `tuner/workloads/` is there itself, in place of this file."""

from __future__ import annotations

from tuner.importing import shipped

__path__ = [shipped("workloads")]

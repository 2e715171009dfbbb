"""Which code may be imported: a registered workload, or a name that a person typed. What a file says counts only when
that person says so (--allow-code). Every process that imports workloads is started past `Trust.check`."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.contract.errors import ConfigError


@dataclass(frozen=True)
class Trust:
    """Names that may be imported besides the registered ones, which come from installed packages alone."""

    typed: frozenset[str] = frozenset()
    """`module:Class`, as typed on the command line or written in the calling Python code."""
    any_code: bool = False
    """--allow-code: whatever the files say."""

    @classmethod
    def of(cls, *typed: str) -> Trust:
        return cls(frozenset(typed))

    def allows(self, workload: str) -> bool:
        """A name without a colon is only ever looked up among the registered ones."""
        return self.any_code or ":" not in workload or workload in self.typed

    def check(self, workload: str, source: str = "workload") -> None:
        """Raises ConfigError for a name that nobody typed; `source` says where it stands."""
        if not self.allows(workload):
            raise ConfigError(
                f"{source}: it names code to import ({workload}), and nothing that a file names is imported unasked; "
                "if you trust it, say so with --allow-code"
            )


REGISTERED = Trust()
ANY_CODE = Trust(any_code=True)

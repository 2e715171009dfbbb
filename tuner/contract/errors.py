"""What can go wrong for a user, as one small tree. It does not know how errors are shown.

TunerError                 exit code 2: the input is wrong, the message says where and what to do
 +-- ConfigError           a value in YAML, JSON or an option breaks a rule
 +-- StoreError            the study store is corrupt, of a newer schema, or is no store
 |    +-- StoreOutage        exit code 75: it is locked, full or out of reach; the same command goes on once it is back
 +-- WorkloadError         a workload cannot be found, imported, or prepared from the data given
 +-- JobFailed             exit code 3: the work was started and failed
 +-- Busy                  exit code 75: somebody else uses what is needed, and --no-wait was given; try again later
 +-- Stopped               exit code 75: stopped on purpose or by a signal; the same command goes on
"""

from __future__ import annotations


class TunerError(Exception):
    """Base of everything a user may see as one clear line."""

    exit_code = 2


class ConfigError(TunerError):
    """A value breaks a rule; the message holds path, rule, value, and what to do."""


class StoreError(TunerError):
    """The store cannot be used as it is; nothing in it was changed."""


class StoreOutage(StoreError):
    """The store is sound as far as anybody knows, and cannot be used now."""

    exit_code = 75


class WorkloadError(TunerError):
    """The workload or its data cannot be used."""


class JobFailed(TunerError):
    """The job ran and did not succeed."""

    exit_code = 3


class Stopped(TunerError):
    """The job was stopped in a state from which the same command goes on (EX_TEMPFAIL)."""

    exit_code = 75


class Busy(TunerError):
    """Somebody else uses the device or works on the study; nothing was begun (EX_TEMPFAIL)."""

    exit_code = 75

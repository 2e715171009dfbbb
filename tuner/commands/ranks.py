"""`--nproc`: a configuration spread over several ranks, its effective batch kept."""

from __future__ import annotations

from tuner.commands.words import rechecked
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.tuned import TunedConfig

MOST = 1024


def spread(config: RunConfig, ranks: int | None, option: str = "--nproc") -> RunConfig:
    """`config` over so many ranks (None: as many as it names): accumulation gives way, the effective batch stays.

    Raises ConfigError with the arithmetic where it does not divide.
    """
    if ranks is None or ranks == config.world_size:
        return config
    if ranks < 1:
        raise ConfigError(f"{option}: at least 1 rank is needed (got {ranks})")
    effective, micro = config.effective_batch_size, config.micro_batch_size
    if effective % (micro * ranks):
        raise ConfigError(_refusal(effective, micro, ranks, option))
    steps = effective // (micro * ranks)
    return rechecked(config.model_copy(update={"world_size": ranks, "accumulation_steps": steps}), option)


def _refusal(effective: int, micro: int, ranks: int, option: str) -> str:
    possible = [str(n) for n in range(1, min(effective // micro, MOST) + 1) if effective % (micro * n) == 0]
    text = (
        f"{option} {ranks}: the effective batch of {effective} cannot be shared out: micro-batch {micro} x {ranks} "
        f"ranks = {micro * ranks} samples at a time, and {effective} / {micro * ranks} leaves "
        f"{effective % (micro * ranks)}. "
        f"With micro-batch {micro} it goes over {', '.join(possible)} ranks"
    )
    if effective % ranks:
        return text
    return text + f"; over {ranks} ranks a micro-batch that divides {effective // ranks} would do"


def spread_tuned(tuned: TunedConfig, ranks: int | None) -> tuple[TunedConfig, str]:
    """A tuned file's configuration and runner-ups over so many ranks, and what is to be said of it.

    A promise holds for the number of ranks it was made for. Raises ConfigError where it does not divide.
    """
    config = spread(tuned.config, ranks)
    if config is tuned.config:
        return tuned, ""
    others = tuple(spread(one, ranks) for one in tuned.runner_ups if _divides(one, config.world_size))
    text = f"over {config.world_size} ranks: micro-batch {config.micro_batch_size} x {config.accumulation_steps} each"
    if tuned.promise is not None:
        text += f"; the promise was made for {tuned.config.world_size}, so this run is not held against it"
    update = {"config": config, "promise": None, "runner_ups": others, "runner_up_peaks": ()}
    return tuned.model_copy(update=update), text


def _divides(config: RunConfig, ranks: int) -> bool:
    return config.effective_batch_size % (config.micro_batch_size * ranks) == 0

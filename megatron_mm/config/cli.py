"""The command line: Hydra composes, and a user's mistake ends in one line and exit code 2 instead of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from megatron_mm.config.compose import CONFIG_MODULE, CONFIG_NAME, Config, ConfigError, explain, from_dict_config

FULL_ERROR = "HYDRA_FULL_ERROR"


def run(task: Callable[[Config], None]) -> None:
    """Call `task` with the configuration of `sys.argv`; Hydra's own flags (`--cfg job`, `--help`) work as always.

    Exits with 2 after `error: ...` on stderr where the mistake is the user's; HYDRA_FULL_ERROR=1 shows the traceback.
    """
    traceback = os.environ.get(FULL_ERROR) == "1"

    @hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)
    def main(cfg: DictConfig) -> None:
        with user_errors(traceback):
            task(from_dict_config(cfg))

    with user_errors(traceback):
        # Hydra then raises its errors instead of printing them, so that they can be explained.
        os.environ[FULL_ERROR] = "1"
        main()


def overrides() -> list[str]:
    """What the command line says of keys and groups, word for word, for a task that `run` has called."""
    return list(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))  # type: ignore[arg-type]


@contextmanager
def user_errors(traceback: bool = False) -> Iterator[None]:
    """Turns a ValueError that our own code raised into one line on stderr and exit code 2; others pass through."""
    try:
        yield
    except (HydraException, ValueError) as error:
        problem = explain(error) if isinstance(error, HydraException) else error
        if traceback or not (isinstance(problem, ConfigError) or _raised_by_us(error.__traceback__)):
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {problem}", file=sys.stderr, flush=True)
        elif not isinstance(problem, ConfigError):  # a mistake in the configuration is the same on every rank
            print(f"error (rank {rank}): {problem}", file=sys.stderr, flush=True)
        sys.exit(2)


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is our code and not a library's."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    module = str(traceback.tb_frame.f_globals.get("__name__", "")) if traceback else ""
    return module.partition(".")[0] in (__package__.partition(".")[0], "__main__")

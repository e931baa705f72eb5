"""A recorder at work, and rehearsals in processes of their own."""

from collections.abc import Callable

import pytest
from distributed import run_ranks

from megatron_mm.config.compose import compose
from megatron_mm.rehearsal.clock import Clock, Rates
from megatron_mm.rehearsal.meta import in_place_of_cuda
from megatron_mm.rehearsal.recorder import Recorder
from megatron_mm.rehearsal.run import Rehearsal, rehearse


@pytest.fixture
def recorder():
    """Everything in the test happens on its device."""
    with in_place_of_cuda() as pins:
        recorder = Recorder(pins, Clock(Rates()))
        with recorder:
            yield recorder


@pytest.fixture(scope="session")
def rehearsed() -> Callable[..., Rehearsal]:
    """rehearsed(overrides, world_size, rank, **options of `rehearse`)."""

    def run(overrides: list[str], world_size: int = 1, rank: int = 0, **options) -> Rehearsal:
        (result,) = run_ranks(_rehearse, 1, overrides, world_size, rank, options)
        return result

    return run


def _rehearse(_init_kwargs: dict, overrides: list[str], world_size: int, rank: int, options: dict) -> Rehearsal:
    return rehearse(compose(overrides), world_size, rank, **{"text_vocab_size": 500, **options})

"""A recorder at work, and rehearsals in processes of their own."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_mm.rehearsal.clock import Clock, Rates
from megatron_mm.rehearsal.meta import in_place_of_cuda
from megatron_mm.rehearsal.recorder import Recorder
from megatron_mm.rehearsal.run import Rehearsal

TESTS = Path(__file__).parents[1]


@pytest.fixture
def recorder():
    """Everything in the test happens on its device."""
    with in_place_of_cuda() as pins:
        recorder = Recorder(pins, Clock(Rates()))
        with recorder:
            yield recorder


@pytest.fixture(scope="session")
def rehearsed() -> Iterator[Callable[..., Rehearsal]]:
    """rehearsed(overrides, world_size, rank, **options of `rehearse`), in a process that does not interpret kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(TESTS / "rehearsal" / "server.py")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run(overrides: list[str], world_size: int = 1, rank: int = 0, **options) -> Rehearsal:
        pickle.dump((overrides, world_size, rank, options), server.stdin)
        server.stdin.flush()
        answer = pickle.load(server.stdout)
        if isinstance(answer, AssertionError):
            raise answer
        return answer

    yield run
    server.stdin.close()
    server.wait()

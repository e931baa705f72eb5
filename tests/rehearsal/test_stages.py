"""Which ranks are rehearsed, each in a process of its own."""

import os
import signal

import pytest

from megatron_mm.config.compose import compose
from megatron_mm.rehearsal import stages
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.rehearsal.errors import RehearsalError


def _config(pipeline: int):
    own = f"parallel.pipeline_model_parallel_size={pipeline}"
    return compose(["model=transfusion_tiny", "run.name=test", "data.path=none", own])


@pytest.mark.parametrize(
    ("pipeline", "ranks"),
    [
        (1, {"only stage": 0}),
        (2, {"first stage": 0, "last stage": 8}),
        (4, {"first stage": 0, "middle stage": 8, "last stage": 12}),
    ],
)
def test_first_middle_and_last_stage(pipeline, ranks):
    assert stages.stage_ranks(_config(pipeline), 16) == ranks


def _killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_sentence(monkeypatch):
    monkeypatch.setattr(stages, "rehearse", _killed)
    with pytest.raises(RehearsalError, match="was killed, perhaps for want of memory"):
        stages.rehearse_ranks(_config(2), 2, {"first": 0, "last": 1}, Rates(), 500)

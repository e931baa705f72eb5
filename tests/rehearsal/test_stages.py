"""Which ranks are rehearsed, each in a process of its own."""

import os
import signal
from unittest.mock import patch

import pytest
from distributed import run_ranks
from torch import nn

from megatron_mm.config.compose import compose
from megatron_mm.rehearsal import stages
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.rehearsal.errors import RehearsalError
from megatron_mm.rehearsal.run import rehearse


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


def _devices_of_what_is_cast(_: dict) -> set[str]:
    found, to = set(), nn.Module.to

    def watched(self, *args, **kwargs):
        found.update(parameter.device.type for parameter in self.parameters())
        return to(self, *args, **kwargs)

    config = compose(["model=showo_flow_tiny", "run.name=test", "data.path=none", "data.seq_length=512"])
    with patch.object(nn.Module, "to", watched):
        rehearse(config, 1, 0, text_vocab_size=500, path="cpu")
    return found


def test_a_family_builds_on_the_device():
    """On the host its parts would take their whole size first, in fp32."""
    assert run_ranks(_devices_of_what_is_cast, 1) == [{"meta"}]

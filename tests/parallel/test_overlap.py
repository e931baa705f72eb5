"""What is left to the device: Megatron-LM's overlaps on CUDA, none on a CPU, and the environment CUDA starts in."""

import os
from dataclasses import replace

import pytest
import torch

from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel import overlap

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
KEYS = ("overlap_grad_reduce", "overlap_param_gather", "overlap_p2p_comm", "gradient_accumulation_fusion")


@pytest.fixture
def apex(monkeypatch):
    """Apex's extension is there."""
    found = lambda name: name == overlap.WGRAD_EXTENSION  # noqa: E731
    monkeypatch.setattr(overlap.importlib.util, "find_spec", found)


def chosen(config, device, dtype=torch.bfloat16):
    """The names of what is on."""
    selected, line = overlap.select(config, device, dtype)
    assert all(type(getattr(selected, key)) is bool for key in KEYS)
    assert replace(selected, **dict.fromkeys(KEYS)) == replace(config, **dict.fromkeys(KEYS))
    assert ("in their products" in line) == selected.gradient_accumulation_fusion
    return {key for key in KEYS if getattr(selected, key)}


def test_a_cpu_overlaps_only_the_interleaved_pipeline(apex):
    assert chosen(ParallelConfig(), CPU) == set()
    assert chosen(INTERLEAVED, CPU) == {"overlap_p2p_comm"}


def test_cuda_overlaps_all_that_can(apex):
    assert chosen(INTERLEAVED, CUDA) == set(KEYS)
    assert chosen(INTERLEAVED, CUDA, torch.float64) == set(KEYS[:3])
    plain = ParallelConfig(use_distributed_optimizer=False)
    assert chosen(plain, CUDA) == {"overlap_grad_reduce", KEYS[3]}
    assert chosen(ParallelConfig(overlap_grad_reduce=False), CUDA) == {KEYS[3]}


def test_what_was_said_stays():
    off = dict.fromkeys(KEYS, False)
    assert chosen(replace(INTERLEAVED, **off), CPU) == set()
    assert chosen(ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True), CPU) == set(KEYS[:2])


def test_without_apex():
    assert KEYS[3] not in chosen(ParallelConfig(), CUDA)
    for device, why in ((CUDA, "Apex's CUDA extensions are not installed"), (CPU, "it needs CUDA")):
        with pytest.raises(ValueError, match=f"gradient_accumulation_fusion=true cannot run: {why}"):
            chosen(ParallelConfig(gradient_accumulation_fusion=True), device)


def test_the_environment_is_prepared_and_respected(monkeypatch):
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    read = lambda: [os.environ.get(name) for name in names]  # noqa: E731
    # Not delenv, which would not take away again what was not there.
    monkeypatch.setattr(os, "environ", {})
    overlap.set_environment([ParallelConfig()])
    assert read() == [None, "expandable_segments:True", None]
    overlap.set_environment([ParallelConfig(), ParallelConfig(tensor_model_parallel_size=2)])
    assert read() == ["1", "expandable_segments:True", None]
    given = dict(zip(names, ("8", "max_split_size_mb:512", "backend:native"), strict=True))
    for kept in (given, {names[0]: "8", names[2]: "backend:native"}):
        monkeypatch.setattr(os, "environ", dict(kept))
        overlap.set_environment([ParallelConfig(context_parallel_size=2)])
        assert os.environ == kept

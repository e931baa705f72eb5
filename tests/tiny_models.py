"""Tiny sampling models of random weights, each in a process of its own, which megatron-core's CPU mode stays with."""

from pathlib import Path

import torch
from distributed import run_ranks
from tiny_runs import overrides_for

from megatron_mm.config.compose import Config, compose
from megatron_mm.parallel.distributed import single_process
from megatron_mm.sampling.model import SamplingModel

CPU = torch.device("cpu")


def config_for(family: str, folder: Path, *overrides: str) -> Config:
    """A tiny model of a `tiny_runs` family; `folder` holds codebook.npz."""
    return compose(overrides_for(family, folder, folder / "run", *overrides))


def with_model(fn, config: Config, *args, device: torch.device = CPU):
    """`fn(model, *args)` in a process of its own."""
    return run_ranks(_call, 1, fn, config, args, device)[0]


def _call(_init_kwargs: dict, fn, config: Config, args: tuple, device: torch.device):
    with single_process(device):
        model = SamplingModel.build(config, device)
        generator = torch.Generator().manual_seed(0)
        # Larger than at the start of training, where outputs are all but constant and the image head is zero.
        for parameter in model.stage.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + 0.1 * noise)
        return fn(model, *args)

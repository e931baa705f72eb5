"""Initialisation as a pure function of (seed, parameter name), so that every layout starts from the same weights.

The walk goes over the sharded state dict: a parameter's checkpoint name, global shape and offset are its identity.
Each matrix is drawn whole, in fp32, and this rank keeps its part.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_mm.parallel.model import StageModel

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: StageModel, seed: int) -> None:
    """Draws every parameter of at least two dimensions from N(0, std); one-dimensional ones stay as built.

    std is the parameter's `init_std` where it has one (None: keep as built), else the trunk's init_method_std, divided
    by sqrt(2 * layers) for the layers' outputs, as in Megatron-LM.
    """
    config = model.config
    parameters = {id(p): p for p in model.parameters()}
    named = dict(model.named_parameters())
    for name, entry in model.sharded_state_dict().items():
        shards = [entry]
        if isinstance(entry, ShardedTensorFactory):
            shards = entry.build()
            shards = list(shards.values()) if isinstance(shards, dict) else shards
        for ordinal, shard in enumerate(shards):
            if not isinstance(shard, ShardedTensor) or len(shard.global_shape) < 2:
                continue
            owner = parameters.get(id(entry.data)) if isinstance(entry.data, nn.Parameter) else named.get(name)
            std = getattr(owner, "init_std", config.init_method_std)
            if std is None:
                continue
            if name.endswith(_RESIDUAL_OUTPUTS):
                std = std / math.sqrt(2 * config.num_layers)
            whole = _normal(f"{seed}/{shard.key}/{ordinal}", shard.global_shape)
            index = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
            shard.data.copy_(whole[index] * std)


def _normal(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal fp32 numbers that depend on `name` alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randn(shape, generator=generator)

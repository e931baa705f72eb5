"""Initialisation as a pure function of (seed, parameter name), so that every layout starts from the same weights.

The walk goes over the sharded state dict: a parameter's checkpoint name, global shape and offset are its identity.
Each matrix is drawn whole, in fp32, and this rank keeps its part.
"""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_mm.parallel.model import StageModel

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: StageModel, seed: int) -> None:
    """Draws every parameter of at least two dimensions from N(0, std); one-dimensional ones stay as built.

    std is the parameter's `init_std` where it has one (None: keep as built), else the trunk's init_method_std, divided
    by sqrt(2 * layers) for the layers' outputs, as in Megatron-LM. Modules that bring weights of their own
    (`load_pretrained`) read them afterwards.
    """
    parameters = dict(model.named_parameters())
    for name, entry in model.sharded_state_dict().items():
        std = getattr(parameters[name], "init_std", model.config.init_method_std)
        if std is None:
            continue
        if name.endswith(_RESIDUAL_OUTPUTS):
            std = std / math.sqrt(2 * model.config.num_layers)
        # The two halves of a gated layer are two shards of one matrix.
        shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for shard in shards:
            # Experts of a layer share a name; what stands before a matrix's own axes is the expert's number.
            axes = shard.prepend_axis_num
            shape, offset = shard.global_shape[axes:], shard.global_offset[axes:]
            if len(shape) > 1:
                number = "".join(f"/{place}" for place in shard.global_offset[:axes])
                whole = drawn(seed, f"{shard.key}{number}", shape)
                place = tuple(slice(o, o + n) for o, n in zip(offset, shard.local_shape, strict=True))
                shard.data.copy_(whole[place] * std)
    for module in model.modules():
        if hasattr(module, "load_pretrained"):
            module.load_pretrained()


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal fp32 numbers that depend on `seed` and `name` alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    return torch.randn(shape, generator=generator)

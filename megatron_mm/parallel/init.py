"""Initialisation as a pure function of (seed, parameter name), so that every layout starts from the same weights.

The walk goes over the sharded state dict: a parameter's checkpoint name, global shape and offset are its identity.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_mm.nn.lora import ADAPTERS
from megatron_mm.parallel.draw import Normal, draw
from megatron_mm.parallel.model import StageModel

Fresh = Literal["all", "adapters", "none"]
"""Which of a model's weights no checkpoint brings."""

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize(model: StageModel, seed: int, fresh: Fresh = "all") -> None:
    """Draws every parameter of at least two dimensions from N(0, std); one-dimensional ones stay as built.

    std is the parameter's `init_std` where it has one (None: keep as built), else the trunk's init_method_std, divided
    by sqrt(2 * layers) for the layers' outputs, as in Megatron-LM. Modules that bring weights of their own
    (`load_pretrained`) read them afterwards. Weights that are not fresh are left as they lie in memory.
    """
    if fresh == "none":
        return
    parameters = dict(model.named_parameters())
    normal = Normal(next(iter(parameters.values())).device)
    for name, entry in model.sharded_state_dict().items():
        std = getattr(parameters[name], "init_std", model.config.init_method_std)
        if std is None or (fresh == "adapters" and not name.endswith(ADAPTERS)):
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
                draw(shard.data, normal, std, f"{seed}/{shard.key}{number}", shape, offset)
    for module in model.modules():
        if fresh == "all" and hasattr(module, "load_pretrained"):
            module.load_pretrained()

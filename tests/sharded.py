"""Whole tensors from what each rank holds, by the names and offsets of the sharded state dict."""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Shard = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def local_shards(models: list) -> list[Shard]:
    """(checkpoint name, global shape, offset, values) of everything in this rank's model chunks."""
    shards = []
    for model in models:
        for entry in model.sharded_state_dict().values():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in built.values() if isinstance(built, dict) else built:
                if isinstance(part, ShardedTensor):
                    data = part.data.detach().clone()[(None,) * part.prepend_axis_num]
                    shards.append((part.key, part.global_shape, part.global_offset, data))
    return shards


def assemble(ranks: list[list[Shard]]) -> dict[str, torch.Tensor]:
    """Name -> whole tensor. Every element must be held by some rank, and all holders must agree bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for name, shape, offset, data in (shard for rank in ranks for shard in rank):
        tensor = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
        known = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        at = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        assert (tensor[at] == data)[known[at]].all(), f"{name} differs between ranks"
        tensor[at], known[at] = data, True
    for name, known in seen.items():
        assert known.all(), f"{name} is held only in part"
    return whole

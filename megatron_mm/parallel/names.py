"""Parameters by the layout-free names that checkpoints use, and patterns over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from math import prod

from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import nn


def named_weights(models: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(checkpoint name, parameter, numbers in the whole parameter over tensor ranks) of this rank's `StageModel`s.
    Experts of a layer share a name, and count together."""
    for model in models:
        parameters = dict(model.named_parameters())
        for local_name, entry in model.sharded_state_dict().items():
            shard = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
            yield shard.key, parameters[local_name], prod(shard.global_shape)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (fnmatch) is the name's."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)

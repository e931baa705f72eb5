"""Our attention in megatron-core's `core_attention` slot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron_mm.nn.attention import BACKENDS, PARTIAL_BACKENDS
from megatron_mm.nn.kv_cache import KVCache, attend_cached
from megatron_mm.parallel.context.runtime import SpreadAttention
from megatron_mm.parallel.transformer_config import TrunkTransformerConfig


class SpanAttention(nn.Module):
    """Attention over the batch's interval mask, on this rank's heads.

    With a `cache` (see `caching`), the mask's `hi` row alone says what each new token sees, in cache coordinates.
    Under context parallelism `packed_seq_params` computes attention over the positions of all ranks.
    """

    def __init__(self, config: TrunkTransformerConfig, layer_number: int, **_unused):
        super().__init__()
        self.layer_number = layer_number
        self.attend = BACKENDS[config.attention_backend_name]
        self.attend_partially = PARTIAL_BACKENDS.get(config.attention_backend_name)
        self.mask_rows = 3 if config.hides_keys else 2
        self.cache: KVCache | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        packed_seq_params: SpreadAttention | None = None,
        **_unused,
    ) -> torch.Tensor:
        """query [S, B, H/TP, Dh], key and value [S, B, G/TP, Dh], mask int32 [B, 6, S] -> [S, B, H/TP * Dh]."""
        if packed_seq_params is not None:
            return packed_seq_params(query, key, value, self.attend_partially).flatten(2)
        q, k, v = (t.transpose(0, 1) for t in (query, key, value))
        if self.cache is None:
            out = self.attend(q, k, v, attention_mask[:, : self.mask_rows])
        else:
            out = attend_cached(q, *self.cache.update(self.layer_number, k, v), hi=attention_mask[:, 1])
        return out.flatten(2).transpose(0, 1).contiguous()


@contextmanager
def caching(model: nn.Module, cache: KVCache) -> Iterator[None]:
    """Every attention layer of `model` writes its keys to `cache` and attends to what is there."""
    layers = [module for module in model.modules() if isinstance(module, SpanAttention)]
    for layer in layers:
        layer.cache = cache
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None

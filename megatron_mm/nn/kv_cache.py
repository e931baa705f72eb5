"""The key/value cache of one attention layer, for sampling.

Every row of the batch is a sequence of its own with its own length, so prompts of different lengths need no padding in
the cache: new keys go to explicit slots, and a slot beyond a row's length is overwritten when the row gets there.
"""

from __future__ import annotations

import torch


class KVCache:
    """Preallocated keys and values [B, capacity, G, Dh]; `slots` int64 [B, n] says where the next n tokens go."""

    def __init__(self, batch: int, capacity: int):
        self.batch, self.capacity = batch, capacity
        self.slots: torch.Tensor | None = None
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes k, v [B, n, G, Dh] of `layer` at `slots` and returns everything cached so far, [B, capacity, G, Dh]."""
        if layer not in self._keys:
            shape = (self.batch, self.capacity, *k.shape[2:])
            self._keys[layer], self._values[layer] = k.new_zeros(shape), v.new_zeros(shape)
        rows = torch.arange(self.batch, device=k.device)[:, None]
        self._keys[layer][rows, self.slots] = k
        self._values[layer][rows, self.slots] = v
        return self._keys[layer], self._values[layer]


def attend_cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
    """Attention of n new queries [B, n, H, Dh] on cached keys [B, C, G, Dh]: query i of row b sees keys [0, hi[b, i])."""
    used = int(hi.max())
    allowed = torch.arange(used, device=q.device) < hi[..., None]  # [B, n, used]
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k[:, :used].transpose(1, 2),
        v[:, :used].transpose(1, 2),
        attn_mask=allowed[:, None],
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)

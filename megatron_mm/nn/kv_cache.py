"""Keys and values of the tokens so far, for sampling.

Every row is a sequence of its own with its own length, so prompts of different lengths need no padding in the cache:
new keys go to explicit slots, and what lies beyond a row's length is never seen before it is overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


class KVCache:
    """Preallocated keys and values [rows, capacity, G, Dh] of every layer. `place` comes before each forward pass."""

    def __init__(self, rows: int, capacity: int, device: torch.device):
        self.rows, self.capacity, self.device = rows, capacity, device
        self._held: dict[int, torch.Tensor] = {}

    def place(self, rows: Sequence[int], slots: torch.Tensor) -> None:
        """The next pass holds n tokens for each of b different `rows`, which go to `slots` int64 [b, n]."""
        self._used = int(slots.max()) + 1
        assert self._used <= self.capacity, f"slot {self._used - 1} of {self.capacity}"
        index = torch.tensor(rows, device=self.device)
        # A slice is read in place, where an index makes a copy.
        self._read = slice(len(rows)) if list(rows) == list(range(len(rows))) else index
        self._write = index[:, None], slots.to(self.device)

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the pass's k, v [b, n, G, Dh] and returns all keys and values of its rows, [b, used, G, Dh]."""
        if layer not in self._held:
            self._held[layer] = k.new_zeros(2, self.rows, self.capacity, *k.shape[2:])
        keys, values = self._held[layer]
        keys[self._write], values[self._write] = k, v
        return keys[self._read, : self._used], values[self._read, : self._used]


def attend_cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
    """Attention of new queries [b, n, H, Dh] on cached keys [b, K, G, Dh]: query i of row r sees keys [0, hi[r, i]).

    Every query must see a key: hi int [b, n] is at least 1.
    """
    allowed = torch.arange(k.shape[1], device=q.device) < hi[..., None]  # [b, n, K]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed[:, None],
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)

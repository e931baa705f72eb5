"""Block sparsity of an interval mask, for kernels that walk lists of blocks: FlashAttention-4's, FlexAttention's.

Which blocks of a grid hold an allowed pair, and which hold nothing else, follows from a handful of extremes a block:
O(S) to find, then one comparison a block. All on the mask's device; nothing waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class BlockLists:
    """For each row of blocks, int32: how many need a mask and which, [B, 1, N] and [B, 1, N, M] with those first and
    ascending; and the same of the blocks that every query sees whole. The second size stands for all heads."""

    masked_count: torch.Tensor
    masked: torch.Tensor
    full_count: torch.Tensor
    full: torch.Tensor


def block_lists(mask: torch.Tensor, block_q: int, block_k: int) -> tuple[BlockLists, BlockLists]:
    """Blocks of keys for each block of queries, and blocks of queries for each block of keys.

    Args:
        mask: int32 [B, 3, S], rows lo, hi and until; or [B, 2, S] where no key is hidden (see `op.span_attention`).
    """
    needed, full = block_kinds(mask, block_q, block_k)
    masked = needed & ~full
    by_query, by_key = (BlockLists(*_listed(m), *_listed(f)) for m, f in ((masked, full), (masked.mT, full.mT)))
    return by_query, by_key


def block_kinds(mask: torch.Tensor, block_q: int, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks must be walked, and which of them hold allowed pairs alone: bool [B, S / block_q, S / block_k].

    A block that must be walked may hold no allowed pair where a block of queries needs keys on both its sides.
    """
    length = mask.shape[2]
    lo, hi = mask[:, 0], mask[:, 1]
    sees = lo < hi
    start, end = _blocks(torch.where(sees, lo, length), block_q, length), _blocks(torch.where(sees, hi, 0), block_q, 0)
    last_lo, first_hi = _blocks(lo, block_q, 0).amax(-1), _blocks(hi, block_q, length).amin(-1)
    start, end, last_lo, first_hi = (bound[..., None] for bound in (start.amin(-1), end.amax(-1), last_lo, first_hi))
    first_key = torch.arange(0, length, block_k, device=mask.device, dtype=mask.dtype)
    end_key = (first_key + block_k).clamp(max=length)
    needed = (start < end_key) & (first_key < end)
    full = (last_lo <= first_key) & (end_key <= first_hi)
    if mask.shape[1] == 3:
        first_query = torch.arange(0, length, block_q, device=mask.device, dtype=mask.dtype)[:, None]
        end_query = (first_query + block_q).clamp(max=length)
        until = mask[:, 2]
        needed &= first_query < _blocks(until, block_k, 0).amax(-1)[:, None]
        full &= end_query <= _blocks(until, block_k, length).amin(-1)[:, None]
    return needed, full & needed


def _blocks(rows: torch.Tensor, block: int, beyond: int) -> torch.Tensor:
    """[B, S] -> [B, S / block, block], filled up with `beyond`."""
    return F.pad(rows, (0, -rows.shape[1] % block), value=beyond).unflatten(1, (-1, block))


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many, which first) of the last dimension: int32 [B, 1, N] and [B, 1, N, M]."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()

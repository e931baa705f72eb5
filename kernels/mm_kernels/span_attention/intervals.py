"""The mask's algebra: what an interval mask is, its transpose, and what a chunk of it looks like.

A mask says for every query q which keys it may see, and for every key k which query is the first that may not see it:

    allowed(q, k) = lo[q] <= k < hi[q]  and  q < until[k]

lo and hi never decrease. Three facts carry everything else:

1. Needed keys.   Queries a <= q < b need only keys in [lo[a], hi[b-1]): one range, so a tile walks one range of keys.
   Every one of them sees every key in [lo[b-1], hi[a]): there no mask has to be looked at (where `until` hides none).
2. Transpose.     Key k is seen by the queries in [first q with hi[q] > k, min(first q with lo[q] > k, until[k])):
   again one interval, which has swallowed `until`. The backward pass over keys is the forward pass over this mask.
3. Chunks.        Cut the positions into chunks and keep some of them, in order. Among what is kept, an interval of
   positions is an interval of indices: its ends move by the piecewise linear map `local_index`. So a part of a sharded
   sequence needs no mask of its own kind, and kernels never hear of global positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def transpose(lo: torch.Tensor, hi: torch.Tensor, until: torch.Tensor | None, keys: int) -> torch.Tensor:
    """The interval of queries that see each key.

    Args:
        lo, hi: int32 [B, S], never decreasing along a row.
        until: int32 [B, keys], or None where nothing is hidden.

    Returns:
        int32 [B, 2, keys]: first query, and the end behind the last one; end <= first where no query sees the key.
    """
    key = torch.arange(keys, device=lo.device, dtype=lo.dtype).expand(lo.shape[0], -1).contiguous()
    first = torch.searchsorted(hi.contiguous(), key, right=True, out_int32=True)
    end = torch.searchsorted(lo.contiguous(), key, right=True, out_int32=True)
    return torch.stack([first, end if until is None else torch.minimum(end, until)], dim=1)


def local_index(position: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """How many kept positions lie before `position`.

    Args:
        position: integers of any shape, in global coordinates.
        starts, sizes: [pieces], the pieces that are kept: ascending, not overlapping, none empty; at least one.
    """
    piece = (torch.searchsorted(starts, position.contiguous(), right=True) - 1).clamp_(min=0)
    before = sizes.cumsum(0) - sizes
    inside = (position - starts[piece]).clamp_(min=0)
    return (before[piece] + torch.minimum(inside, sizes[piece])).to(position.dtype)


def chunk_mask(
    mask: torch.Tensor, query_chunks: Sequence[int], key_chunks: Sequence[int], chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask between some chunks of queries and some chunks of keys, in indices of what is kept.

    Args:
        mask: int32 [B, 3, S] of the whole sequence, rows lo, hi, until, in global coordinates.
        query_chunks, key_chunks: the first global position of each kept chunk, ascending, no two overlapping.

    Returns:
        (int32 [B, 2, Sq] rows lo and hi; until int32 [B, Sk]), the arguments `mask` and `until` of `span_attention`.

    Raises:
        ValueError: chunks are not ascending, overlap, or leave the sequence.
    """
    for chunks in (query_chunks, key_chunks):
        ends = [0, *(start + chunk_size for start in chunks)]
        if any(start < end for start, end in zip(chunks, ends, strict=False)) or ends[-1] > mask.shape[2]:
            raise ValueError(
                f"Chunks of {chunk_size} starting at {list(chunks)} must ascend without overlap inside "
                f"[0, {mask.shape[2]}]."
            )
    rows = torch.cat([mask[:, :2, start : start + chunk_size] for start in query_chunks], dim=-1)
    until = torch.cat([mask[:, 2, start : start + chunk_size] for start in key_chunks], dim=-1)
    pieces = [torch.tensor(chunks, device=mask.device, dtype=mask.dtype) for chunks in (key_chunks, query_chunks)]
    keys, queries = [(starts, torch.full_like(starts, chunk_size)) for starts in pieces]
    return local_index(rows, *keys), local_index(until, *queries)

"""Triton device functions that every span-attention kernel shares: which program works on what, and which range of the
other side its tile needs (see `intervals` for why it is one range)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(tiles, heads, heads_per_wave):
    """(tile, head, batch row) of this program of a 1-D grid.

    Programs that run at the same time share their keys in L2: `heads_per_wave` heads go through all their tiles
    together, tile by tile, before the next heads start.
    """
    program = tl.program_id(0)
    wave, inside = program // (tiles * heads_per_wave), program % (tiles * heads_per_wave)
    waves = heads // heads_per_wave
    return inside // heads_per_wave, (wave % waves) * heads_per_wave + inside % heads_per_wave, wave // waves


@triton.jit
def load_intervals(lo_ptr, hi_ptr, index, length, other_length):
    """Each row's interval [lo, hi), and the tile's two ranges: needed by some row, and seen by every row.

    Rows behind `length` see everything and need nothing.
    """
    inside = index < length
    lo = tl.load(lo_ptr + index, mask=inside, other=0)
    hi = tl.load(hi_ptr + index, mask=inside, other=other_length)
    needs = inside & (lo < hi)
    start = tl.min(tl.where(needs, lo, other_length), 0)
    end = tl.max(tl.where(needs, hi, 0), 0)
    return lo, hi, start, end, tl.max(lo, 0), tl.min(hi, 0)


@triton.jit
def split_range(start, end, full_start, full_end, BLOCK: tl.constexpr):
    """Cut [start, end) into blocks: (masked blocks on the left, full blocks, masked blocks in all).

    Blocks begin at `start` itself, so a tile inside one document has no masked block on the left. The full blocks
    follow the left ones; the remaining masked blocks follow the full ones.
    """
    left = tl.cdiv(tl.maximum(full_start - start, 0), BLOCK)
    full = tl.maximum(full_end - start - left * BLOCK, 0) // BLOCK
    left = tl.where(full > 0, left, 0)
    masked = left + tl.cdiv(tl.maximum(end - start - (left + full) * BLOCK, 0), BLOCK)
    return left, full, masked


@triton.jit
def masked_block(i, start, end, left, full, BLOCK: tl.constexpr):
    """(where the i-th masked block is read, its first index that counts).

    The last block ends at `end` rather than behind it: what lies there is not needed and may be anything, even NaN. The
    indices that it then shares with the block before do not count.
    """
    first = start + i * BLOCK + tl.where(i >= left, full * BLOCK, 0)
    return tl.minimum(first, end - BLOCK), first

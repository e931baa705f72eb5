"""Forward kernel: one program takes a tile of queries of one head through the keys that the tile needs.

Online softmax (FlashAttention-2, arXiv 2307.08691) in base 2, accumulated in fp32. Tiles that every query sees run
without mask code; only the blocks at the range's ends look at the intervals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm_kernels.span_attention.tiles import load_intervals, masked_block, split_range, tile_of_program


@triton.jit
def _attend(
    acc, total, peak, q, k_desc, v_desc, until_ptr, batch, kv_head, rows, lo, hi,
    start, end, left, full, count, scale_log2,
    MASKED: tl.constexpr, HAS_UNTIL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes (acc, total, peak) of the softmax through `count` blocks, all masked or all full."""
    for i in tl.range(0, count):
        if MASKED:
            at, first = masked_block(i, start, end, left, full, BLOCK_K)
        else:
            at = start + (left + i) * BLOCK_K
        k = k_desc.load([batch, kv_head, at, 0]).reshape(BLOCK_K, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED or HAS_UNTIL:
            key = at + tl.arange(0, BLOCK_K)
            allowed = tl.full(scores.shape, True, tl.int1)
            if MASKED:
                allowed = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None]) & (key >= first)[None, :]
            if HAS_UNTIL:
                until = tl.load(until_ptr + key, mask=key >= 0, other=0)
                allowed = allowed & (rows[:, None] < until[None, :])
            scores = tl.where(allowed, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        # A row that has seen nothing yet: exp2(-inf - 0) is the zero that it needs.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED or HAS_UNTIL else new_peak
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v = v_desc.load([batch, kv_head, at, 0]).reshape(BLOCK_K, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(
    do_not_specialize=["queries", "keys", "heads", "heads_per_wave", "mask_stride", "until_stride"],
    do_not_specialize_on_alignment=["lse_ptr", "lo_ptr", "hi_ptr", "until_ptr"],
)
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, lo_ptr, hi_ptr, until_ptr,
    queries, keys, heads, heads_per_wave, mask_stride, until_stride, scale_log2,
    GROUP: tl.constexpr, HAS_UNTIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, S, H, D] and lse fp32 [B, H, S]; descriptors are of [B, S, H, D] and [B, K, G, D] tensors."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, head, batch = tile_of_program(tiles, heads, heads_per_wave)
    # The last queries of a causal row need the most keys: they start first.
    first_row = (tiles - 1 - tile) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    mask_offset = batch.to(tl.int64) * mask_stride
    lo, hi, start, end, full_start, full_end = load_intervals(
        lo_ptr + mask_offset, hi_ptr + mask_offset, rows, queries, keys
    )
    left, full, masked = split_range(start, end, full_start, full_end, BLOCK_K)
    until_ptr += batch.to(tl.int64) * until_stride

    q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_Q, BLOCK_D)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc, total, peak = _attend(
        acc, total, peak, q, k_desc, v_desc, until_ptr, batch, head // GROUP, rows, lo, hi,
        start, end, left, full, full, scale_log2, False, HAS_UNTIL, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_desc, v_desc, until_ptr, batch, head // GROUP, rows, lo, hi,
        start, end, left, full, masked, scale_log2, True, HAS_UNTIL, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    acc = tl.where(seen[:, None], acc / total[:, None], 0.0)
    lse = tl.where(seen, (peak + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    out_desc.store([batch, head, first_row, 0], acc.to(out_desc.dtype).reshape(1, 1, BLOCK_Q, BLOCK_D))
    lse_offset = (batch.to(tl.int64) * heads + head) * queries
    tl.store(lse_ptr + lse_offset + rows, lse, mask=rows < queries)

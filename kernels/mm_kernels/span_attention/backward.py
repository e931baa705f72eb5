"""Backward kernels: a preparation that costs O(S), then dq over tiles of queries and dk, dv over tiles of keys.

With P = exp(S - lse) and D = rowsum(out * dout) - dlse, the scores' gradient is dS = P * (dout v^T - D): a gradient of
the log-sum-exp only shifts D. Scores are computed again in both passes, seven matrix products where an atomic
accumulation of dq would need five; in return nothing is accumulated across programs and the result is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mm_kernels.span_attention.tiles import load_intervals, masked_block, split_range, tile_of_program

PAD = tl.constexpr(128)
"""Places before the first query's row sums, and the tile of the preparation: no less than any BLOCK_Q."""
MASK_POINTERS = ("lo_ptr", "hi_ptr", "until_ptr", "first_ptr", "end_ptr")


@triton.jit
def _row_sums(sums_ptr, row, queries):
    """Pointers to lse and D of the first query of a row (a head of a batch row)."""
    lse_ptr = sums_ptr + row * 2 * (PAD + queries) + PAD
    return lse_ptr, lse_ptr + PAD + queries


@triton.jit
def _first_above(values_ptr, length, steps, threshold):
    """For each threshold, the first index whose value is greater, in ascending values [length]: binary search."""
    low = tl.zeros_like(threshold)
    high = low + length
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        above = tl.load(values_ptr + middle, mask=searching, other=0) > threshold
        high = tl.where(searching & above, middle, high)
        low = tl.where(searching & (above == 0), middle + 1, low)
    return low


@triton.jit(
    do_not_specialize=["queries", "keys", "heads", "mask_stride", "until_stride", "search_steps"],
    do_not_specialize_on_alignment=["lse_ptr", "dlse_ptr", "sums_ptr", *MASK_POINTERS],
)
def prepare_kernel(
    out_desc, dout_desc, lse_ptr, dlse_ptr, sums_ptr, lo_ptr, hi_ptr, until_ptr, first_ptr, end_ptr,
    queries, keys, heads, mask_stride, until_stride, search_steps,
    HAS_DLSE: tl.constexpr, HAS_UNTIL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The row sums fp32 [B, H, 2, PAD + S]; the transposed mask, first and end int32 [B, K] (`intervals.transpose`).

    Row sums are lse in base 2 and D, behind PAD places that a walk's shifted last block may read, but never counts.
    """
    start, head, batch = tl.program_id(0) * PAD, tl.program_id(1), tl.program_id(2)
    index = start + tl.arange(0, PAD)
    row = batch.to(tl.int64) * heads + head
    lse_out_ptr, delta_ptr = _row_sums(sums_ptr, row, queries)
    if start < queries:
        inside = index < queries
        out = out_desc.load([batch, head, start, 0]).reshape(PAD, BLOCK_D).to(tl.float32)
        dout = dout_desc.load([batch, head, start, 0]).reshape(PAD, BLOCK_D).to(tl.float32)
        delta = tl.sum(out * dout, 1)
        if HAS_DLSE:
            delta -= tl.load(dlse_ptr + row * queries + index, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row * queries + index, mask=inside, other=0.0)
        tl.store(lse_out_ptr + index, lse * 1.4426950408889634, mask=inside)
        tl.store(delta_ptr + index, delta, mask=inside)
    if (head == 0) & (start < keys):
        mask_offset = batch.to(tl.int64) * mask_stride
        first = _first_above(hi_ptr + mask_offset, queries, search_steps, index)
        end = _first_above(lo_ptr + mask_offset, queries, search_steps, index)
        if HAS_UNTIL:
            until = tl.load(until_ptr + batch.to(tl.int64) * until_stride + index, mask=index < keys, other=0)
            end = tl.minimum(end, until)
        offset = batch.to(tl.int64) * keys + index
        tl.store(first_ptr + offset, first, mask=index < keys)
        tl.store(end_ptr + offset, end, mask=index < keys)


@triton.jit
def _walk_keys(
    dq, q, dout, lse, delta, k_desc, v_desc, until_ptr, batch, kv_head, rows, lo, hi,
    start, end, left, full, count, scale_log2,
    MASKED: tl.constexpr, HAS_UNTIL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for i in tl.range(0, count):
        if MASKED:
            at, first = masked_block(i, start, end, left, full, BLOCK_K)
        else:
            at = start + (left + i) * BLOCK_K
        k = k_desc.load([batch, kv_head, at, 0]).reshape(BLOCK_K, BLOCK_D)
        v = v_desc.load([batch, kv_head, at, 0]).reshape(BLOCK_K, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        dweights = tl.dot(dout, v.T, input_precision=PRECISION)
        dscores = tl.exp2(scores * scale_log2 - lse[:, None]) * (dweights - delta[:, None])
        if MASKED or HAS_UNTIL:
            key = at + tl.arange(0, BLOCK_K)
            allowed = tl.full(scores.shape, True, tl.int1)
            if MASKED:
                allowed = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None]) & (key >= first)[None, :]
            if HAS_UNTIL:
                until = tl.load(until_ptr + key, mask=key >= 0, other=0)
                allowed = allowed & (rows[:, None] < until[None, :])
            dscores = tl.where(allowed, dscores, 0.0)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=["queries", "keys", "heads", "heads_per_wave", "mask_stride", "until_stride"],
    do_not_specialize_on_alignment=["sums_ptr", *MASK_POINTERS],
)
def dq_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, sums_ptr, lo_ptr, hi_ptr, until_ptr,
    queries, keys, heads, heads_per_wave, mask_stride, until_stride, scale, scale_log2,
    GROUP: tl.constexpr, HAS_UNTIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B, S, H, D]: the forward pass's walk, with the weights known."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, head, batch = tile_of_program(tiles, heads, heads_per_wave)
    first_row = (tiles - 1 - tile) * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    mask_offset = batch.to(tl.int64) * mask_stride
    lo, hi, start, end, full_start, full_end = load_intervals(
        lo_ptr + mask_offset, hi_ptr + mask_offset, rows, queries, keys
    )
    left, full, masked = split_range(start, end, full_start, full_end, BLOCK_K)
    until_ptr += batch.to(tl.int64) * until_stride

    q = q_desc.load([batch, head, first_row, 0]).reshape(BLOCK_Q, BLOCK_D)
    dout = dout_desc.load([batch, head, first_row, 0]).reshape(BLOCK_Q, BLOCK_D)
    lse_ptr, delta_ptr = _row_sums(sums_ptr, batch.to(tl.int64) * heads + head, queries)
    lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dq = _walk_keys(
        dq, q, dout, lse, delta, k_desc, v_desc, until_ptr, batch, head // GROUP, rows, lo, hi,
        start, end, left, full, full, scale_log2, False, HAS_UNTIL, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip
    dq = _walk_keys(
        dq, q, dout, lse, delta, k_desc, v_desc, until_ptr, batch, head // GROUP, rows, lo, hi,
        start, end, left, full, masked, scale_log2, True, HAS_UNTIL, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip
    dq_desc.store([batch, head, first_row, 0], (dq * scale).to(dq_desc.dtype).reshape(1, 1, BLOCK_Q, BLOCK_D))


@triton.jit
def _walk_queries(
    dk, dv, k, v, q_desc, dout_desc, sums_ptr, batch, first_head, heads, queries, seen_from, seen_to,
    start, end, left, full, count, scale_log2,
    GROUP: tl.constexpr, MASKED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The group's heads one after the other in a single loop, so that loads run ahead across heads as well."""
    for step in tl.range(0, count * GROUP):
        member, i = step // count, step % count
        if MASKED:
            at, first = masked_block(i, start, end, left, full, BLOCK_Q)
        else:
            at = start + (left + i) * BLOCK_Q
        head = first_head + member
        q = q_desc.load([batch, head, at, 0]).reshape(BLOCK_Q, BLOCK_D)
        dout = dout_desc.load([batch, head, at, 0]).reshape(BLOCK_Q, BLOCK_D)
        row = at + tl.arange(0, BLOCK_Q)
        lse_ptr, delta_ptr = _row_sums(sums_ptr, batch.to(tl.int64) * heads + head, queries)
        lse, delta = tl.load(lse_ptr + row), tl.load(delta_ptr + row)
        scores = tl.dot(k, q.T, input_precision=PRECISION)
        weights = tl.exp2(scores * scale_log2 - lse[None, :])
        if MASKED:
            allowed = (seen_from[:, None] <= row[None, :]) & (row[None, :] < seen_to[:, None]) & (row >= first)[None, :]
            weights = tl.where(allowed, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweights = tl.dot(v, dout.T, input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        if MASKED:
            dscores = tl.where(allowed, dscores, 0.0)  # not 0 * NaN where a key is padding
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=["queries", "keys", "heads", "kv_heads", "heads_per_wave"],
    do_not_specialize_on_alignment=["sums_ptr", *MASK_POINTERS],
)
def dkv_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, sums_ptr, first_ptr, end_ptr,
    queries, keys, heads, kv_heads, heads_per_wave, scale, scale_log2,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, K, G, D]: the walk over the transposed mask, whose intervals hold `until` already."""
    tile, kv_head, batch = tile_of_program(tl.cdiv(keys, BLOCK_K), kv_heads, heads_per_wave)
    first_key = tile * BLOCK_K
    columns = first_key + tl.arange(0, BLOCK_K)
    mask_offset = batch.to(tl.int64) * keys
    seen_from, seen_to, start, end, full_start, full_end = load_intervals(
        first_ptr + mask_offset, end_ptr + mask_offset, columns, keys, queries
    )
    left, full, masked = split_range(start, end, full_start, full_end, BLOCK_Q)

    k = k_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_K, BLOCK_D)
    v = v_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_K, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dk, dv = _walk_queries(
        dk, dv, k, v, q_desc, dout_desc, sums_ptr, batch, kv_head * GROUP, heads, queries, seen_from, seen_to,
        start, end, left, full, full, scale_log2, GROUP, False, BLOCK_Q, BLOCK_D, PRECISION,
    )  # fmt: skip
    dk, dv = _walk_queries(
        dk, dv, k, v, q_desc, dout_desc, sums_ptr, batch, kv_head * GROUP, heads, queries, seen_from, seen_to,
        start, end, left, full, masked, scale_log2, GROUP, True, BLOCK_Q, BLOCK_D, PRECISION,
    )  # fmt: skip
    dk_desc.store([batch, kv_head, first_key, 0], (dk * scale).to(dk_desc.dtype).reshape(1, 1, BLOCK_K, BLOCK_D))
    dv_desc.store([batch, kv_head, first_key, 0], dv.to(dv_desc.dtype).reshape(1, 1, BLOCK_K, BLOCK_D))

"""The mask's algebra against the mask written out: transposes, and what chunks of a sequence see of each other."""

import numpy as np
import pytest
import torch
from attention_cases import DEVICE, Case, dense, error, packs
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_kernels.span_attention import launch, reference
from mm_kernels.span_attention.intervals import chunk_mask, transpose
from mm_kernels.span_attention.op import backward, span_attention

from megatron_mm import mask as masks

CHUNK = 16
IMPLEMENTATIONS = {
    "triton": (lambda q, k, v, mask, until, scale: span_attention(q, k, v, mask, until, scale), backward),
    "reference": (reference.forward, reference.backward),
}


def rectangle(mask, until, keys):
    """bool [B, S, K] of rows lo and hi [B, 2, S] and until [B, K]."""
    key = torch.arange(keys)
    query = torch.arange(mask.shape[2])
    inside = (mask[:, 0, :, None] <= key) & (key < mask[:, 1, :, None])
    return inside & (query[:, None] < until[:, None, :])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(packs())
def test_a_transposed_mask_allows_the_same_pairs(mask):
    lo, hi, until = torch.from_numpy(mask).unbind(1)
    first, end = transpose(lo, hi, until, mask.shape[2]).unbind(1)
    query = torch.arange(mask.shape[2])
    seen = (first[:, :, None] <= query) & (query < end[:, :, None])
    assert torch.equal(seen.mT, torch.from_numpy(np.stack([masks.dense(row) for row in mask])))


def test_the_kernel_transposes_as_the_algebra_does():
    mask = np.stack(
        [
            masks.concatenate([masks.with_spans(90, [(4, 36), (40, 72)]), masks.causal(40)], 150),
            masks.concatenate([masks.hide_after(masks.causal(140), [(10, 50)])], 150),
        ]
    )
    case = Case(mask)
    inputs = case.inputs(torch.float32)
    rows = torch.from_numpy(mask).to(DEVICE)
    problem = launch.Problem(inputs["q"], inputs["k"], inputs["v"], rows[:, :2], rows[:, 2], 1.0)
    out, lse = span_attention(inputs["q"], inputs["k"], inputs["v"], rows, scale=1.0)
    _, transposed = launch.prepare(problem, out, lse, inputs["dout"], None)
    assert torch.equal(transposed.transpose(0, 1), transpose(*rows.unbind(1), 150))


@st.composite
def chunked(draw):
    """A mask of six chunks, and which of them the queries and the keys keep."""
    mask = draw(packs(rows=1))[..., : 6 * CHUNK]
    parts = [mask[0, :, : mask.shape[2]]]
    row = masks.concatenate(parts, 6 * CHUNK)[None]
    kept = st.sets(st.integers(0, 5), min_size=1).map(lambda chunks: [CHUNK * chunk for chunk in sorted(chunks)])
    return row, draw(kept), draw(kept)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(chunked())
def test_chunks_see_of_each_other_what_the_whole_mask_says(problem):
    mask, query_chunks, key_chunks = problem
    rows, until = chunk_mask(torch.from_numpy(mask), query_chunks, key_chunks, CHUNK)
    whole = torch.from_numpy(masks.dense(mask[0]))
    queries, keys = (torch.cat([torch.arange(c, c + CHUNK) for c in chunks]) for chunks in (query_chunks, key_chunks))
    assert torch.equal(rectangle(rows, until, len(keys))[0], whole[queries][:, keys])
    assert rows.dtype == until.dtype == torch.int32 and (rows.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_merged_chunks_are_the_whole_attention_forward_and_backward(implementation):
    """What a ring does: partial results merge by their log-sum-exp, and each chunk's gradients come from the merged."""
    forward, differentiate = IMPLEMENTATIONS[implementation]
    mask = masks.concatenate([masks.with_spans(50, [(5, 30)]), masks.hide_after(masks.causal(40), [(3, 20)])], 96)[None]
    case = Case(mask, heads=(4, 2))
    inputs = case.inputs(torch.float32)
    inputs["dlse"].zero_()
    q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
    scale = q.shape[-1] ** -0.5
    precise = [inputs[name].double().requires_grad_() for name in "qkv"]
    true_out, true_lse = dense(*precise, case.allowed)
    true_grads = torch.autograd.grad(true_out, precise, dout.double())

    owners = ([0, 80], [16, 64], [32, 48])  # a chunk from the front and one from the back, as zigzag rings have it
    rows_of = lambda t, chunks: torch.cat([t[:, c : c + CHUNK] for c in chunks], 1)  # noqa: E731
    rows = torch.from_numpy(mask).to(DEVICE)
    grads = [torch.zeros_like(t, dtype=torch.float64) for t in (q, k, v)]
    for mine in owners:
        parts = [
            (theirs, *chunk_mask(rows, mine, theirs, CHUNK), rows_of(k, theirs), rows_of(v, theirs))
            for theirs in owners
        ]
        partial = [forward(rows_of(q, mine), k_part, v_part, m, u, scale) for _, m, u, k_part, v_part in parts]
        outs, sums = (torch.stack(side) for side in zip(*partial, strict=True))
        lse = sums.logsumexp(0)
        weights = (sums - torch.where(lse == float("-inf"), 0.0, lse)).exp().transpose(2, 3)[..., None]
        out = (outs * weights).sum(0)
        assert error(out, rows_of(true_out, mine)) < 2e-6
        assert error(lse, torch.cat([true_lse[..., c : c + CHUNK] for c in mine], -1)) < 2e-6
        for theirs, m, u, k_part, v_part in parts:
            some = differentiate(rows_of(dout, mine), None, rows_of(q, mine), k_part, v_part, out, lse, m, u, scale)
            for total, part, chunks in zip(grads, some, (mine, theirs, theirs), strict=True):
                for i, c in enumerate(chunks):
                    total[:, c : c + CHUNK] += part[:, i * CHUNK : (i + 1) * CHUNK]
    for name, total, true in zip(("dq", "dk", "dv"), grads, true_grads, strict=True):
        assert error(total, true) < 5e-6, name


def test_chunks_that_overlap_or_leave_the_sequence_are_refused():
    mask = torch.from_numpy(masks.causal(64))[None]
    for chunks in ([16, 0], [0, 8], [-16], [56]):
        with pytest.raises(ValueError, match="must ascend without overlap"):
            chunk_mask(mask, [0], chunks, CHUNK)

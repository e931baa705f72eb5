"""The plain-torch span attention against a dense fp64 softmax (with every gradient) and flex_attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_kernels.span_attention import span_attention_reference
from mm_kernels.span_attention.reference import TILE, plan_tiles
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megatron_mm import mask as masks

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def dense_attention(q, k, v, allowed, scale=None):
    """softmax over allowed [B, S, K] written out; rows without a key are zero."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = allowed[:, None]
    weights = torch.where(allowed, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def inputs(batch, queries, heads, groups, width=8, keys=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda n, h: torch.randn(batch, n, h, width, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    keys = queries if keys is None else keys
    return make(queries, heads), make(keys, groups), make(keys, groups)


def with_gradients(function, qkv):
    out = function(*qkv)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad(out, qkv, weight)


def assert_matches(mask, heads=4, groups=2, dtype=torch.float64, atol=1e-11, scale=None):
    qkv = inputs(*mask.shape[::2], heads, groups, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    allowed = torch.from_numpy(np.stack([masks.dense(row) for row in mask]))
    got = with_gradients(lambda q, k, v: span_attention_reference(q, k, v, torch.from_numpy(mask), scale), qkv)
    want = with_gradients(lambda q, k, v: dense_attention(q, k, v, allowed, scale), exact)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    unanswered = ~allowed.any(-1)
    assert (got[0][unanswered] == 0).all() and (got[1][unanswered] == 0).all()
    unseen = ~allowed.any(1)
    assert (got[2][unseen] == 0).all() and (got[3][unseen] == 0).all()


@st.composite
def packs(draw):
    """Masks [B, 3, S] of random documents with spans, windows, hidden keys (even from everyone) and padding."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parts = []
        for n in draw(st.lists(st.integers(1, 30), max_size=4)):
            points = sorted(draw(st.lists(st.integers(0, n), max_size=4, unique=True)))
            spans = list(zip(points[::2], points[1::2], strict=False))
            part = masks.window(masks.with_spans(n, spans), draw(st.integers(1, n)))
            if draw(st.booleans()):
                part[2] = draw(st.lists(st.integers(0, n), min_size=n, max_size=n))
            parts.append(part)
        rows.append(parts)
    length = max(1, *(sum(p.shape[1] for p in parts) for parts in rows)) + draw(st.integers(0, 5))
    return np.stack([masks.concatenate(parts, length) for parts in rows])


@settings(deadline=None, max_examples=80, derandomize=True)
@given(packs(), st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]))
def test_random_packs_match_the_dense_softmax(mask, heads):
    assert_matches(mask, *heads)


@pytest.mark.parametrize("part", [masks.causal(300), masks.full(300), masks.window(masks.causal(300), 40)])
def test_documents_longer_than_a_tile_match(part):
    assert part.shape[1] > 2 * TILE
    assert_matches(np.stack([masks.concatenate([masks.causal(9), part], 320)]))


def test_fp32_and_a_scale_of_its_own():
    mask = np.stack([masks.concatenate([masks.with_spans(50, [(5, 40)]), masks.causal(60)], 128)])
    assert_matches(mask, dtype=torch.float32, atol=2e-5, scale=0.3)


def test_garbage_in_padding_does_not_leak():
    mask = torch.from_numpy(masks.concatenate([masks.causal(10), masks.causal(12)], 32))[None]
    q, k, v = (t.detach() for t in inputs(1, 32, 4, 2))
    clean = span_attention_reference(q, k, v, mask)
    for t in (q, k, v):
        t[:, 22:] = float("nan")
    qkv = [t.requires_grad_() for t in (q, k, v)]
    out, *gradients = with_gradients(lambda *a: span_attention_reference(*a, mask), qkv)
    torch.testing.assert_close(out, clean, atol=0, rtol=0)
    assert all(torch.isfinite(g).all() and (g[:, 22:] == 0).all() for g in gradients)


def test_nothing_but_padding_gives_zeros_and_zero_gradients():
    mask = torch.from_numpy(masks.concatenate([], 16))[None]
    results = with_gradients(lambda *a: span_attention_reference(*a, mask), inputs(1, 16, 2, 2))
    assert all((result == 0).all() for result in results)


@pytest.mark.parametrize("device", DEVICES)
def test_matches_flex_attention(device):
    rows = [
        masks.concatenate([masks.with_spans(40, [(3, 30)]), masks.hide_after(masks.causal(50), [(10, 20)])], 128),
        masks.concatenate([masks.full(70), masks.prefix(58, 11)], 128),
    ]
    mask = torch.from_numpy(np.stack(rows)).to(device)
    lo, hi, until = mask.unbind(1)
    predicate = lambda b, h, i, j: (lo[b, i] <= j) & (j < hi[b, i]) & (i < until[b, j])  # noqa: E731
    block_mask = create_block_mask(predicate, 2, None, 128, 128, device=device)

    def flex(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True).transpose(1, 2)

    qkv = [t.detach().to(device) for t in inputs(2, 128, 4, 2, width=16, dtype=torch.float32)]
    torch.testing.assert_close(span_attention_reference(*qkv, mask), flex(*qkv), atol=1e-5, rtol=1e-5)


def test_decoding_against_a_cache_repeats_the_full_pass():
    mask = masks.hide_after(masks.with_spans(20, [(4, 9)]), [(4, 9)])[None]
    q, k, v = inputs(1, 20, 4, 2)
    full = span_attention_reference(q, k, v, torch.from_numpy(mask))
    tail = torch.from_numpy(mask[:, :2, 12:])
    until, positions = torch.from_numpy(mask[:, 2]), torch.arange(12, 20)[None]
    out = span_attention_reference(q[:, 12:], k, v, tail, until=until, positions=positions)
    torch.testing.assert_close(out, full[:, 12:], atol=1e-12, rtol=0)
    seen = span_attention_reference(q[:, 12:], k, v, tail)
    assert (seen - out).abs().max() > 1e-3, "without `until` the hidden keys are seen"
    empty = span_attention_reference(q[:, 12:], k, v, torch.zeros_like(tail))
    assert (empty == 0).all()


def test_no_score_matrix_of_the_whole_row():
    rng = np.random.default_rng(0)
    parts = [masks.causal(int(n)) for n in rng.integers(50, 70, 16)]
    groups = plan_tiles(np.stack([masks.concatenate(parts, 1024)] * 4))
    assert len(groups) < 8, "documents share calls"
    assert sum(group.allowed.size for group in groups) < 4 * 1024 * 80, "no document sees a row's width"
    assert sum(group.keys.size for group in groups) < 4 * 1024 * 1.2, "and keys are gathered once"


def test_work_on_a_long_document_follows_the_mask_s_area():
    for part in (masks.causal(2048), masks.window(masks.causal(2048), 100)):
        scores = sum(group.allowed.size for group in plan_tiles(part[None]))
        assert scores < 1.2 * masks.area(part) + 2048 * TILE


def test_misfitting_shapes_are_refused():
    q, k, v = inputs(1, 8, 4, 2)
    mask = torch.from_numpy(masks.causal(8))[None]
    with pytest.raises(ValueError, match="mask is"):
        span_attention_reference(q, k, v, mask[:, :, :7])
    with pytest.raises(ValueError, match="H a multiple of G"):
        span_attention_reference(q[:, :, :3], k, v, mask)
    with pytest.raises(ValueError, match="until and positions"):
        span_attention_reference(q, k, v, mask, until=mask[:, 2])

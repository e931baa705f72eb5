"""The plain-torch span attention against a dense fp64 softmax (with every gradient) and flex_attention."""

import numpy as np
import pytest
import torch
from attention_cases import DEVICE, NAMES, Case, error, exact, packs
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_kernels.span_attention import reference, span_attention_reference
from mm_kernels.span_attention.plan import TILE, plan_tiles
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megatron_mm import mask as masks


def assert_matches(case, dtype=torch.float64, atol=1e-11):
    """Both ways to compute it: torch's attention, which gives the output, and the softmax written out."""
    inputs = case.inputs(dtype)
    mask = torch.from_numpy(case.mask).to(DEVICE)
    truth = exact(case, inputs)
    scale = case.width**-0.5 if case.scale is None else case.scale
    q, k, v, dout, dlse = (inputs[name] for name in ("q", "k", "v", "dout", "dlse"))
    out, lse = reference.forward(q, k, v, mask, None, scale)
    written_out = (out, lse, *reference.backward(dout, dlse, q, k, v, out, lse, mask, None, scale))
    for name, result, true in zip(NAMES, written_out, truth, strict=True):
        assert error(result, true) < atol, name
        assert result.dtype == dtype

    without = exact(case, inputs | {"dlse": torch.zeros_like(dlse)})
    attended = with_output(lambda *qkv: span_attention_reference(*qkv, mask, scale=case.scale), inputs)
    for name, result, true in zip(("out", "dq", "dk", "dv"), attended, (without[0], *without[2:]), strict=True):
        assert error(result, true) < atol, name
        assert result.dtype == dtype
    for out, dq, dk, dv in (attended, (written_out[0], *written_out[2:])):
        unanswered, unseen = ~case.allowed.any(-1).to(DEVICE), ~case.allowed.any(1).to(DEVICE)
        assert (out[unanswered] == 0).all() and (dq[unanswered] == 0).all()
        assert (dk[unseen] == 0).all() and (dv[unseen] == 0).all()


def with_output(function, inputs):
    """(out, dq, dk, dv) of a function of q, k, v."""
    qkv = [inputs[name].detach().clone().requires_grad_() for name in "qkv"]
    out = function(*qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, inputs["dout"])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(packs(), st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]))
def test_random_packs_match_the_dense_softmax(mask, heads):
    assert_matches(Case(mask, heads, width=8))


@pytest.mark.parametrize("part", [masks.causal(300), masks.full(300), masks.window(masks.causal(300), 40)])
def test_documents_longer_than_a_tile_match(part):
    assert part.shape[1] > 2 * TILE
    assert_matches(Case(np.stack([masks.concatenate([masks.causal(9), part], 320)])))


def test_fp32_and_a_scale_of_its_own():
    mask = np.stack([masks.concatenate([masks.with_spans(50, [(5, 40)]), masks.causal(60)], 128)])
    assert_matches(Case(mask, scale=0.3), dtype=torch.float32, atol=2e-5)


def test_garbage_in_padding_does_not_leak():
    case = Case(masks.concatenate([masks.causal(10), masks.causal(12)], 32)[None], heads=(4, 2))
    inputs = case.inputs(torch.float64)
    mask = torch.from_numpy(case.mask).to(DEVICE)
    clean = span_attention_reference(*(inputs[name] for name in "qkv"), mask)
    for name in "qkv":
        inputs[name][:, 22:] = float("nan")
    out, *gradients = with_output(lambda *qkv: span_attention_reference(*qkv, mask), inputs)
    torch.testing.assert_close(out, clean, atol=0, rtol=0)
    assert all(torch.isfinite(g).all() and (g[:, 22:] == 0).all() for g in gradients)


def test_nothing_but_padding_gives_zeros_and_zero_gradients():
    assert_matches(Case(masks.concatenate([], 16)[None]), atol=1e-300)


def test_matches_flex_attention():
    rows = [
        masks.concatenate([masks.with_spans(40, [(3, 30)]), masks.hide_after(masks.causal(50), [(10, 20)])], 128),
        masks.concatenate([masks.full(70), masks.prefix(58, 11)], 128),
    ]
    case = Case(np.stack(rows), heads=(4, 2))
    mask = torch.from_numpy(case.mask).to(DEVICE)
    lo, hi, until = mask.unbind(1)
    predicate = lambda b, h, i, j: (lo[b, i] <= j) & (j < hi[b, i]) & (i < until[b, j])  # noqa: E731
    block_mask = create_block_mask(predicate, 2, None, 128, 128, device=DEVICE)
    qkv = [case.inputs(torch.float32)[name] for name in "qkv"]
    flex = flex_attention(*(t.transpose(1, 2) for t in qkv), block_mask=block_mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(span_attention_reference(*qkv, mask), flex, atol=1e-5, rtol=1e-5)


def test_no_score_matrix_of_the_whole_row():
    rng = np.random.default_rng(0)
    parts = [masks.causal(int(n)) for n in rng.integers(50, 70, 16)]
    groups = plan_tiles(np.stack([masks.concatenate(parts, 1024)] * 4)[:, :2])
    assert len(groups) < 8, "documents share calls"
    assert sum(group.allowed.size for group in groups) < 4 * 1024 * 80, "no document sees a row's width"
    assert sum(group.keys.size for group in groups) < 4 * 1024 * 1.2, "and keys are gathered once"


def test_work_on_a_long_document_follows_the_mask_s_area():
    for part in (masks.causal(2048), masks.window(masks.causal(2048), 100)):
        scores = sum(group.allowed.size for group in plan_tiles(part[None, :2]))
        assert scores < 1.2 * masks.area(part) + 2048 * TILE


def test_layers_that_see_one_mask_share_its_tiles(monkeypatch):
    """By the mask's numbers: a copy is the same mask, and one that was overwritten is another."""
    planned = []
    monkeypatch.setattr(reference, "plan_tiles", lambda *mask: planned.append(mask) or plan_tiles(*mask))
    reference._planned.cache_clear()
    first, second = (Case(masks.concatenate(parts, 64)[None]) for parts in ([masks.causal(60)], [masks.full(60)]))
    inputs = first.inputs(torch.float64)
    mask = torch.from_numpy(first.mask.copy()).to(DEVICE)
    attend = lambda: span_attention_reference(*(inputs[name] for name in "qkv"), mask)  # noqa: E731
    outs = [attend(), attend()]
    mask = mask.clone()
    outs.append(attend())
    assert len(planned) == 1 and all(torch.equal(out, outs[0]) for out in outs)
    mask.copy_(torch.from_numpy(second.mask))
    assert error(attend(), exact(second, inputs)[0]) < 1e-11 and len(planned) == 2

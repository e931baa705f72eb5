"""The Triton kernels against a dense softmax in fp64, by the rule of flash-attention's own tests: no error larger than
a small multiple of what torch's own arithmetic makes in the same precision. Without a GPU in Triton's interpreter."""

import numpy as np
import pytest
import torch
from attention_cases import DEVICE, NAMES, Case, dense, error, exact, packs, with_gradients
from devices import ON_KERNEL_DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_kernels.span_attention import launch
from mm_kernels.span_attention.configs import TileConfig, candidates
from mm_kernels.span_attention.op import backward, span_attention
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from megatron_mm import mask as masks

pytestmark = ON_KERNEL_DEVICE
# Triton's interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]


def attend(case):
    mask = torch.from_numpy(case.mask).to(DEVICE)
    return lambda q, k, v: span_attention(q, k, v, mask, scale=case.scale)


def assert_as_exact_as_torch(case, dtype=torch.float32, function=None):
    """Ours may err twice as much as torch in the same dtype (four times where a GPU puts fp32 products together from
    three in tf32, which drops what lies below the 22nd bit), plus an ulp of the largest term that is summed up: where a
    query sees one key, everything in dq but dlse cancels, and torch's own error is a matter of luck."""
    inputs = case.inputs(dtype)
    truth = exact(case, inputs)
    ours = with_gradients(function or attend(case), inputs)
    torchs = with_gradients(lambda q, k, v: dense(q, k, v, case.allowed, case.scale), inputs)
    largest = largest_terms(inputs)
    multiple = 4 if DEVICE.type == "cuda" and dtype == torch.float32 else 2
    for name, result, own, true in zip(NAMES, ours, torchs, truth, strict=True):
        limit = multiple * (error(own, true) + torch.finfo(result.dtype).eps * largest[name] / 2)
        assert error(result, true) <= limit, f"{name}: {error(result, true)} > {limit}"
    unanswered = ~case.allowed.any(-1).to(DEVICE)
    assert (ours[0][unanswered] == 0).all() and (ours[2][unanswered] == 0).all()
    unseen = ~case.allowed.any(1).to(DEVICE)
    assert (ours[3][unseen] == 0).all() and (ours[4][unseen] == 0).all()


def largest_terms(inputs):
    """What is added up into each result, at its largest."""
    q, k, v, dout, dlse = (inputs[name].double().abs() for name in ("q", "k", "v", "dout", "dlse"))
    dscores = (dout.norm(dim=-1).max() * v.norm(dim=-1).max() + dlse.max()).item() * q.shape[-1] ** -0.5
    scores = (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item() * q.shape[-1] ** -0.5
    terms = (v.max().item(), scores, dscores * k.max().item(), dscores * q.max().item(), dout.max().item())
    return dict(zip(NAMES, terms, strict=True))


def documents(*parts, length):
    return np.stack([masks.concatenate(parts, length)])


NAMED = {
    "full": documents(masks.full(150), length=150),
    "causal": documents(masks.causal(150), length=150),
    "docs": documents(*(masks.causal(n) for n in (3, 70, 1, 66)), length=150),
    "interleaved": documents(
        masks.with_spans(90, [(4, 36), (40, 72)]), masks.with_spans(50, [(10, 42)]), masks.causal(7), length=150
    ),
    "t2i": documents(*(masks.with_spans(n, [(n - 17, n - 1)]) for n in (25, 22, 30, 28, 24)), length=150),
    "prefix": documents(masks.prefix(80, 33), masks.prefix(64, 50), length=150),
    "mmada": documents(masks.full(61), masks.full(80), length=150),
    "window": documents(masks.window(masks.causal(150), 40), length=150),
    "noised copies": documents(
        masks.hide_after(masks.with_spans(120, [(5, 45), (60, 100)]), [(5, 45)]), masks.causal(20), length=150
    ),
    "nothing": documents(length=150),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_masks(name, dtype):
    assert_as_exact_as_torch(Case(NAMED[name], heads=(2, 1), width=32), dtype)


@pytest.mark.slow
@settings(deadline=None, max_examples=25, derandomize=True)
@given(packs(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([16, 24]))
def test_random_packs(mask, heads, width):
    assert_as_exact_as_torch(Case(mask, heads, width))


@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_head_dimensions_of_real_models(width):
    assert_as_exact_as_torch(
        Case(NAMED["interleaved"][..., :70].clip(max=70), heads=(2, 2), width=width), torch.float16
    )


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (32, 32)])
def test_every_tile_size_gives_the_same_result(blocks, monkeypatch):
    config = TileConfig(*blocks, num_warps=4, num_stages=1)
    monkeypatch.setattr("mm_kernels.span_attention.op.choose", lambda *_: config)
    for name in ("interleaved", "noised copies", "window"):
        assert_as_exact_as_torch(Case(NAMED[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_choice_of_the_tuner_is_right(width, number, monkeypatch):
    """The candidates of each kernel by their number, as long as there are more."""

    def candidate(kernel, problem, run):
        configs = candidates(kernel, problem.head_dim, problem.q.element_size())
        return configs[number % len(configs)]

    monkeypatch.setattr("mm_kernels.span_attention.op.choose", candidate)
    for name in ("interleaved", "noised copies"):
        assert_as_exact_as_torch(Case(NAMED[name], heads=(2, 1), width=width), torch.float16)


def test_a_scale_of_its_own():
    assert_as_exact_as_torch(Case(NAMED["docs"], scale=0.3))


def test_without_hidden_keys_the_mask_s_third_row_may_be_left_out():
    case = Case(NAMED["interleaved"])
    mask = torch.from_numpy(case.mask).to(DEVICE)
    assert_as_exact_as_torch(case, function=lambda q, k, v: span_attention(q, k, v, mask[:, :2]))


def test_matches_flex_attention_with_the_same_predicate():
    mask = torch.from_numpy(np.concatenate([NAMED["noised copies"], NAMED["prefix"]])[..., :128].clip(max=128)).to(
        DEVICE
    )
    lo, hi, until = mask.unbind(1)
    predicate = lambda b, h, i, j: (lo[b, i] <= j) & (j < hi[b, i]) & (i < until[b, j])  # noqa: E731
    block_mask = create_block_mask(predicate, 2, None, 128, 128, device=DEVICE)
    inputs = Case(mask.cpu().numpy(), heads=(4, 2)).inputs(torch.float32)

    def flex(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, aux = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        return out.transpose(1, 2), aux.lse

    ours = with_gradients(lambda q, k, v: span_attention(q, k, v, mask), inputs)
    # On a CPU flex_attention has no backward.
    flexs = with_gradients(flex, inputs) if DEVICE.type == "cuda" else flex(*(inputs[name] for name in "qkv"))
    for name, result, theirs in zip(NAMES, ours, flexs, strict=False):
        torch.testing.assert_close(result, theirs, atol=2e-6, rtol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", ["SBHD", "fused qkv"])
def test_strided_inputs_need_no_copy_and_keep_their_layout(layout):
    case = Case(np.concatenate([NAMED["docs"], NAMED["prefix"]])[..., :64].clip(max=64), heads=(2, 2))
    inputs = case.inputs(torch.float32)
    if layout == "SBHD":
        inputs |= {name: inputs[name].transpose(0, 1).contiguous().transpose(0, 1) for name in "qkv"}
    else:
        mixed = torch.full((2, 64, 2, 4, 16), float("nan"), device=DEVICE)
        for i, name in enumerate("qkv"):
            mixed[..., i, :] = inputs[name]
            inputs[name] = mixed[..., i, :]
    mask = torch.from_numpy(case.mask).to(DEVICE)
    out, _ = span_attention(inputs["q"], inputs["k"], inputs["v"], mask)
    assert out.stride() == torch.empty_like(inputs["q"]).stride()
    torch.testing.assert_close(out.double(), exact(case, inputs)[0], atol=1e-6, rtol=0)


def test_unwritten_memory_and_garbage_in_padding_do_not_leak(monkeypatch):
    """Results go to memory full of NaN, and padding holds NaN: neither may be seen."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    poison = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-1)  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    for mask in (NAMED["interleaved"], documents(masks.causal(9), length=40)):
        used = int(mask[0, 1].max())
        case = Case(mask)
        inputs = case.inputs(torch.float32)
        clean = exact(case, inputs)
        for name in ("q", "k", "v", "dout"):
            inputs[name][:, used:] = float("nan")
        q, k, v, dout = (inputs[name] for name in ("q", "k", "v", "dout"))
        rows = torch.from_numpy(mask).to(DEVICE)
        out, lse = span_attention(q, k, v, rows)
        scale = q.shape[-1] ** -0.5
        gradients = backward(dout, inputs["dlse"], q, k, v, out, lse, rows[:, :2], rows[:, 2], scale)
        for result, true in zip((out, lse, *gradients), clean, strict=True):
            assert error(result, true) < 1e-5


def test_twice_gives_the_same_bits():
    case = Case(NAMED["noised copies"], heads=(4, 1))
    inputs = case.inputs(torch.float32)
    for once, again in zip(with_gradients(attend(case), inputs), with_gradients(attend(case), inputs), strict=True):
        assert torch.equal(once, again)


def test_more_heads_than_fit_into_l2_run_in_waves(monkeypatch):
    monkeypatch.setattr(launch, "L2_SHARE", 2 * 150 * 16 * 4 * 2)
    assert_as_exact_as_torch(Case(np.concatenate([NAMED["docs"], NAMED["window"]]), heads=(6, 3)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"k": torch.zeros(1, 8, 3, 16)}, "do not fit"),
        ({"k": torch.zeros(1, 8, 3, 16), "v": torch.zeros(1, 8, 3, 16)}, "H a multiple of G"),
        ({"k": torch.zeros(1, 8, 2, 16).half()}, "expected one dtype"),
        ({"mask": torch.zeros(1, 3, 7, dtype=torch.int32)}, r"The mask is \[1, 3, 7\]"),
        ({"mask": torch.zeros(1, 3, 8)}, "expected int32"),
        ({"until": torch.zeros(1, 8, dtype=torch.int32)}, "three rows"),
        ({"scale": 0.0}, "must be positive"),
        ({name: torch.zeros(1, 8, 2, 6) for name in "qkv"}, "16 bytes"),
        ({name: torch.zeros(1, 8, 2, 16).double() for name in "qkv"}, "bfloat16, float16 and float32"),
    ],
)
def test_misfits_are_refused_with_a_sentence(change, why):
    good = {name: torch.zeros(1, 8, 2, 16) for name in "qkv"} | {"mask": torch.zeros(1, 3, 8, dtype=torch.int32)}
    with pytest.raises(ValueError, match=why):
        span_attention(**good | change)

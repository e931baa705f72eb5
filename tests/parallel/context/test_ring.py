"""Attention over keys of several ranks is attention over all keys at once, with its gradients, however they travel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from context_cases import spread
from distributed import run_ranks
from mm_kernels.span_attention import op, reference

from megatron_mm import mask as masks
from megatron_mm.parallel.context import assignment as assignments

pytestmark = pytest.mark.usefixtures("small_chunks")
S, D, HEADS, GROUPS = 384, 8, 4, 2
SPANS = [(30, 110), (140, 204)]
SPAN = masks.with_spans(230, SPANS)
ROWS = {
    "causal": [[masks.causal(S)]],
    "full": [[masks.full(S)]],
    "packed": [[SPAN, masks.causal(20), masks.full(90)], [masks.causal(300), masks.prefix(84, 40)]],
    "hidden": [[masks.hide_after(SPAN, SPANS[:1]), masks.hide_after(masks.causal(150), [(9, 99)])]],
    "padding": [[SPAN], [masks.causal(10)]],
    "hardly_any": [[masks.causal(10)]],
    "window": [[masks.window(masks.causal(S), 50)]],
}
"""name -> the documents of each row."""


def rows(name: str) -> np.ndarray:
    """int32 [B, 3, S]."""
    return np.stack([masks.concatenate(documents, S) for documents in ROWS[name]])


def inputs(batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS, "dout": HEADS}
    return {
        name: torch.randn(S, batch, count, D, generator=generator, dtype=torch.float64).to(dtype)
        for name, count in heads.items()
    }


def dense(mask: np.ndarray) -> list[torch.Tensor]:
    """out, dq, dk, dv in fp64 by torch, [S, B, ...], with the mask written out."""
    allowed = torch.from_numpy(np.stack([masks.dense(row) for row in mask]))[:, None]
    live = allowed.any(-1, keepdim=True)
    tensors = inputs(len(mask), torch.float64)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    q, k, v = (leaf.permute(1, 2, 0, 3) for leaf in leaves)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~live, enable_gqa=True).where(live, 0.0)
    out = out.permute(2, 0, 1, 3)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors["dout"])]


def assert_dense(name, comm, ranks, inner=1, cut="assign", dtype=torch.float64, attend=reference, tolerance=1e-12):
    mask = rows(name)
    assignment = getattr(assignments, cut)(mask if cut == "assign" else S, ranks // inner)
    parts = run_ranks(spread, ranks, inputs(len(mask), dtype), mask, assignment, comm, inner, attend)
    where = torch.cat([part[-1] for part in parts])
    assert torch.equal(where.sort().values, torch.arange(S))
    for number, truth in enumerate(dense(mask)):
        ours = torch.cat([part[number] for part in parts])
        torch.testing.assert_close(ours, truth[where].to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("comm", "ranks", "inner"), [("ring", 3, 1), ("exchange", 4, 1), ("ring", 4, 2), ("exchange", 2, 2)]
)
def test_every_mask(name, comm, ranks, inner):
    assert_dense(name, comm, ranks, inner)


@pytest.mark.parametrize("cut", ["contiguous", "zigzag"])
@pytest.mark.parametrize("comm", ["ring", "exchange"])
def test_other_cuts(comm, cut):
    assert_dense("packed", comm, 3, cut=cut)


def test_more_ranks_than_key_heads():
    assert_dense("packed", "exchange", 4, inner=4)


@pytest.mark.parametrize("comm", ["ring", "exchange"])
def test_the_span_kernel(comm):
    """In fp32, whose own error in plain attention is some 1e-6 here; without a GPU in Triton's interpreter."""
    assert_dense("hidden", comm, 2, dtype=torch.float32, attend=op, tolerance=1e-5)

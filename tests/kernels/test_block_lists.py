"""Lists of blocks against the dense mask: every allowed pair is in a listed block, full blocks hold nothing else."""

import numpy as np
import pytest
import torch
from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS, mask
from mm_kernels.span_attention.block_lists import block_kinds, block_lists
from mm_kernels.span_attention.reference import span_attention_reference
from torch.nn.attention.flex_attention import create_block_mask

from megatron_mm import mask as masks

HIDING = masks.concatenate(
    [masks.with_spans(300, [(40, 200)]), masks.hide_after(masks.causal(200), [(3, 90)]), masks.causal(40)], 700
)


def rows_of(name: str, length: int) -> torch.Tensor:
    """A batch of two rows, [2, 2 or 3, S]."""
    if name == "hiding":
        return torch.from_numpy(np.stack([HIDING, masks.concatenate([masks.causal(700)], 700)]))
    return torch.from_numpy(np.stack([mask(name, length, row) for row in range(2)]))


def dense(rows: torch.Tensor) -> torch.Tensor:
    """bool [B, S, S]."""
    index = torch.arange(rows.shape[2])
    allowed = (rows[:, 0, :, None] <= index) & (index < rows[:, 1, :, None])
    return allowed if rows.shape[1] == 2 else allowed & (index[:, None] < rows[:, 2, None])


@pytest.mark.parametrize("blocks", [(128, 128), (256, 128), (64, 32)])
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, "hiding"])
def test_lists_hold_what_the_mask_allows(name, blocks):
    rows = rows_of(name, 700)  # the last blocks are not full
    allowed = dense(rows)
    size = allowed.shape[1]
    by_query, by_key = block_lists(rows, *blocks)
    for lists, pairs, (across, along) in ((by_query, allowed, blocks), (by_key, allowed.mT, blocks[::-1])):
        walked = torch.zeros_like(pairs)
        for b, n in np.ndindex(*lists.full_count[:, 0].shape):
            counts = [int(count[b, 0, n]) for count in (lists.masked_count, lists.full_count)]
            parts = [index[b, 0, n, :count] for index, count in zip((lists.masked, lists.full), counts, strict=True)]
            for listed, whole in zip(parts, (False, True), strict=True):
                assert (listed.diff() > 0).all(), "ascending, none twice"
                for m in listed.tolist():
                    place = (b, slice(n * across, (n + 1) * across), slice(m * along, (m + 1) * along))
                    assert not walked[place].any(), "masked or full, not both"
                    walked[place] = True
                    assert not whole or pairs[place].all()
        assert not (pairs & ~walked).any() and walked.shape[1] == size
        assert all(part.dtype == torch.int32 and part.is_contiguous() for part in vars(lists).values())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_more_than_torchs_own_block_mask(name):
    """FlexAttention finds the same blocks by evaluating every pair."""
    rows = rows_of(name, 1024)
    allowed = dense(rows)
    theirs = create_block_mask(lambda b, h, q, k: allowed[b, q, k], 2, None, 1024, 1024, device="cpu")
    needed, full = block_kinds(rows, 128, 128)
    assert torch.equal(theirs.kv_num_blocks[:, 0], (needed & ~full).sum(-1))
    assert torch.equal(theirs.full_kv_num_blocks[:, 0], full.sum(-1))


def test_nothing_waits_for_the_host():
    """On the meta device, whose values nobody can read."""
    for lists in block_lists(torch.empty(2, 3, 1000, dtype=torch.int32, device="meta"), 128, 128):
        assert all(part.device.type == "meta" for part in vars(lists).values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, "hiding"])
def test_flash_attention_4_is_the_reference(name):
    """In bf16 (8 bits) against fp64 on the same inputs, forward and backward; HIDING ends in padding."""
    pytest.importorskip("flash_attn.cute")
    from mm_kernels.span_attention.flash4 import attend

    rows = rows_of(name, 700).cuda()
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 700, heads, 64, device="cuda").bfloat16() for heads in (4, 2, 2, 4))
    results = []
    for function, dtype in ((attend, torch.bfloat16), (span_attention_reference, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = function(*leaves, rows)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2**-6 * float(exact.abs().max()))

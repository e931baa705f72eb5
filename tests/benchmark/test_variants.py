"""Peers compute what they say: FlexAttention our masks, the causal one plain rows.

Forward only, since FlexAttention has no backward pass on a CPU.
"""

import numpy as np
import pytest
import torch
from mm_kernels.span_attention.reference import span_attention_reference

from megatron_mm import mask
from megatron_mm.benchmark.variants import CausalAttention, FlexAttention
from megatron_mm.types import PackedBatch

S, HEADS, GROUPS, D = 160, 4, 2, 16


def batch_of(*rows: np.ndarray) -> PackedBatch:
    meta = np.concatenate([np.stack(rows), np.zeros((len(rows), 2, S), np.int32)], axis=1)
    return PackedBatch(torch.zeros(len(rows), S).long(), torch.from_numpy(meta), {}, np.zeros((0, 4), np.int32), 1, S)


def qkv(rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, S, heads, D, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]


@pytest.fixture
def two_batches() -> list[PackedBatch]:
    """Spans, padding, and keys that later queries may not see; another mask in the second batch."""
    spans = mask.concatenate([mask.with_spans(90, [(10, 40), (60, 80)]), mask.causal(50)], S)
    hidden = mask.concatenate([mask.hide_after(mask.with_spans(130, [(20, 70)]), [(20, 70)])], S)
    return [batch_of(spans, hidden), batch_of(hidden, mask.concatenate([mask.full(S)], S))]


@pytest.mark.parametrize("mask_rows", [2, 3])
def test_flex_attention(two_batches, mask_rows):
    flex = FlexAttention(mask_rows)
    q, k, v = qkv(2)
    for batch in two_batches:
        flex.prepare(batch)
        expected = span_attention_reference(q, k, v, batch.mask[:, :mask_rows])
        torch.testing.assert_close(flex(q, k, v, batch.mask), expected, rtol=1e-5, atol=1e-5)


def test_causal_attention(two_batches):
    q, k, v = qkv(1)
    causal = torch.from_numpy(mask.concatenate([mask.causal(S)], S))[None]
    ours = CausalAttention(3)(q, k, v, two_batches[0].mask[:1])
    torch.testing.assert_close(ours, span_attention_reference(q, k, v, causal), rtol=1e-5, atol=1e-5)

"""The backends agree with each other, and each is chosen only where it can run."""

import importlib.util

import numpy as np
import pytest
import torch
from mm_kernels.span_attention.reference import span_attention_reference

from megatron_mm import mask
from megatron_mm.nn.attention import BACKENDS, dense_sdpa, select

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def packed_masks() -> torch.Tensor:
    """Two rows: documents with image spans, a noised copy that hides itself later, and padding."""
    spans = mask.with_spans(30, [(4, 13), (20, 25)])
    rows = [
        mask.concatenate([spans, mask.causal(9), mask.hide_after(mask.with_spans(12, [(2, 6)]), [(2, 6)])], 64),
        mask.concatenate([mask.full(20), mask.prefix(31, 8)], 64),
    ]
    return torch.from_numpy(np.stack(rows))


def test_dense_sdpa_is_the_reference_forward_and_backward():
    torch.manual_seed(0)
    q = torch.randn(2, 64, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 64, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 64, 4, 8, dtype=torch.float64)
    results = []
    for attend in (dense_sdpa, span_attention_reference):  # the span kernel: tests/kernels
        out = attend(q, k, v, packed_masks())
        results.append([out, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert results[0][0][0, 51:].abs().max() == 0 and results[0][1][0, 51:].abs().max() == 0  # padding


@pytest.mark.parametrize("causal", [True, False])
def test_auto_runs_everywhere(causal):
    assert select("auto", CPU, torch.float32, causal, 64)[0] == "reference"
    assert select("auto", CUDA, torch.float32, causal, 64)[0] == "sdpa"
    assert select("auto", CUDA, torch.bfloat16, causal, 64)[0] == "span"
    assert select("auto", CUDA, torch.bfloat16, causal, 20)[0] == "sdpa"
    assert set(BACKENDS) == {"span", "reference", "sdpa", "flash", "fa4"}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "causal", "why"),
    [
        ("flash", CPU, torch.bfloat16, True, "CUDA"),
        ("flash", CUDA, torch.float32, True, "bf16"),
        ("flash", CUDA, torch.bfloat16, False, "causal"),
        ("fa4", CPU, torch.bfloat16, False, "CUDA"),
        ("fa4", CUDA, torch.float32, False, "bf16 or fp16"),
        ("span", CUDA, torch.float64, True, "float64"),
    ],
)
def test_a_backend_says_why_it_cannot_run(name, device, dtype, causal, why):
    with pytest.raises(ValueError, match=f"attention.backend={name} cannot run: .*{why}.*attention.backend=auto"):
        select(name, device, dtype, causal, 64)


def test_flash4_asks_for_small_heads_and_its_package():
    with pytest.raises(ValueError, match="head dimension of 256"):
        select("fa4", CUDA, torch.bfloat16, False, 256)
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ValueError, match="pip install --pre flash-attn-4"):
            select("fa4", CUDA, torch.bfloat16, False, 128)


def test_the_span_kernel_asks_for_cuda_or_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA"):
        select("span", CPU, torch.float32, False, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("span", CPU, torch.float32, False, 64) == ("span", "asked for")

"""How a call is timed: forward and backward by device events, in milliseconds, with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from mm_kernels.span_attention.benchmark.peers import Call, Case


def forward_backward(
    call: Call, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor, milliseconds: int
) -> tuple[float, float]:
    """Medians of forward and of backward. The first call compiles and tunes and is not counted."""
    out = call()
    if out.shape != dout.shape:
        dout = dout.transpose(1, 2).contiguous() if out.ndim == 4 else dout.flatten(0, 1)
    backward = lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)  # noqa: E731
    backward()
    return median(call, out.device, milliseconds), median(backward, out.device, milliseconds)


def median(call: Callable[[], object], device: torch.device, milliseconds: int) -> float:
    """Median milliseconds of `call`, over about `milliseconds` of repetitions."""
    if device.type == "cuda":
        from triton.testing import do_bench  # Triton is not a dependency on a CPU

        return do_bench(call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")
    times: list[float] = []
    while sum(times) * 1e3 < milliseconds or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def matrix_rate(device: torch.device) -> float | None:
    """The card's bf16 matrix rate in TFLOP/s: a product of two random 8192 x 8192 matrices. None on a CPU."""
    if device.type != "cuda":
        return None
    a, b = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device).unbind()
    return 2 * 8192**3 / median(lambda: a @ b, device, 200) / 1e9


def wrong(call: Call, case: Case) -> float:
    """Largest error of the first row's first head against fp64, as a multiple of what rounding the result costs."""
    q, k, v, _ = case.qkv
    q, k, v = (t[:1, :, :1].detach().double() for t in (q, k, v))
    lo, hi = case.mask[:1, :, :, None].unbind(1)
    key = torch.arange(case.length, device=case.device)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
    weights = scores.masked_fill(~((lo <= key) & (key < hi))[:, None], float("-inf")).softmax(-1)
    truth = torch.einsum("bhqk,bkhd->bqhd", weights, v)[0, :, 0]
    out = call().detach()
    if out.ndim == 3:
        out = out.unflatten(0, (case.batch, case.length))
    elif out.shape[1] == case.heads and case.heads != case.length:
        out = out.transpose(1, 2)
    return ((out[0, :, 0].double() - truth).abs().max() / (torch.finfo(case.dtype).eps * truth.abs().max())).item()

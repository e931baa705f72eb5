"""The operator inside torch.compile, recompute and CUDA graphs; the kernels as the compilers for Hopper and
Blackwell see them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from attention_cases import DEVICE, Case
from devices import ON_KERNEL_DEVICE
from mm_kernels.span_attention import op
from mm_kernels.span_attention.configs import TileConfig, candidates
from mm_kernels.span_attention.launch import Problem
from mm_kernels.span_attention.tuning import Table, choose
from torch.utils.checkpoint import checkpoint

from megatron_mm import mask as masks

pytestmark = ON_KERNEL_DEVICE
MASK = masks.concatenate([masks.with_spans(40, [(4, 36)]), masks.hide_after(masks.causal(20), [(3, 9)])], 64)[None]


def problem(dtype=torch.float32):
    inputs = Case(MASK, heads=(4, 2)).inputs(dtype)
    return [inputs[name].requires_grad_() for name in "qkv"], torch.from_numpy(MASK).to(DEVICE)


def attend_twice(q, k, v, mask):
    """Something around the operator for a compiler to work on, with both results used."""
    out, lse = op.span_attention(q * 1.5, k, v, mask)
    again, _ = op.span_attention(out + q, k, v, mask)
    return again.tanh() + lse.masked_fill(lse.isinf(), 0.0).transpose(1, 2)[..., None]


def results(function, qkv, mask):
    out = function(*qkv, mask)
    return out, *torch.autograd.grad(out.square().sum(), qkv)


def test_the_operator_keeps_what_it_promises_to_torch():
    """Schema, fake implementation and autograd registration, by torch's own check."""
    (q, k, v), mask = problem()
    for until in (None, mask[:, 2]):
        torch.library.opcheck(op.forward, (q, k, v, mask[:, :2], until, 0.25))
    out, lse = op.span_attention(q, k, v, mask, scale=0.25)
    torch.library.opcheck(
        op.backward,
        tuple(t.detach() for t in (out, lse, q, k, v, out, lse)) + (mask[:, :2], mask[:, 2], 0.25),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_captures_it_whole(dynamic):
    qkv, mask = problem()
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(attend_twice, fullgraph=True, dynamic=dynamic, backend=backend)
    for ours, eager in zip(results(compiled, qkv, mask), results(attend_twice, qkv, mask), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-6)


def test_recompute_gives_the_same_bits():
    qkv, mask = problem()
    recomputed = lambda *args: checkpoint(attend_twice, *args, use_reentrant=False)  # noqa: E731
    for ours, kept in zip(results(recomputed, qkv, mask), results(attend_twice, qkv, mask), strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.gpu
def test_cuda_graphs_replay_with_other_masks():
    qkv, mask = problem(torch.bfloat16)
    for _ in range(2):  # compiled and tuned before the capture
        results(attend_twice, qkv, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(attend_twice, qkv, mask)
    mask.copy_(torch.from_numpy(masks.concatenate([masks.causal(50)], 64)[None]))
    graph.replay()
    for ours, eager in zip(captured, results(attend_twice, qkv, mask), strict=True):
        assert torch.equal(ours, eager)


@pytest.fixture(scope="module")
def probe():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_probe.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_default_tiles_compile_without_spills_to_speak_of(probe):
    for row in probe["resources"]:
        assert row["fast_products"] >= 16 and row["tma_loads"] >= 8, f"not on the fast path: {row}"
        assert row["shared_bytes"] <= 163 * 1024, f"more than an A100 has: {row}"
        assert row["spill_bytes"] <= 96, f"more than a few scalars around the loops spill: {row}"
    assert Counter(row["capability"] for row in probe["resources"]) == {90: 21, 100: 12}


@pytest.mark.slow
def test_small_kernels_compile_without_spills(probe):
    assert Counter(row["capability"] for row in probe["small"]) == {90: 8, 100: 8}
    assert not any(row["spill_bytes"] for row in probe["small"])


@pytest.mark.slow
def test_no_length_batch_or_head_count_compiles_anew(probe):
    assert probe["lengths"] == probe["heads"] == 4, "forward, preparation, dq, dkv"
    assert probe["groups"] == 7, "sharing keys among heads is a constant of all but the preparation"


def test_choices_of_several_processes_end_up_in_one_file(tmp_path):
    path = tmp_path / "folder" / "gpu.json"
    first, second = Table(path), Table(path)
    first.keep("forward-d64", TileConfig(64, 64, 4, 2))
    second.keep("dq-d64", TileConfig(32, 64, 4, 3))
    assert Table(path).found == {"forward-d64": TileConfig(64, 64, 4, 2), "dq-d64": TileConfig(32, 64, 4, 3)}
    assert list(path.parent.iterdir()) == [path], "no draft is left"


def test_the_first_choice_is_measured_once_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setenv("MM_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("MM_KERNELS_AUTOTUNE", "1")
    (q, k, v), mask = problem(torch.float16)
    call, runs = Problem(q, k, v, mask[:, :2], None, 1.0), []
    first = choose("dq", call, runs.append)
    measured = len(runs)
    assert choose("dq", call, runs.append) == first and len(runs) == measured
    on_gpu = DEVICE.type == "cuda"
    assert set(runs) == (set(candidates("dq", 16, 2)) if on_gpu else set())
    assert len(list(tmp_path.iterdir())) == on_gpu, "and kept in a file"

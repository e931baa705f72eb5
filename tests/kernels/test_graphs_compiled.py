"""What torch.compile makes of the layers' elementwise chains for a GPU: that it compiles is seen without one."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_mm.rehearsal.fused import KERNELS

# Operations that inductor names each chain's kernels after: of the forward pass, and of the backward pass.
CHAINS = {
    "head norms": ("native_layer_norm", "native_layer_norm_backward"),
    "RoPE": ("cat_mul_split_split_with_sizes", "cat_mul_neg"),
    "dropout and its residual": (
        "to_copy_add_arange_bitwise_and_bitwise_xor",
        "to_copy_arange_bitwise_and_bitwise_xor",
    ),
    "hashes of tokens": ("add_bitwise_and_bitwise_xor_mul",),
    "SwiGLU": ("fused_mul_silu", "sigmoid_silu"),
    "SwiGLU behind a bias": ("fused_add_mul_silu", "fused_add_cat_mul_rsub_sigmoid_silu"),
    "SwiGLU of experts": ("fused__to_copy_mul_silu", "fused__to_copy_add_cat_mul_rsub_sigmoid_silu"),
    "GELU behind a bias": ("add_mul_tanh", "add_mul_rsub_tanh"),
}


@pytest.fixture(scope="module")
def rows():
    left_out = ("TRITON_INTERPRET", "TORCHDYNAMO_DISABLE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    script = Path(__file__).with_name("graph_probe.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_every_chain_compiles_forward_and_backward(rows, capability):
    names = {row["name"] for row in rows if row["capability"] == capability}
    for chain, parts in CHAINS.items():
        for part in parts:
            assert any(part in name for name in names), f"{chain}: nothing like {part} among {sorted(names)}"


@pytest.mark.slow
def test_each_has_a_configuration_without_spills(rows):
    spills = defaultdict(list)
    for row in rows:
        spills[row["capability"], row["name"]].append(row["spill_bytes"])
    assert not [kernel for kernel, found in spills.items() if min(found) > 0]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_chains_of_several_kernels_are_those_that_a_rehearsal_counts(rows, capability):
    kernels = defaultdict(set)
    for row in rows:
        if row["capability"] == capability:
            kernels[row["of"]].add(row["name"])
    assert len(kernels["norm_heads"]) == 1 + KERNELS["norm_heads backward"]
    assert len(kernels["weighted_swiglu_back"]) == KERNELS["weighted_swiglu_back"]

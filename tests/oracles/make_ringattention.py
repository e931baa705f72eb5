"""Writes `ringattention.npz`: causal attention and its gradients, as the authors of RingAttention compute them.

Their own package (`ringattention` by Hao Liu; arXiv 2310.01889) runs over four forced CPU devices: each has a quarter
of the sequence, keys and values go round a ring, and every quarter is multiplied in chunks. All of it is in fp32.
Before anything is written, the results are compared with a dense softmax in fp64.

`test_ringattention_oracle.py` compares our attention with the file, so that the tests need no JAX. To write it anew:

    python3.11 -m venv ../jax-env
    ../jax-env/bin/pip install ringattention==0.1.2 jax==0.4.38 jaxlib==0.4.38 flax==0.10.4 einops==0.8.2 numpy==2.4.6
    ../jax-env/bin/python tests/oracles/make_ringattention.py

The package runs here as published. Later JAX
has lost `jax.lib.xla_bridge`, which the package asks for its platform when it is imported.

Layout of every array: [B, S, H, D], float32.
"""

import os
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh, PartitionSpec
from ringattention import ringattention

B, S, H, D = 1, 256, 2, 16
DEVICES, QUERY_CHUNK, KEY_CHUNK = 4, 16, 32


def draw() -> dict[str, np.ndarray]:
    """q, k, v and dout, the gradient of the output."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal((B, S, H, D), dtype=np.float32) for name in ("q", "k", "v", "dout")}


def theirs(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> dict[str, np.ndarray]:
    """The package's output and gradients."""
    attend = partial(
        ringattention,
        attn_bias=None,
        segment_ids=None,
        cache_idx=None,
        axis_name="ring",
        float32_logits=True,
        blockwise_kwargs={
            "causal_block_size": 1,  # 1 is the usual causal mask; larger blocks see all of themselves
            "query_chunk_size": QUERY_CHUNK,
            "key_chunk_size": KEY_CHUNK,
            "deterministic": True,
            "dropout_rng": None,
            "attn_pdrop": 0.0,
            "dtype": np.float32,
            "policy": jax.checkpoint_policies.nothing_saveable,
            "precision": jax.lax.Precision.HIGHEST,
            "prevent_cse": False,
        },
    )
    cut = PartitionSpec(None, "ring", None, None)
    mesh = Mesh(np.array(jax.devices("cpu")[:DEVICES]), ("ring",))
    spread = shard_map(attend, mesh=mesh, in_specs=(cut, cut, cut), out_specs=cut, check_rep=False)
    with jax.default_matmul_precision("highest"):  # the backward pass does not hand `precision` on
        out, pull = jax.vjp(jax.jit(spread), q, k, v)
        return dict(zip(("out", "dq", "dk", "dv"), map(np.asarray, (out, *pull(dout))), strict=True))


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> dict[str, np.ndarray]:
    """The same in fp64, with all scores at once."""
    q, k, v, dout = (side.astype(np.float64) for side in (q, k, v, dout))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / D**0.5
    scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    dweights = np.einsum("bqhd,bkhd->bhqk", dout, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / D**0.5
    return {
        "out": np.einsum("bhqk,bkhd->bqhd", weights, v),
        "dq": np.einsum("bhqk,bkhd->bqhd", dscores, k),
        "dk": np.einsum("bhqk,bqhd->bkhd", dscores, q),
        "dv": np.einsum("bhqk,bqhd->bkhd", weights, dout),
    }


def main() -> None:
    inputs = draw()
    results, truth = theirs(**inputs), dense(**inputs)
    for name, result in results.items():
        error = np.abs(result - truth[name]).max() / np.abs(truth[name]).max()
        print(f"{name}: {error:.1e} of the largest element from fp64")
        assert result.dtype == np.float32 and error < 1e-6
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **inputs, **results)


if __name__ == "__main__":
    main()

"""Our attention over ranks is that of RingAttention's authors: the same outputs and gradients on the same inputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from context_cases import spread
from distributed import run_ranks

from megatron_mm import mask as masks
from megatron_mm.parallel.context import assignment as assignments
from megatron_mm.parallel.context.assignment import Assignment

ORACLE = Path(__file__).parents[2] / "oracles" / "ringattention.npz"
RANKS = 4
TOLERANCE = 2e-6
"""Largest difference over the largest element. Both sides sum up to 256 products in fp32, in different orders, and stay
within 1e-6 of fp64. To forget one key of one query moves the output by at least 1e-4."""


@pytest.fixture(scope="module")
def oracle() -> dict[str, torch.Tensor]:
    """Inputs and results by name, [S, B, H, D]; see `tests/oracles/make_ringattention.py`."""
    with np.load(ORACLE) as arrays:
        return {name: torch.from_numpy(array).transpose(0, 1) for name, array in arrays.items()}


def cut(name: str, mask: np.ndarray) -> Assignment:
    length = mask.shape[2]
    if name == "assign":
        return assignments.assign(mask, RANKS)
    if name == "scattered":
        chunks = np.random.default_rng(0).permutation(length // 8).reshape(RANKS, -1)
        return Assignment(8, np.sort(chunks, axis=1))
    return getattr(assignments, name)(length, RANKS)


@pytest.mark.parametrize("name", ["assign", "zigzag", "contiguous", "scattered"])
@pytest.mark.parametrize("comm", ["ring", "exchange"])
def test_results_are_ringattentions(comm, name, oracle, monkeypatch):
    monkeypatch.setattr(assignments, "FINEST", 8)  # or a rank's 64 positions would stay in one piece
    mask = masks.causal(len(oracle["q"]))[None]
    inputs = {side: oracle[side] for side in ("q", "k", "v", "dout")}
    parts = run_ranks(spread, RANKS, inputs, mask, cut(name, mask), comm)
    where = torch.cat([part[-1] for part in parts])
    assert torch.equal(where.sort().values, torch.arange(len(where)))
    for number, result in enumerate(("out", "dq", "dk", "dv")):
        ours, theirs = torch.cat([part[number] for part in parts]), oracle[result][where]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))

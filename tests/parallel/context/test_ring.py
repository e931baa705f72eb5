"""Attention over keys of several ranks is attention over all keys at once, with its gradients, however they travel."""

import numpy as np
import pytest
import torch
from distributed import run_ranks
from mm_kernels.span_attention import reference

from megatron_mm import mask as masks
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel.context import assignment as assignments
from megatron_mm.parallel.context.groups import make_groups
from megatron_mm.parallel.context.plan import plan_attention
from megatron_mm.parallel.context.runtime import SpreadAttention
from megatron_mm.parallel.context.schedule import needs
from megatron_mm.parallel.context.ways import positions
from megatron_mm.parallel.distributed import process_groups

S, D, HEADS, GROUPS = 384, 8, 4, 2
CPU = torch.device("cpu")
SPANS = [(30, 110), (140, 204)]


def rows(name: str) -> np.ndarray:
    """int32 [B, 3, S]"""
    span = masks.with_spans(230, SPANS)
    return np.stack(
        {
            "causal": [masks.concatenate([masks.causal(S)], S)],
            "full": [masks.concatenate([masks.full(S)], S)],
            "packed": [
                masks.concatenate([span, masks.causal(20), masks.full(90)], S),
                masks.concatenate([masks.causal(300), masks.prefix(84, 40)], S),
            ],
            "hidden": [
                masks.concatenate(
                    [masks.hide_after(span, SPANS[:1]), masks.hide_after(span[:, :150].clip(max=150), [])], S
                )
            ],
            "padding": [masks.concatenate([span], S), masks.concatenate([masks.causal(10)], S)],
            "window": [masks.concatenate([masks.window(masks.causal(S), 50)], S)],
        }[name]
    )


def inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS, "dout": HEADS}
    return {
        name: torch.randn(S, batch, count, D, generator=generator, dtype=torch.float64) for name, count in heads.items()
    }


def alone(mask: np.ndarray) -> list[torch.Tensor]:
    """out, dq, dk, dv of one process, [S, B, ...]."""
    tensors = {name: t.transpose(0, 1) for name, t in inputs(len(mask)).items()}
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    out = reference.span_attention_reference(*leaves, torch.from_numpy(mask))
    return [t.transpose(0, 1) for t in (out.detach(), *torch.autograd.grad(out, leaves, tensors["dout"]))]


def _spread(init_kwargs: dict, mask: np.ndarray, comm: str, inner: int, cut: str) -> list[torch.Tensor]:
    """out, dq, dk, dv of this rank's positions, and these."""
    world, rank = init_kwargs["world_size"], init_kwargs["rank"]
    with process_groups(ParallelConfig(context_parallel_size=world), 0, CPU, **init_kwargs):
        groups = make_groups([inner])[inner]
        assignment = getattr(assignments, cut)(mask if cut == "assign" else S, world // inner)
        plan = plan_attention(mask, needs(mask, assignment), groups.outer.rank(), comm == "ring", True, CPU)
        mine = torch.from_numpy(positions(assignment, inner)[rank])
        tensors = {name: t[mine] for name, t in inputs(len(mask)).items()}
        leaves = [tensors[name].requires_grad_() for name in "qkv"]
        out = SpreadAttention(plan, groups)(*leaves, attend=reference)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors["dout"]), mine]


NAMES = ["causal", "full", "packed", "hidden", "padding", "window"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("comm", "ranks", "inner"), [("ring", 3, 1), ("exchange", 4, 1), ("ring", 4, 2), ("exchange", 2, 2)]
)
def test_spread_attention(name, comm, ranks, inner):
    mask = rows(name)
    expected = alone(mask)
    parts = run_ranks(_spread, ranks, mask, comm, inner, "assign")
    where = torch.cat([part[-1] for part in parts])
    assert torch.equal(where.sort().values, torch.arange(S))
    for number, truth in enumerate(expected):
        ours = torch.cat([part[number] for part in parts])
        torch.testing.assert_close(ours, truth[where], rtol=1e-12, atol=1e-12)

"""Random packed rows for tests of context parallelism, and one rank's side of attention over several."""

import numpy as np
import torch
from hypothesis import strategies as st
from mm_kernels.span_attention import reference

from megatron_mm import mask as masks
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.parallel.context.assignment import Assignment
from megatron_mm.parallel.context.groups import make_groups
from megatron_mm.parallel.context.plan import plan_attention
from megatron_mm.parallel.context.ring import PartialAttention
from megatron_mm.parallel.context.runtime import SpreadAttention
from megatron_mm.parallel.context.schedule import needs
from megatron_mm.parallel.context.ways import Meeting, positions
from megatron_mm.parallel.distributed import process_groups

CPU = torch.device("cpu")


def spread(
    init_kwargs: dict,
    tensors: dict[str, torch.Tensor],
    mask: np.ndarray,
    assignment: Assignment,
    comm: str,
    inner: int = 1,
    attend: PartialAttention = reference,
) -> list[torch.Tensor]:
    """out, dq, dk, dv of this rank's positions, and these. For `run_ranks`, over `assignment.ranks * inner` ranks.

    Args:
        tensors: q, k, v and dout of all positions, [S, B, H or G, D]. mask: int32 [B, 3, S].
        comm: `ring` or `exchange`, across inner groups of `inner` ranks.
    """
    world, rank = init_kwargs["world_size"], init_kwargs["rank"]
    with process_groups(ParallelConfig(context_parallel_size=world), 0, CPU, **init_kwargs):
        groups = make_groups([inner])[inner]
        meeting, outer = Meeting(needs(mask, assignment), comm == "ring", inner), groups.outer.rank()
        plan = plan_attention(mask, assignment, meeting.stages(outer), outer, True)
        mine = torch.from_numpy(positions(assignment, inner)[rank])
        part = {name: tensor[mine] for name, tensor in tensors.items()}
        leaves = [part[name].requires_grad_() for name in "qkv"]
        out = SpreadAttention(plan, groups)(*leaves, attend=attend)
        return [out.detach(), *torch.autograd.grad(out, leaves, part["dout"]), mine]


def draw_mask(data: st.DataObject, rows: int, length: int) -> np.ndarray:
    """Packed rows with spans, hidden ones, windows and padding."""
    made = []
    for _ in range(rows):
        documents, used = [], 0
        while used < length and (n := data.draw(st.integers(0, length - used))) > 4:
            first = data.draw(st.integers(0, n - 2))
            span = [(first, data.draw(st.integers(first + 1, n)))]
            document = masks.with_spans(n, span)
            kind = data.draw(st.sampled_from(["plain", "hidden", "window"]))
            if kind == "hidden":
                document = masks.hide_after(document, span)
            documents.append(masks.window(document, 5) if kind == "window" else document)
            used += n
        made.append(masks.concatenate(documents, length))
    return np.stack(made)

"""Maps of whole images within a packed sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn


def over_images(
    function: Callable[..., torch.Tensor],
    xs: Sequence[torch.Tensor],
    images: torch.Tensor,
    outputs: int,
    module: nn.Module,
) -> torch.Tensor:
    """Apply a map of grids [N, h, w, I] (one for each of `xs`) -> [N, h, w, outputs] to the images within `xs`
    [B, S, I]: [B, S, outputs], zero outside images.

    Images of one size go in one go. images int [M, 4] as in `PackedBatch`. Without any image the parameters of `module`
    still get (zero) gradients, which data parallelism waits for.
    """
    batch, length = xs[0].shape[:2]
    flat = [x.flatten(0, 1) for x in xs]
    starts: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, first, h, w in images.tolist():
        starts[h, w].append(row * length + first)
    dtype = next(module.parameters()).dtype
    out = flat[0].new_zeros(batch * length, outputs, dtype=dtype)
    for (h, w), firsts in starts.items():
        index = (torch.tensor(firsts)[:, None] + torch.arange(h * w)).flatten().to(out.device)
        grids = [x.index_select(0, index).view(len(firsts), h, w, *x.shape[1:]) for x in flat]
        out = out.index_copy(0, index, function(*grids).reshape(-1, outputs))
    if not starts and torch.is_grad_enabled():
        out = out + 0.0 * sum(parameter.sum() for parameter in module.parameters())
    return out.view(batch, length, outputs)

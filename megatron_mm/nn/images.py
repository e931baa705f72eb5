"""Maps of whole images within a packed sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from megatron_mm.types import Grids


def over_images(
    function: Callable[..., torch.Tensor],
    xs: Sequence[torch.Tensor],
    images: Sequence[Grids],
    outputs: int,
    module: nn.Module,
) -> torch.Tensor:
    """Apply a map of grids [N, h, w, I] (one for each of `xs`) -> [N, h, w, outputs] to the images within `xs`
    [B, S, I]: [B, S, outputs], zero outside images.

    Images of one size go in one go. Without any image the parameters of `module` still get (zero) gradients, which data
    parallelism waits for.
    """
    batch, length = xs[0].shape[:2]
    flat = [x.flatten(0, 1) for x in xs]
    dtype = next(module.parameters()).dtype
    out = flat[0].new_zeros(batch * length, outputs, dtype=dtype)
    for size in images:
        grids = [x.index_select(0, size.index).view(-1, size.height, size.width, *x.shape[1:]) for x in flat]
        out = out.index_copy(0, size.index, function(*grids).reshape(-1, outputs))
    if not images and torch.is_grad_enabled():
        out = out + 0.0 * sum(parameter.sum() for parameter in module.parameters())
    return out.view(batch, length, outputs)

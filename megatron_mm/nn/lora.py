"""Low-rank adapters as arithmetic on whole weights by name: A [r, in] and B [out, r] of a weight [out, in]."""

from __future__ import annotations

from collections.abc import Mapping

import torch

ADAPTERS = ("lora_A", "lora_B")
"""How the names of adapters end, where their weight's name ends in `weight`."""


def adapted_layers(names: Mapping[str, torch.Tensor]) -> list[str]:
    """The layers among the weights that have adapters: their names up to the last dot."""
    return [name.removesuffix("lora_A") for name in names if name.endswith("lora_A")]


def merge(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """`weights` without adapters: W + scale * B A in their place, summed in fp32 at least and kept in W's dtype.

    Of the experts of a layer, all three have one more dimension in front.
    """
    merged = {name: weight for name, weight in weights.items() if not name.endswith(ADAPTERS)}
    for layer in adapted_layers(weights):
        weight, down, up = (weights[f"{layer}{kind}"] for kind in ("weight", *ADAPTERS))
        precise = torch.promote_types(weight.dtype, torch.float32)
        product = up.to(precise) @ down.to(precise)
        merged[f"{layer}weight"] = (weight.to(precise) + scale * product).to(weight.dtype)
    return merged

"""Model FLOPs utilisation by the mask's true area, so that skipped work never inflates the figure.

Forward: 2 per weight and token in the matrix products (of the experts that a token uses), 4 * head_dim * heads per
allowed query-key pair; backward twice the former (once where the weight is frozen) and 2.5 times the latter.
"""

from __future__ import annotations

import torch

from megatron_mm.config.model import TrunkConfig

DENSE_BF16_PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s of the data sheets, by a part of the device's name."""


def peak_flops(device: torch.device) -> float | None:
    """The device's peak, or None where it is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DENSE_BF16_PEAKS.items() if part in name), None)


def trunk_flops(trunk: TrunkConfig, vocab_size: int, tokens: int, pairs: int, trained: float = 1.0) -> float:
    """FLOPs of forward and backward of `tokens` tokens with `pairs` allowed query-key pairs, trunk and head.

    Args:
        trained: the share of the weights that have gradients.
    """
    weights = trunk.active_weights + trunk.hidden_size * vocab_size
    scores = 4 * trunk.head_dim * trunk.num_attention_heads * trunk.num_layers
    return (4 + 2 * trained) * weights * tokens + 3.5 * scores * pairs

"""Dropout as a pure function of (seed, layer, document, position, channel).

An ordinary dropout draws from a generator whose state depends on how much this rank has drawn before, so the same run
differs from layout to layout. Here each element hashes its own coordinates instead: tensor, sequence and pipeline
parallelism, micro-batching and recompute all see the same mask. The hash is Wellons' `lowbias32` in wrapping int32.
"""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive integers over the 32-bit range


def hashed_dropout(x: torch.Tensor, p: float, token_hash: torch.Tensor, first_channel: int = 0) -> torch.Tensor:
    """Zeroes elements of `x` [..., D] with probability `p` and scales the rest by 1 / (1 - p).

    `token_hash` int32 [...] comes from `hash_tokens`. `first_channel`: number of x's first channel, where x is a part.
    """
    channels = torch.arange(first_channel, first_channel + x.shape[-1], device=x.device, dtype=torch.int32)
    bits = lowbias32(token_hash.unsqueeze(-1) ^ (channels * _signed(_GOLDEN)))
    keep = bits >= int(p * 2**32) - 2**31
    return x * (keep.to(x.dtype) / (1.0 - p))


def hash_tokens(keys: torch.Tensor, positions: torch.Tensor, salt: int | torch.Tensor) -> torch.Tensor:
    """int32 hash of each token's document key and position (int32 tensors of one shape) under a site's `salt`; under
    those of `salts` for several sites at once, [sites, ...]."""
    salted = _signed(salt * _GOLDEN) if isinstance(salt, int) else salt * _signed(_GOLDEN)
    return lowbias32(lowbias32(keys ^ salted) + positions)


def salts(first: int, sites: int, device: torch.device | int) -> torch.Tensor:
    """int32 [sites, 1, 1]: the salts first, first + 1, ..., for tokens [S, B]. Nothing is copied from the host."""
    return (torch.arange(sites, dtype=torch.int32, device=device) + _signed(first)).view(-1, 1, 1)


def lowbias32(x: torch.Tensor) -> torch.Tensor:
    """Wellons' hash of int32 tensors, one to one."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31

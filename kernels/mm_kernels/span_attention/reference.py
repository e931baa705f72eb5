"""Span attention in plain torch: any device, any float dtype.

The mask is read on the host. Every row is cut where nothing behind looks back, long pieces are cut into tiles of
queries with the one range of keys that they need, and tiles of similar size, from all rows, are padded into one call.
So work and memory follow the mask's area, not S x S, and a row of short documents costs a few calls rather than one per
document. The trade-off: one device synchronisation per call, and new shapes with every mask.

`span_attention_reference` calls torch's own attention, on a CPU three to five times as fast as a softmax written out.
`forward` and `backward` write it out, since they owe the log-sum-exp and its gradient.

Shape legend: B rows, S queries, K keys, H = G * R query heads, G key/value heads, D head size; inside a call N tiles.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F

from mm_kernels.span_attention.arguments import check, default_scale, split_mask
from mm_kernels.span_attention.plan import TileGroup, plan_tiles


def span_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The output of `op.span_attention` [B, S, H, D], differentiable by autograd. Same arguments, same errors."""
    scale = default_scale(q, scale)
    check(q, k, v, mask, until, scale)
    tiles = _tiles(q, k, mask, until)
    outs = [
        F.scaled_dot_product_attention(
            q_tiles.transpose(1, 2),
            k_tiles.transpose(1, 2),
            v_tiles.transpose(1, 2),
            attn_mask=bias,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        ).transpose(1, 2)
        for q_tiles, k_tiles, v_tiles, bias in zip(
            tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v), tiles.biases(q.dtype), strict=True
        )
    ]
    return tiles.scatter(outs)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, S, H, D], lse [B, H, S] in fp32, or fp64 for fp64 inputs), without a graph."""
    tiles = _tiles(q, k, mask, until)
    outs, sums = [], []
    sides = (tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v))
    for *parts, allowed in zip(*sides, tiles.allowed, strict=True):
        q_tiles, k_tiles, v_tiles = (_by_group(t, k.shape[2]) for t in parts)
        scores = _scores(q_tiles, k_tiles, allowed, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append(_by_position((scores - lse).exp() @ v_tiles).to(q.dtype))
        sums.append(_by_position(lse).squeeze(-1))
    return tiles.scatter(outs), tiles.scatter(sums, float("-inf")).transpose(1, 2).contiguous()


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    until: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv). `out` and `lse` may be those of more keys than these: then the result is these keys' part."""
    tiles = _tiles(q, k, mask, until)
    delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse.transpose(1, 2)
    dq_tiles = []
    rows, keys, *width = k.shape
    dk, dv = (torch.zeros(keys * rows, *width, dtype=lse.dtype, device=k.device) for _ in range(2))
    sides = [tiles.of_queries(q), tiles.of_keys(k), tiles.of_keys(v)]
    sides += [tiles.of_queries(side) for side in (dout, lse.transpose(1, 2)[..., None], delta[..., None])]
    for i, (*parts, allowed, real) in enumerate(zip(*sides, tiles.allowed, tiles.real, strict=True)):
        q_tiles, k_tiles, v_tiles, dout_tiles, lse_tiles, delta_tiles = (_by_group(t, k.shape[2]) for t in parts)
        # Queries without a key, and those that only fill a tile up, have no weights.
        lse_tiles = lse_tiles.masked_fill(~real[:, None, None, :, None], float("inf"))
        weights = (_scores(q_tiles, k_tiles, allowed, scale) - lse_tiles).exp()
        dscores = weights * (dout_tiles @ v_tiles.mT - delta_tiles) * scale
        dq_tiles.append(_by_position(dscores @ k_tiles).to(q.dtype))
        tiles.add_keys(i, dk, (dscores.mT @ q_tiles).sum(2))
        tiles.add_keys(i, dv, (weights.mT @ dout_tiles).sum(2))
    dk, dv = (side.to(k.dtype).unflatten(0, (keys, rows)).transpose(0, 1) for side in (dk, dv))
    return tiles.scatter(dq_tiles), dk, dv


class _Tiles:
    """The groups of tiles of one mask, and how tensors are cut into them: one gather and one scatter for all groups.

    Positions are flattened as megatron-core's layers hold them, position * B + row: there it is a view.
    """

    def __init__(self, groups: list[TileGroup], rows: int, queries: int, keys: int, device: torch.device):
        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        def flat(positions: np.ndarray, length: int) -> np.ndarray:
            return positions % length * rows + positions // length

        places = [flat(group.queries, queries) for group in groups]
        real = np.concatenate([group.real.ravel() for group in groups])
        all_queries, answered = np.concatenate([index.ravel() for index in places]), np.flatnonzero(real)
        answer = np.full(rows * queries, len(all_queries))
        answer[all_queries[answered]] = answered
        self.allowed = [tensor(group.allowed) for group in groups]
        """Which queries see which keys, of every group: bool [N, Q, K]."""
        self.real = [tensor(group.real) for group in groups]
        """Which queries have an answer, of every group: bool [N, Q]."""
        self._queries = [tensor(index) for index in places]
        self._keys = [tensor(flat(group.keys, keys)) for group in groups]
        self._all_queries, self._all_keys = (
            torch.cat([index.flatten() for index in side]) for side in (self._queries, self._keys)
        )
        self._answer = tensor(answer)
        self._shape = (queries, rows)
        self._biases: dict[torch.dtype, list[torch.Tensor]] = {}

    def biases(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """`allowed` as torch's attention adds it to the scores, which would otherwise make it in every call: 0 or -inf,
        [N, 1, Q, K] of every group."""
        if dtype not in self._biases:
            self._biases[dtype] = [
                torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
                .masked_fill_(~allowed, float("-inf"))
                .unsqueeze(1)
                for allowed in self.allowed
            ]
        return self._biases[dtype]

    def of_queries(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """[B, S, ...] -> [N, Q, ...] of every group."""
        return _gather(tensor, self._all_queries, self._queries)

    def of_keys(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """[B, K, ...] -> [N, K, ...] of every group."""
        return _gather(tensor, self._all_keys, self._keys)

    def scatter(self, parts: list[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
        """[N, Q, ...] of every group -> [B, S, ...], `fill` where no query has an answer."""
        none = parts[0].new_full((1, *parts[0].shape[2:]), fill)
        values = torch.cat([*(part.flatten(0, 1) for part in parts), none]).index_select(0, self._answer)
        return values.view(*self._shape, *values.shape[1:]).transpose(0, 1)

    def add_keys(self, i: int, into: torch.Tensor, values: torch.Tensor) -> None:
        """Adds values [N, G, K, D] of group i to `into` [K * B, G, D]."""
        into.index_add_(0, self._keys[i].flatten(), values.transpose(1, 2).flatten(0, 1))


def _tiles(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, until: torch.Tensor | None) -> _Tiles:
    lo_hi, until = split_mask(mask, until)
    hidden = None if until is None else until.detach().cpu().numpy().tobytes()
    return _planned(lo_hi.detach().cpu().numpy().tobytes(), hidden, len(q), q.shape[1], k.shape[1], q.device)


@functools.lru_cache(maxsize=8)  # of a layer's keys that are spread over ranks, each part has a mask of its own
def _planned(mask: bytes, until: bytes | None, rows: int, queries: int, keys: int, device: torch.device) -> _Tiles:
    """The tiles of a mask by its very numbers."""
    lo_hi = np.frombuffer(mask, np.int32).reshape(rows, 2, queries)
    hidden = None if until is None else np.frombuffer(until, np.int32).reshape(rows, keys)
    return _Tiles(plan_tiles(lo_hi, hidden, keys), rows, queries, keys, device)


def _gather(tensor: torch.Tensor, index: torch.Tensor, groups: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = tensor.transpose(0, 1).flatten(0, 1).index_select(0, index).split([group.numel() for group in groups])
    return [part.unflatten(0, group.shape) for part, group in zip(parts, groups, strict=True)]


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, Q, G * R, D] -> [N, G, R, Q, D], in fp32 at least."""
    precise = torch.promote_types(tensor.dtype, torch.float32)
    n, queries, _, width = tensor.shape
    return tensor.to(precise).view(n, queries, groups, -1, width).permute(0, 2, 3, 1, 4)


def _by_position(tensor: torch.Tensor) -> torch.Tensor:
    """[N, G, R, Q, D] -> [N, Q, G * R, D]."""
    return tensor.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    """[N, G, R, Q, K], -inf where the mask forbids."""
    return (q @ k.mT * scale).masked_fill(~allowed[:, None, None], float("-inf"))

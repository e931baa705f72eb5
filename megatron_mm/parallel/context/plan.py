"""From a schedule to tensors: what one rank's attention over one micro-batch works with, made once for all layers.

Made on the host; see `parallel.staging` for the way to the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mm_kernels.span_attention.intervals import local_index

from megatron_mm.parallel.context.assignment import Assignment
from megatron_mm.parallel.context.schedule import Stage


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor's first dimension: a slice where they stand together, else an index."""

    first: int
    count: int
    index: torch.Tensor | None

    @staticmethod
    def of(indices: np.ndarray) -> Rows:
        """int64 [n], n > 0."""
        together = bool((np.diff(indices) == 1).all())
        return Rows(int(indices[0]), len(indices), None if together else torch.from_numpy(indices))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, ...], dense if `tensor` is."""
        if self.index is None:
            return tensor.narrow(0, self.first, self.count)
        return tensor.index_select(0, self.index)

    def add(self, into: torch.Tensor, values: torch.Tensor) -> None:
        """Adds `values` [n, ...] to these rows; no row is named twice."""
        if self.index is None:
            into.narrow(0, self.first, self.count).add_(values)
        else:
            into.index_add_(0, self.index, values.to(into.dtype))


@dataclass(frozen=True)
class Part:
    """One product of queries and keys: this rank's queries first .. first + count - 1, over some keys.

    mask int32 [B, 2, count] in indices of these keys; until int32 [B, keys] in indices of these queries, or None.
    """

    first: int
    count: int
    mask: torch.Tensor
    until: torch.Tensor | None


@dataclass(frozen=True)
class Step:
    """A `schedule.Stage` in tensors; `part` and `rows` are None where the rank needs none of what arrives."""

    relays: bool
    sends: dict[int, Rows]
    receives: dict[int, int]
    part: Part | None
    rows: Rows | None
    returns: dict[int, Rows]
    homes: dict[int, Rows]

    @property
    def arrivals(self) -> int:
        return sum(self.receives.values())


@dataclass(frozen=True)
class AttentionPlan:
    """Attention of one rank over one micro-batch: first its own keys, then what each step brings. Parts are None where
    no query needs any of the keys."""

    own: Part | None
    steps: tuple[Step, ...]


def plan_attention(
    mask: np.ndarray,
    assignment: Assignment,
    stages: Sequence[Stage],
    rank: int,
    hides_keys: bool,
) -> AttentionPlan:
    """The plan of `rank`, on the host.

    Args:
        mask: int32 [B, 3, S] of the whole rows. stages: of this rank.
        hides_keys: whether the mask's third row hides any key.
    """
    parts = _Parts(mask, assignment, rank, hides_keys)
    own = parts.make(assignment.positions(rank))
    return AttentionPlan(own, tuple(_step(stage, parts) for stage in stages))


class _Parts:
    """Makes the parts of one rank's queries."""

    def __init__(self, mask: np.ndarray, assignment: Assignment, rank: int, hides_keys: bool):
        positions = assignment.positions(rank)
        self._rows = mask[:, :2, positions]
        self._until = mask[:, 2] if hides_keys else None
        self._queries = _pieces(positions)

    def make(self, keys: np.ndarray) -> Part | None:
        """The part of some keys, by their positions int64 [K], ascending; None where no query needs them."""
        # Queries needing a key between the first and the last are a range, as lo and hi never decrease.
        first = min(int(np.searchsorted(hi, keys[0], side="right")) for hi in self._rows[:, 1])
        end = max(int(np.searchsorted(lo, keys[-1], side="right")) for lo in self._rows[:, 0])
        if end <= first:
            return None
        mask = local_index(torch.from_numpy(self._rows[:, :, first:end]), *_pieces(keys))
        until = None
        if self._until is not None:
            until = (local_index(torch.from_numpy(self._until[:, keys]), *self._queries) - first).clamp_(min=0)
        return Part(first, end - first, mask, until)


def _pieces(positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(starts, sizes) of the runs of ascending positions, int32."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    starts = positions[np.concatenate([[0], breaks])]
    sizes = np.diff(np.concatenate([[0], breaks, [len(positions)]]))
    return torch.from_numpy(starts.astype(np.int32)), torch.from_numpy(sizes.astype(np.int32))


def _step(stage: Stage, parts: _Parts) -> Step:
    def rows(of: Mapping[int, np.ndarray]) -> dict[int, Rows]:
        return {peer: Rows.of(indices) for peer, indices in of.items()}

    used = len(stage.keys) > 0
    part = parts.make(stage.keys) if used else None
    return Step(
        relays=stage.relays,
        sends=rows(stage.sends),
        receives=dict(stage.receives),
        part=part,
        rows=Rows.of(stage.rows) if used else None,
        returns=rows(stage.returns),
        homes=rows(stage.homes),
    )

"""A rank's part of a batch: what the families' front and back see, which do not know that there are other parts.

Every tensor of a batch follows the same positions; the mask stays in coordinates of the whole row. Images that networks
in front or back read as a whole (`PackedBatch.grids`) stay whole: the part is widened by the positions that its images
lack. The front embeds them too, and drops them; the back receives their hidden states from the ranks that own them, and
finds no label there, so that every loss is counted once.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_mm.types import BACK, FRONT, FieldSpec, Grids, PackedBatch

FILL = np.iinfo(np.int64).max
"""Stands for a position where a widened row has none; larger than any."""


@dataclass(frozen=True)
class Widening:
    """The positions that a rank borrows. All indices are flat: row * length + place, int64.

    own: where this rank's [B, n] positions stand in the widened [B, w]. sends: peer -> which of its own it lends.
    receives: peer -> where in the widened batch the peer's go.
    """

    width: int
    own: torch.Tensor
    sends: Mapping[int, torch.Tensor]
    receives: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Shard:
    """front, back: PackedBatch [B, w] for the family's two ends, None on a stage without that end; meta int32 [B, 6, n]
    for the layers between them.

    widening: None where w = n and nothing is borrowed.
    """

    front: PackedBatch | None
    back: PackedBatch | None
    meta: torch.Tensor
    widening: Widening | None

    @property
    def mask(self) -> torch.Tensor:
        """int32 [B, 3, n]."""
        return self.meta[:, :3]

    def own_back(self) -> PackedBatch:
        """`back` at this rank's own positions alone."""
        assert self.back is not None
        if self.widening is None:
            return self.back
        own, rows = self.widening.own, len(self.meta)
        fields = {name: values.flatten(0, 1)[own].unflatten(0, (rows, -1)) for name, values in self.back.fields.items()}
        tokens = self.back.tokens.flatten()[own].view(rows, -1)
        return replace(self.back, tokens=tokens, meta=self.meta, fields=fields, grids=())

    def of_stage(self, first: bool, last: bool, fields: Mapping[str, FieldSpec], dtype: torch.dtype) -> Shard:
        """What a stage with these ends reads; `dtype` as in `FieldSpec`."""
        return replace(
            self,
            front=_read_by(FRONT, self.front, fields, dtype) if first else None,
            back=_read_by(BACK, self.back, fields, None) if last else None,
            widening=self.widening if first or last else None,
        )


def whole(batch: PackedBatch) -> Shard:
    """The batch as the only part."""
    return Shard(batch, batch, batch.meta, None)


def shard(
    batch: PackedBatch,
    owners: Sequence[np.ndarray],
    rank: int,
    fields: Mapping[str, FieldSpec],
    pad: int,
) -> Shard:
    """The part of `rank`.

    Args:
        batch: on the host.
        owners: each rank's positions, ascending int64.
        fields, pad: the family's, for places that only fill a widened row up.
    """
    own = np.broadcast_to(owners[rank], (len(batch.tokens), len(owners[rank])))
    loans = [loan for loan in _loans(batch, owners) if rank in (loan.lender, loan.borrower)]
    if not loans:
        part = _select(batch, own, fields, pad)
        return Shard(part, part, part.meta, None)
    places = _widen(own, [loan for loan in loans if loan.borrower == rank])
    width = places.shape[1]
    at = lambda row, positions: np.searchsorted(places[row], positions) + row * width  # noqa: E731
    sends, receives = defaultdict(list), defaultdict(list)
    for loan in loans:
        if loan.lender == rank:
            sends[loan.borrower].append(np.searchsorted(own[0], loan.positions) + loan.row * own.shape[1])
        else:
            receives[loan.lender].append(at(loan.row, loan.positions))
    own_places = np.concatenate([at(row, positions) for row, positions in enumerate(own)])
    widening = Widening(width, torch.from_numpy(own_places), *(_joined(side) for side in (sends, receives)))

    front = _select(batch, places, fields, pad)
    borrowed = torch.ones(places.size, dtype=torch.bool).index_fill_(0, widening.own, False).view(places.shape)
    unlabelled = {
        name: values.masked_fill(borrowed.view(*places.shape, *[1] * (values.ndim - 2)), fields[name].fill)
        for name, values in front.fields.items()
    }
    meta = batch.meta[:, :, torch.from_numpy(owners[rank])]
    return Shard(front, replace(front, fields=unlabelled), meta, widening)


def _read_by(end: str, batch: PackedBatch, specs: Mapping[str, FieldSpec], dtype: torch.dtype | None) -> PackedBatch:
    """The batch with the fields that an end reads, floating-point ones in `dtype` if one is given."""
    fields = {name: values for name, values in batch.fields.items() if end in specs[name].readers}
    return replace(batch, fields=fields).to("cpu", dtype)


@dataclass(frozen=True)
class _Loan:
    """Positions of one image, int64, that `borrower` needs of `lender`."""

    row: int
    lender: int
    borrower: int
    positions: np.ndarray


def _loans(batch: PackedBatch, owners: Sequence[np.ndarray]) -> Iterator[_Loan]:
    """Every rank that has a part of an image gets its other parts; in the same order on every rank."""
    owner = np.empty(batch.tokens.shape[1], np.int64)
    for rank, positions in enumerate(owners):
        owner[positions] = rank
    for row, first, height, width in _encoded(batch):
        image = np.arange(first, first + height * width)
        holders = np.unique(owner[image])
        for lender, borrower in itertools.permutations(holders.tolist(), 2):
            yield _Loan(row, lender, borrower, image[owner[image] == lender])


def _widen(own: np.ndarray, loans: Sequence[_Loan]) -> np.ndarray:
    """Positions [B, w]: those of each row and what it borrows, ascending; the end is filled with FILL."""
    rows = [[positions] for positions in own]
    for loan in loans:
        rows[loan.row].append(loan.positions)
    widened = [np.sort(np.concatenate(row)) for row in rows]
    places = np.full((len(own), max(map(len, widened))), FILL)
    for row, positions in enumerate(widened):
        places[row, : len(positions)] = positions
    return places


def _select(batch: PackedBatch, places: np.ndarray, fields: Mapping[str, FieldSpec], pad: int) -> PackedBatch:
    """The batch at positions [B, w], and the images that are there as a whole."""
    filling = torch.from_numpy(places == FILL)
    index = torch.from_numpy(np.where(places == FILL, 0, places))
    row = torch.arange(len(index))[:, None]

    def take(values: torch.Tensor, fill: float) -> torch.Tensor:
        taken = values[row, index]
        return taken.masked_fill_(filling.view(*filling.shape, *[1] * (taken.ndim - 2)), fill)

    here = [
        (b, place, height, width)
        for b, first, height, width in _encoded(batch)
        if (place := _place(places[b], first, height * width)) is not None
    ]

    return replace(
        batch,
        tokens=take(batch.tokens, pad),
        meta=take(batch.meta.transpose(1, 2), 0).transpose(1, 2).contiguous(),
        fields={name: take(values, fields[name].fill) for name, values in batch.fields.items()},
        grids=Grids.of(here, places.shape[1]),
    )


def _encoded(batch: PackedBatch) -> list[tuple[int, int, int, int]]:
    """(row, first position, height, width) of the images in `batch.grids`."""
    return [image for grids in batch.grids for image in grids.images(batch.tokens.shape[1])]


def _place(places: np.ndarray, first: int, size: int) -> int | None:
    """Where positions first .. first + size - 1 stand, if all of them do."""
    place = int(np.searchsorted(places, first))
    last = place + size - 1
    return place if last < len(places) and (places[place], places[last]) == (first, first + size - 1) else None


def _joined(lists: Mapping[int, list[np.ndarray]]) -> dict[int, torch.Tensor]:
    return {peer: torch.from_numpy(np.concatenate(indices)) for peer, indices in lists.items()}

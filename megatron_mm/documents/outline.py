"""What follows from a list of spans before any content is read: places, the mask, positions, images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm import mask
from megatron_mm.documents.spans import Block, Role, Span


@dataclass(frozen=True)
class Place:
    """A span at positions first .. end - 1."""

    span: Span
    first: int

    @property
    def end(self) -> int:
        return self.first + self.span.length

    @property
    def at(self) -> slice:
        return slice(self.first, self.end)


@dataclass(frozen=True)
class Outline:
    """places in order; mask int32 [3, n] (see `megatron_mm.mask`); positions int32 [n]: each one's place for RoPE."""

    places: tuple[Place, ...]
    mask: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, items: Sequence[Span | Block]) -> Outline:
        """The outline of a document that consists of `items`."""
        places: list[Place] = []
        together: list[tuple[int, int]] = []
        hidden: list[tuple[int, int]] = []

        def place(items: Iterable[Span | Block], outermost: bool) -> None:
            for item in items:
                first = places[-1].end if places else 0
                if isinstance(item, Span):
                    places.append(Place(item, first))
                    continue
                place(item.items, outermost=False)
                end = places[-1].end if places else 0
                if outermost:
                    together.append((first, end))
                if item.hidden:
                    hidden.append((first, end))

        place(items, outermost=True)
        n = places[-1].end if places else 0
        step = np.ones(n, dtype=np.int32)
        for each in places:
            if each.span.rewind:
                step[each.first] -= each.span.rewind
        seen = mask.hide_after(mask.with_spans(n, together), hidden)
        return cls(tuple(places), seen, np.cumsum(step, dtype=np.int32) - 1)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def images(self) -> np.ndarray:
        """int32 [m, 3]: see `Document.images`."""
        return self._grids(lambda span: True)

    @property
    def encoded(self) -> np.ndarray:
        """int32 [k, 3]: see `Document.encoded`."""
        return self._grids(lambda span: span.encoded)

    def predicted(self, role: Role) -> Iterator[Place]:
        """The places that are predicted in this way."""
        return (place for place in self.places if place.span.role is role)

    def _grids(self, wanted: Callable[[Span], bool]) -> np.ndarray:
        found = [(p.first, *p.span.grid) for p in self.places if p.span.grid and wanted(p.span)]
        return np.array(found, dtype=np.int32).reshape(-1, 3)

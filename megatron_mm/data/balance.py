"""Which rank gets which packs of a step, where images cost more than their positions.

A vision encoder or a U-Net runs before (or behind) the transformer, over whole images: ranks with more of them would be
waited for. Equal numbers of packs, nearly equal numbers of images; a step's packs are the same ones for any number of
ranks, so losses and gradients are too, up to rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(images: Sequence[float], ranks: int) -> list[list[int]]:
    """Packs of each rank, ascending: those with most images first, each to the rank with the fewest that has room.

    Args:
        images: of each pack; a multiple of `ranks` of them.
    """
    room = len(images) // ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)]
    for pack in sorted(range(len(images)), key=lambda pack: -images[pack]):
        load, rank = heapq.heappop(waiting)
        dealt[rank].append(pack)
        if len(dealt[rank]) < room:
            heapq.heappush(waiting, (load + images[pack], rank))
    return [sorted(packs) for packs in dealt]

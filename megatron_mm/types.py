"""The few nouns that every layer shares. Arrays on the host are numpy; a batch on its way to the model is torch.

Shape legend: B micro-batch rows (packs), S sequence length, n tokens of one document, m images of one document,
D hidden size, P numbers in one patch vector, V vocabulary entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

IGNORE = -100
"""Label of a position that no loss term reads (torch's own default `ignore_index`)."""


@dataclass(frozen=True)
class TextSegment:
    """A run of text: token ids of the run's tokenizer, int64 [n], without specials.

    loss: whether it is learnt; what is not is given, a prompt. ends: EOS stands behind it, as behind each of an
    assistant's turns.
    """

    ids: np.ndarray
    loss: bool = True
    ends: bool = False


@dataclass(frozen=True)
class ImageSegment:
    """An image: float32 pixels (in [-1, 1]) or latents [C, H, W], or integer codes [h, w] of an image tokenizer.

    `pixels`: float32 [3, H, W] in [-1, 1], where the family reads images through a vision encoder as well. `loss`: as
    of a text.
    """

    data: np.ndarray
    pixels: np.ndarray | None = None
    loss: bool = True


Segment = TextSegment | ImageSegment

TASKS = ("auto", "understanding", "generation")
"""image -> text is understanding, text -> image is generation."""


MODALITIES = ("text", "image")
"""What a position can be, from 1 on; 0 is padding."""


@dataclass(frozen=True)
class Sample:
    """One training document as read from a shard.

    `uid` is the sample's ordinal in the index: with seed and epoch it is all that randomness may depend on.
    `task`: what it is to teach of an image that it may learn, one of `TASKS`; `auto` leaves it to the family's shares.
    `begins`, `ends`: False for a piece of a longer document that others precede, or follow.
    """

    uid: int
    key: str
    segments: tuple[Segment, ...]
    meta: dict = field(default_factory=dict)
    task: str = "auto"
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Document:
    """A sample laid out as a sequence by its family, in coordinates of its own (0 .. n-1), already corrupted.

    tokens int64 [n]; mask int32 [3, n] (see `megatron_mm.mask`); fields: name -> array [n, ...], the family's own;
    images int32 [m, 3]: (first position, grid height, grid width) of each image span; encoded int32 [k, 3]: those of
    them that networks over whole images read, in the family's front or back; positions int32 [n]: each one's place for
    RoPE, 0 .. n-1 if None.
    """

    uid: int
    tokens: np.ndarray
    mask: np.ndarray
    fields: dict[str, np.ndarray]
    images: np.ndarray
    encoded: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    positions: np.ndarray | None = None


FRONT, BACK = "front", "back"
"""The two ends of a model that a family makes."""


@dataclass(frozen=True)
class FieldSpec:
    """How one per-token field of a family is stored in a batch: dtype, trailing shape, and the value padding takes.

    `readers`: the ends that read it. Floating-point values reach the front in the model's dtype, and the back as they
    are stored: what is predicted, and its weight in a loss, are never rounded.
    """

    dtype: str
    shape: tuple[int, ...]
    fill: float
    readers: tuple[str, ...] = (FRONT, BACK)


@dataclass(frozen=True)
class LossTerm:
    """One term of the objective: total = sum over terms of weight * global_sum / global_count.

    `over`: the term whose positions it is a mean over, if not its own.
    """

    name: str
    weight: float
    over: str = ""


@dataclass(frozen=True)
class Grids:
    """Images of one size in rows [B, S]. index int64 [N * height * width]: their positions, row * S + place, one image
    after the other."""

    height: int
    width: int
    index: torch.Tensor

    @staticmethod
    def of(images: Iterable[Sequence[int]], length: int) -> tuple[Grids, ...]:
        """Images as in `PackedBatch.images`, in rows of `length`: one entry a size, in the order of appearance."""
        firsts: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, first, height, width in images:
            firsts[int(height), int(width)].append(row * length + first)
        return tuple(
            Grids(h, w, torch.from_numpy((np.array(at, np.int64)[:, None] + np.arange(h * w)).ravel()))
            for (h, w), at in firsts.items()
        )

    def images(self, length: int) -> list[tuple[int, int, int, int]]:
        """The way back."""
        firsts = self.index[:: self.height * self.width].tolist()
        return [(*divmod(first, length), self.height, self.width) for first in firsts]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of packs: what the data path hands to the engine, the same for every family and layout.

    tokens int64 [B, S].
    meta int32 [B, 6, S], the only thing that every transformer layer sees: rows 0-2 the interval mask (lo, hi, until)
      in pack coordinates, row 3 the position inside the document (RoPE, dropout), row 4 the document's dropout key,
      row 5 the kind (0 is padding, from 1 on the modality).
    fields: name -> tensor [B, S, ...], read by the family's front and back, and by the counting of labels, only.
    images int32 [M, 4]: (row, first position, grid height, grid width) of every image span in the whole rows, whatever
      part of them this is; stays on the host.
    documents, real_tokens: how many documents and non-padding tokens the rows hold.
    grids: the images that networks over whole images read.
    """

    tokens: torch.Tensor
    meta: torch.Tensor
    fields: dict[str, torch.Tensor]
    images: np.ndarray
    documents: int
    real_tokens: int
    grids: tuple[Grids, ...] = ()

    @property
    def mask(self) -> torch.Tensor:
        """int32 [B, 3, S]."""
        return self.meta[:, :3]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedBatch:
        """The batch on `device`; floating-point fields become `dtype` when one is given."""
        move = lambda t: t.to(device, dtype if t.is_floating_point() else None, non_blocking=True)  # noqa: E731
        return replace(
            self,
            tokens=move(self.tokens),
            meta=move(self.meta),
            fields={name: move(t) for name, t in self.fields.items()},
            grids=tuple(replace(grids, index=move(grids.index)) for grids in self.grids),
        )

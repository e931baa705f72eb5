"""The seam between a model family and everything else.

A family turns samples into sequences (host side, numpy), embeds a packed batch on the first pipeline stage, and turns
the trunk's output into loss sums on the last one. It imports no engine and no process group: what must be sharded it
asks of `ParallelOps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Protocol

import torch
from torch import nn

from megatron_mm.config.model import ImageConfig, SpecialsConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.nn.ops import ParallelOps
from megatron_mm.types import Document, FieldSpec, LossTerm, PackedBatch, Sample


@dataclass(frozen=True)
class Vocabulary:
    """Where everything stands in one id space. Ours: text first, then the specials, then the image codes (if any)."""

    text_size: int
    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    image_start: int
    image_codes: int
    size: int
    special: Mapping[str, int] = field(default_factory=dict)
    """Ids that only some families have: of the mask, of tasks."""

    @staticmethod
    def after_text(
        text_size: int, image_codes: int = 0, size: int | None = None, special: Sequence[str] = ()
    ) -> Vocabulary:
        """The default arrangement for a text tokenizer of `text_size` entries; `size` adds unused entries at the end.

        Raises:
            ValueError: `size` is smaller than what is needed.
        """
        common = [text_size + i for i in range(5)]
        start = text_size + 5 + len(special)
        needed = start + image_codes
        if size is not None and size < needed:
            raise ValueError(
                f"model.vocab_size={size} is too small: {text_size} text tokens, {5 + len(special)} specials and "
                f"{image_codes} image codes need {needed}. Raise model.vocab_size or leave it null."
            )
        own = {name: text_size + 5 + i for i, name in enumerate(special)}
        return Vocabulary(
            text_size, *common, image_start=start, image_codes=image_codes, size=size or needed, special=own
        )

    @staticmethod
    def at(ids: SpecialsConfig, text_size: int, image_codes: int, size: int | None) -> Vocabulary:
        """A converted model's vocabulary, whose ids are given; text has every entry that nothing else takes. BOS and
        EOS may be one and the same. Ids that are no field of ours are `special`.

        Args:
            ids: a `VocabularyConfig` where there are image codes.

        Raises:
            ValueError: an id or the size is not given, or they contradict each other.
        """
        named = asdict(ids)
        unset = [f"model.vocabulary.{name}" for name, value in named.items() if value is None]
        if unset:
            raise ValueError(f"model.vocabulary is set but for {', '.join(unset)}: set all of its ids, or none.")
        if size is None:
            raise ValueError(
                "model.vocabulary is set, so model.vocab_size must be too: give the number of all entries."
            )
        start = named.setdefault("image_start", size)
        codes = range(start, start + image_codes)
        specials = [value for name, value in named.items() if name != "image_start"]
        needed = max(text_size, codes.stop, *(special + 1 for special in specials))
        if needed > size:
            raise ValueError(f"model.vocab_size={size} is too small for its tokenizer and ids: raise it to {needed}.")
        if len({*specials, *codes}) < len(specials) - (ids.bos == ids.eos) + image_codes:
            raise ValueError(
                f"model.vocabulary={named} has an id twice or among its {image_codes} image codes: make them differ."
            )
        own = {name: named.pop(name) for name in named.keys() - {field.name for field in fields(Vocabulary)}}
        return Vocabulary(text_size, **named, image_codes=image_codes, size=size, special=own)


class Family(Protocol):
    """What every family provides. `terms` and `fields` never change during a run."""

    name: str
    trunk: TrunkConfig
    vocab: Vocabulary
    image_codes: int
    """Codes of the image tokenizer that the family reads, wherever their ids are; 0: it reads pixels or latents."""
    pixels: ImageConfig | None
    """Size of the pictures that a vision encoder reads besides (`ImageSegment.pixels`); None where there is none."""
    terms: tuple[LossTerm, ...]
    fields: dict[str, FieldSpec]
    causal: bool
    """Whether the mask is plain packed-causal, so that a causal kernel may compute it."""
    hides_keys: bool
    """Whether later queries may not see some keys (the mask's `until`); attention leaves that row out where none do."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's positions in a sequence."""
        ...

    def length(self, text_tokens: int, texts: int, images: int) -> int:
        """Positions of a document with so many segments and text tokens; an upper bound under condition dropout."""
        ...

    def encoded_images(self, texts: int, images: int, task: str) -> float:
        """How many images of a document networks over whole images read, on average over what is drawn; these are dealt
        out evenly. `task` as in `Sample`."""
        ...

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """The sample as a sequence, corrupted (noise, masking) by the sample's own streams."""
        ...

    def lay_out_prompt(self, sample: Sample, open_image: bool = False) -> Document:
        """The sample's segments in their own order, uncorrupted and without an end: what sampling continues.

        `open_image` ends the prompt with BOI. Fields that only losses read are left out.
        """
        ...

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """For every loss term the number of label positions in the batch, read from the fields alone."""
        ...

    def build_front(self, ops: ParallelOps) -> nn.Module:
        """Module: PackedBatch -> embeddings [B, S, D]."""
        ...

    def build_back(self, ops: ParallelOps) -> nn.Module:
        """Module: (hidden [B, S, D] after the final norm, PackedBatch) -> {term name: scalar sum of losses}."""
        ...


LossSums = dict[str, torch.Tensor]

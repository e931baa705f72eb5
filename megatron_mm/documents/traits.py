"""What attention may rely on in every document of a family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.documents.builder import DocumentFamily
from megatron_mm.documents.outline import Outline
from megatron_mm.documents.spans import Block, Role, Span


@dataclass(frozen=True)
class MaskTraits:
    """causal: the mask is plain packed-causal, so that a causal kernel may compute it. hides_keys: later queries may
    not see some keys (the mask's `until`); attention leaves that row out where none do."""

    causal: bool
    hides_keys: bool

    @classmethod
    def of(cls, family: DocumentFamily) -> MaskTraits:
        """From the spans of documents of every kind: text, pairs, and images among text."""
        image = family.config.image
        text, picture = TextPart(0, 2), ImagePart(1, image.height, image.width)
        shapes = [Shape(parts) for parts in ((text,), (text, picture), (text, picture, text), (picture, text, picture))]
        blocks = [
            block
            for shape in shapes
            for weight, choice in family.choices(shape)
            if weight
            for block in _blocks(family.spans(choice))
        ]
        return cls(causal=not blocks, hides_keys=any(block.hidden for block in blocks))


def chooses_images(family: DocumentFamily) -> bool:
    """Whether its models say themselves where an image begins: BOI is predicted between text and image."""
    image = family.config.image
    shape = Shape((TextPart(0, 2), ImagePart(1, image.height, image.width), TextPart(2, 2)))
    outlines = [Outline.of(family.spans(choice)) for weight, choice in family.choices(shape) if weight]
    return any(p.span.token == family.vocab.boi for outline in outlines for p in outline.predicted(Role.NEXT))


def _blocks(items: Iterable[Span | Block]) -> Iterator[Block]:
    for item in items:
        if isinstance(item, Block):
            yield item
            yield from _blocks(item.items)

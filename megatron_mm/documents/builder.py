"""The builder: from a sample, or its shape alone, and a family's list of spans to a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_mm.config.compose import ModelConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.shape import ImagePart, Shape, TextPart, shape_of
from megatron_mm.documents.choices import Choices
from megatron_mm.documents.outline import Outline, Place
from megatron_mm.documents.spans import Items, Role, Span, cut, length_of
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.types import BACK, FRONT, IGNORE, Document, FieldSpec, ImageSegment, LossTerm, PackedBatch, Sample

NO_TERM = -1
PREDICTED = {
    "labels": FieldSpec("int64", (), IGNORE, (BACK,)),
    "term": FieldSpec("int8", (), NO_TERM, (BACK,)),
}
"""The fields that the builder fills itself, of every family: the id that is predicted at a position, and the number of
its loss term."""
ONE_HEAD = PREDICTED | {"term": replace(PREDICTED["term"], readers=())}
"""The same where all labels are of one loss, so that only their count needs the term."""


class DocumentFamily(Protocol):
    """What a family says of documents. `terms` and `fields` never change during a run."""

    config: ModelConfig
    vocab: Vocabulary
    image_codes: int
    """Codes of the image tokenizer that the family reads, wherever their ids are; 0: it reads pixels or latents."""
    encoder_side: int | None
    """Pixels of a side of the pictures that a vision encoder reads besides (`ImageSegment.pixels`); None where there is
    none."""
    terms: tuple[LossTerm, ...]
    fields: dict[str, FieldSpec]
    """`PREDICTED`, and what the family reads of images."""

    def choices(self, shape: Shape) -> Choices:
        """What a document of this shape may teach; one of them is drawn from the sample's streams."""
        ...

    def spans(self, shape: Shape) -> Items:
        """A choice as the list of spans that it consists of."""
        ...

    def fill(self, draft: Draft, streams: Streams) -> None:
        """Fills in the images of a draft, and corrupts what is predicted in place.

        Raises:
            ValueError: an image is not what the configuration says.
        """
        ...


@dataclass
class Draft:
    """A document whose texts and specials stand, and whose images a family fills in.

    tokens int64 [n]: what the model reads. targets int64 [n]: what is predicted, `IGNORE` where that is no id.
    predicted bool [n]: positions in place that count. fields: name -> array [n, ...], filled with their padding.
    """

    sample: Sample
    outline: Outline
    tokens: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    fields: dict[str, np.ndarray]

    def images(self) -> Iterator[tuple[Place, ImageSegment]]:
        """Every image's place, and its content."""
        for place in self.outline.places:
            if place.span.grid:
                segment = self.sample.segments[place.span.source]
                assert isinstance(segment, ImageSegment)
                yield place, segment

    def write(self, at: slice, ids: np.ndarray) -> None:
        """Ids of the vocabulary, both to be read and to be predicted."""
        self.tokens[at] = self.targets[at] = ids.ravel()

    def mask(self, at: np.ndarray, hidden: np.ndarray, mask_id: int) -> None:
        """Of positions `at` [k], those that are `hidden` bool [k] read as `mask_id`, and only they are predicted."""
        self.tokens[at[hidden]] = mask_id
        self.predicted[at[~hidden]] = False


@dataclass(frozen=True)
class Opening:
    """A prompt, and the place of what is to be written behind it.

    block: an image's positions, still empty, with all that stands in one block with them; without any, text is next.
    """

    prompt: Document
    block: Document

    def __len__(self) -> int:
        return len(self.prompt.tokens) + len(self.block.tokens)


class Builder:
    """Documents of one family: for training, for planning, for sampling. What the data path calls a layout."""

    def __init__(self, family: DocumentFamily):
        self.family = family
        self.vocab, self.fields = family.vocab, family.fields
        self.image_codes, self.encoder_side = family.image_codes, family.encoder_side
        self._terms = {term.name: number for number, term in enumerate(family.terms)}

    def length(self, shape: Shape) -> int:
        """Positions of the longest document that a sample of this shape may become."""
        return max(length_of(self.family.spans(choice)) for weight, choice in self.family.choices(shape) if weight)

    def encoded_images(self, shape: Shape) -> float:
        """How many images of a document networks over whole images read, on average over what is drawn; one of twice
        `model.image`'s area counts twice."""
        image = self.family.config.image
        areas = {part.source: part.height * part.width / (image.height * image.width) for part in shape.images}
        choices = [(weight, Outline.of(self.family.spans(choice))) for weight, choice in self.family.choices(shape)]
        return sum(
            weight * areas[p.span.source] for weight, outline in choices for p in outline.places if p.span.encoded
        )

    def lay_out(self, sample: Sample, streams: Streams) -> Document:
        """The sample as a sequence, corrupted (noise, masking) by the sample's own streams.

        Raises:
            ValueError: an image is not what the family's configuration says.
        """
        choices = self.family.choices(shape_of(sample))
        outline = Outline.of(self.family.spans(_draw(choices, streams)))
        draft = self._draft(sample, outline, tuple(self.family.fields))
        self.family.fill(draft, streams)
        for place in outline.predicted(Role.NEXT):
            first = max(place.first, 1)
            self._predict(draft, np.arange(first - 1, place.end - 1), draft.targets[first : place.end], place.span)
        for place in outline.predicted(Role.IN_PLACE):
            at = np.arange(place.first, place.end)[draft.predicted[place.at]]
            self._predict(draft, at, draft.targets[at], place.span)
        return _document(draft)

    def open(self, sample: Sample, shape: Shape) -> Opening:
        """The prompt that ends where the last part of `shape` begins; that part is to be written.

        The other parts are those of `sample`, uncorrupted. Fields that only losses read are left out.
        """
        before, following = cut(self.family.spans(shape), shape.parts[-1].source)
        draft = self._draft(sample, Outline.of(before), self.front_fields)
        self.family.fill(draft, Streams(0, sample.uid, 0))
        text = isinstance(following, Span) and not following.grid
        block = self._draft(sample, Outline.of([] if text else [following]), self.front_fields)
        return Opening(_document(draft), _document(block))

    def unconditional(self, image: ImagePart, tokens: int) -> Shape:
        """An image to be drawn from nothing, where its condition has so many tokens: what condition dropout trains."""
        pair = Shape((TextPart(0, tokens), replace(image, source=1, loss=True)), task="generation")
        return next(shape for _, shape in self.family.choices(pair) if not shape.conditioned)

    def whole(self, sample: Sample, shape: Shape) -> Document:
        """A finished document as it is read, uncorrupted and without an end."""
        draft = self._draft(sample, Outline.of(self.family.spans(shape.of(shape.parts, ends=False))), self.front_fields)
        self.family.fill(draft, Streams(0, sample.uid, 0))
        return _document(draft)

    @property
    def front_fields(self) -> tuple[str, ...]:
        """Those that a prompt has."""
        return tuple(name for name, spec in self.family.fields.items() if FRONT in spec.readers)

    def _draft(self, sample: Sample, outline: Outline, names: Sequence[str]) -> Draft:
        n, specs = len(outline), self.family.fields
        tokens = np.full(n, self.family.vocab.pad, dtype=np.int64)
        for place in outline.places:
            if place.span.token is not None:
                tokens[place.at] = place.span.token
            elif not place.span.grid:
                tokens[place.at] = sample.segments[place.span.source].ids
        fields = {name: np.full((n, *specs[name].shape), specs[name].fill, specs[name].dtype) for name in names}
        return Draft(sample, outline, tokens, tokens.copy(), np.ones(n, dtype=bool), fields)

    def _predict(self, draft: Draft, at: np.ndarray, targets: np.ndarray, span: Span) -> None:
        draft.fields["labels"][at] = targets
        draft.fields["term"][at] = self._terms[span.term]


def counts(terms: Sequence[LossTerm], batch: PackedBatch) -> dict[str, int]:
    """For every loss term the number of positions whose mean it is, from the fields alone: those that `counted` (where
    a family has that field) or `term` names."""
    numbers = batch.fields.get("counted", batch.fields["term"])
    own = {term.name: int((numbers == number).sum()) for number, term in enumerate(terms)}
    return {term.name: own[term.over or term.name] for term in terms}


def _draw(choices: Choices, streams: Streams) -> Shape:
    possible = [(weight, shape) for weight, shape in choices if weight]
    reached = np.cumsum([weight for weight, _ in possible[:-1]])
    return possible[int(np.searchsorted(reached, streams.generator("choice").random(), side="right"))][1]


def _document(draft: Draft) -> Document:
    outline = draft.outline
    return Document(
        draft.sample.uid,
        draft.tokens,
        outline.mask,
        draft.fields,
        outline.images,
        outline.encoded,
        outline.positions,
    )

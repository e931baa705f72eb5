"""samples.png: what a model drew, what it read, and one document that it wrote with its images in order."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.report.accuracy import Captioned, Drawn, score
from megatron_mm.report.sheet import Section, Tile
from megatron_mm.sampling.generation import generate, refusal
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import ImageSegment, TextSegment

IMAGES_A_CLASS, CAPTIONS = 10, 22
"""So many are shown, the first ones."""


def write_document(model: SamplingModel, start: str, settings: SamplingConfig) -> list[str | Tile]:
    """A document that starts with the text `start`, its texts and images in order."""
    first = TextSegment(model.tokenizer.encode(start))
    write = "auto" if refusal(model, ["auto"]) is None else "image,text,image,text,image"
    (rest,) = generate(model, [[first]], write, settings)
    parts: list[str | Tile] = [start]
    for segment in rest:
        if isinstance(segment, ImageSegment):
            parts.append(Tile(model.codec.decode(segment.data)))
        elif isinstance(parts[-1], str):
            parts[-1] += model.tokenizer.decode(segment.ids)
        else:
            parts.append(model.tokenizer.decode(segment.ids))
    return parts


def samples_sections(
    drawn: Sequence[Drawn], captioned: Sequence[Captioned], document: Sequence[str | Tile] | None, start: str
) -> list[Section]:
    """The sheet's sections; nothing on it is picked by hand. drawn: empty, document: None where the family has none."""
    sections = []
    if drawn:
        captions = list(dict.fromkeys(d.pair.caption for d in drawn))
        images = [[Tile(d.image, right=d.right) for d in drawn if d.pair.caption == caption] for caption in captions]
        said = f"{score(drawn)} recognised as the caption's digit by a classifier trained on real images; others in red"
        rows = [(caption, tiles[:IMAGES_A_CLASS]) for caption, tiles in zip(captions, images, strict=True)]
        sections.append(Section("Text to image", said, rows))
    named = [Tile(c.pair.image, c.caption, c.right) for c in captioned[:CAPTIONS]]
    said = f"real, held-out images and the captions generated for them: {score(captioned)} right; wrong ones in red"
    sections.append(Section("Image to text", said, [("", named)]))
    if document is not None:
        title = "Text and images in one document"
        sections.append(Section(title, f'continued from "{start}"', [("", document)]))
    return sections

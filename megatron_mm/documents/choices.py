"""What a document may teach, where its shape leaves that open: the choices that several families share.

A choice is a shape with its probability: parts put in order or left out, and told which of them is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_mm.data.shape import ImagePart, Part, Shape, TextPart

Choices = Sequence[tuple[float, Shape]]
"""Probabilities, which add up to 1, and shapes."""
Drop = Callable[[Shape], Shape]


def without_texts(shape: Shape) -> Shape:
    """An image to be drawn from nothing: its caption left out."""
    return shape.of(shape.images[-1:], conditioned=False)


def drawing_all(shape: Shape, caption_first: float, condition_dropout: float) -> Choices:
    """Every image that may be learnt is drawn where it stands. Of a pair the order is drawn, and whether a leading
    caption is left out; other documents keep their order."""
    if shape.pair is None:
        return [(1.0, _drawing(shape, shape.parts))]
    caption, image = shape.pair
    led = _drawing(shape, (caption, image))
    return [
        (1 - caption_first, _drawing(shape, (image, caption))),
        (caption_first * (1 - condition_dropout), led),
        (caption_first * condition_dropout, without_texts(led)),
    ]


def drawing_one(shape: Shape, generation_share: float, condition_dropout: float, drop: Drop = without_texts) -> Choices:
    """A document teaches to draw the image that ends it, or to read all of its images.

    A pair is caption -> image or image -> caption: `shape.task` decides where it says something, else
    `generation_share`. Text alone before an image is its caption, which is given.
    """
    if shape.pair:
        caption, image = shape.pair
        share = {"generation": 1.0, "understanding": 0.0}.get(shape.task, generation_share)
        reading = shape.of((replace(image, loss=False), caption))
        drawing = shape.of((replace(caption, loss=False), replace(image, drawn=True)))
        return [(1 - share, reading), *_dropping([(share, drawing)], condition_dropout, drop)]
    last = shape.parts[-1:]
    if shape.task == "understanding" or not any(isinstance(part, ImagePart) and part.loss for part in last):
        return [(1.0, shape)]
    drawing = _drawing_last(shape)
    if drawing.draws:
        drawing = shape.of([*(replace(part, loss=False) for part in shape.parts[:-1]), *drawing.parts[-1:]])
    return _dropping([(1.0, drawing)], condition_dropout, drop)


def answering_one(shape: Shape, condition_dropout: float) -> Choices:
    """One part, drawn anew each time, is the answer to all before it, and what is behind it is left out."""
    wanted = {"generation": ImagePart, "understanding": TextPart}.get(shape.task, Part)
    answers = [n for n, part in enumerate(shape.parts) if part.loss and (n or len(shape.parts) == 1)]
    answers = [n for n in answers if isinstance(shape.parts[n], wanted)] or answers
    if not answers:
        return [(1.0, shape)]
    given = [replace(part, loss=False) for part in shape.parts]
    found = []
    for number in answers:
        answer = shape.parts[number]
        upto = shape.of([*given[:number], answer], ends=shape.ends or answer is not shape.parts[-1])
        found.append(upto if isinstance(answer, TextPart) else replace(_drawing_last(upto), ends=False))
    return _dropping([(1 / len(found), each) for each in found], condition_dropout, without_texts)


def _drawing_last(shape: Shape) -> Shape:
    image = shape.parts[-1]
    assert isinstance(image, ImagePart)
    return shape.of([*shape.parts[:-1], replace(image, drawn=True)])


def _dropping(choices: Choices, condition_dropout: float, drop: Drop) -> list[tuple[float, Shape]]:
    """Text to image, in a share of cases without the text."""
    found = []
    for weight, shape in choices:
        dropout = condition_dropout if shape.draws else 0.0
        found += [(weight * (1 - dropout), shape), (weight * dropout, drop(shape))]
    return found


def _drawing(shape: Shape, parts: Sequence[Part]) -> Shape:
    return shape.of(replace(part, drawn=part.loss) if isinstance(part, ImagePart) else part for part in parts)

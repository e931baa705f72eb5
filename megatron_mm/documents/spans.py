"""The words in which a family describes a document: spans, what is predicted of them, and who sees whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.documents.vocabulary import Vocabulary


class Role(Enum):
    """Where a span's positions are predicted."""

    GIVEN = "nowhere"
    NEXT = "at the position before each"
    IN_PLACE = "where they stand"

    @staticmethod
    def next_if(learnt: bool) -> Role:
        return Role.NEXT if learnt else Role.GIVEN


@dataclass(frozen=True)
class Span:
    """Positions of one kind, side by side, which see themselves and what stands before them.

    token: the id at each of them; None: the content of segment `source` fills them.
    term: the loss term of what is predicted. grid: rows and columns of an image's positions.
    reading: how the family fills an image's positions. encoded: whether a network over whole images reads it.
    rewind: positions count (for RoPE) from so many earlier: a copy stands at the places of what it copies.
    """

    length: int
    token: int | None = None
    source: int | None = None
    role: Role = Role.GIVEN
    term: str = ""
    grid: tuple[int, int] | None = None
    reading: str = ""
    encoded: bool = False
    rewind: int = 0


@dataclass(frozen=True)
class Block:
    """Spans, or blocks of them, whose positions all see each other; `hidden` from everything behind them."""

    items: tuple[Span | Block, ...]
    hidden: bool = False


Items = list[Span | Block]


def length_of(items: Iterable[Span | Block]) -> int:
    """How many positions they take."""
    return sum(item.length if isinstance(item, Span) else length_of(item.items) for item in items)


def special(token: int, role: Role = Role.GIVEN, term: str = "", count: int = 1) -> Span:
    """`count` positions that hold a special id."""
    return Span(count, token, role=role, term=term)


def text(part: TextPart, vocab: Vocabulary, term: str, learnt: Role = Role.NEXT) -> Items:
    """A run of text, and EOS where one ends it; `learnt` is its role where it has a loss."""
    role = learnt if part.loss else Role.GIVEN
    ids = vocab.pad if part.blank else None
    run = Span(part.tokens, ids, part.source, role, term)
    return [run, special(vocab.eos, role, term)] if part.ends else [run]


def in_order(
    shape: Shape,
    vocab: Vocabulary,
    write: Callable[[TextPart], Items],
    draw: Callable[[ImagePart], Items],
    end: Sequence[Span],
) -> Items:
    """BOS, every part in its place, and `end`, which a part that ends itself takes the place of."""
    items: Items = [special(vocab.bos)] if shape.begins else []
    for part in shape.parts:
        items += write(part) if isinstance(part, TextPart) else draw(part)
    ended = bool(shape.texts) and shape.parts[-1] is shape.texts[-1] and shape.texts[-1].ends
    return [*items, *end] if shape.ends and not ended else items


def task_first(
    shape: Shape,
    vocab: Vocabulary,
    write: Callable[[TextPart], Items],
    draw: Callable[[ImagePart], Items],
    end: Sequence[Span],
) -> Items:
    """A document that names its task first, where it is text to image or image to text; as `in_order` otherwise.

    T2I, BOS text EOS, image. MMU and images, which see each other, BOS text EOS.
    """
    if shape.draws:
        about = in_order(shape.of(shape.texts, ends=True), vocab, write, draw, end)
        return [special(vocab.special["t2i"]), *about, *draw(shape.images[0])]
    if shape.reads:
        images = [item for part in shape.images for item in draw(part)]
        about = in_order(shape.of(shape.texts), vocab, write, draw, end)
        return [Block((special(vocab.special["mmu"]), *images)), *about]
    return in_order(shape, vocab, write, draw, end)


def cut(items: Sequence[Span | Block], source: int) -> tuple[Items, Span | Block]:
    """(what stands before segment `source`, the innermost block with it, or the span itself): where sampling begins."""
    for number, item in enumerate(items):
        if isinstance(item, Span):
            if item.source == source:
                return list(items[:number]), item
        elif any(_holds(inner, source) for inner in item.items):
            before, found = cut(item.items, source)
            if isinstance(found, Span) and found.grid:
                return list(items[:number]), item
            return [*items[:number], *([Block(tuple(before), item.hidden)] if before else [])], found
    raise KeyError(source)


def _holds(item: Span | Block, source: int) -> bool:
    if isinstance(item, Span):
        return item.source == source
    return any(_holds(inner, source) for inner in item.items)

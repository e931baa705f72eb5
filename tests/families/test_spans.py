"""What follows from a list of spans: places, masks, positions, labels, and where sampling begins."""

from types import SimpleNamespace

import numpy as np
import pytest
from documents import lay_out

from megatron_mm import mask as masks
from megatron_mm.config.model import ImageConfig
from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.documents.builder import NO_TERM, PREDICTED, Builder
from megatron_mm.documents.choices import answering_one, drawing_all, drawing_one
from megatron_mm.documents.outline import Outline
from megatron_mm.documents.spans import Block, Role, Span, cut, in_order, length_of, special, text
from megatron_mm.types import IGNORE, ImageSegment, LossTerm, Sample, TextSegment

A, B, C = (Span(n, source=n) for n in (2, 3, 1))
IMAGE = Span(4, source=7, grid=(2, 2), encoded=True)


def test_places_follow_one_another_and_blocks_see_themselves():
    items = [A, Block((C, Block((IMAGE,)))), B]
    outline = Outline.of(items)
    assert [(place.first, place.end) for place in outline.places] == [(0, 2), (2, 3), (3, 7), (7, 10)]
    assert len(outline) == length_of(items) == 10
    expected = np.tri(10, dtype=bool)
    expected[2:7, 2:7] = True
    np.testing.assert_array_equal(masks.dense(outline.mask), expected)
    assert outline.images.tolist() == outline.encoded.tolist() == [[3, 2, 2]]
    assert outline.positions.tolist() == list(range(10))


def test_a_hidden_copy_is_seen_by_itself_alone_and_shares_its_positions():
    copy = Span(4, source=7, grid=(2, 2), rewind=4)
    outline = Outline.of([A, Block((IMAGE,), hidden=True), Block((copy,)), B])
    expected = np.tri(13, dtype=bool)
    expected[2:6, 2:6] = expected[6:10, 6:10] = True
    expected[6:, 2:6] = False
    np.testing.assert_array_equal(masks.dense(outline.mask), expected)
    assert outline.positions.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 8]
    masks.validate(outline.mask)


@pytest.mark.parametrize(
    ("items", "source", "before", "found"),
    [
        ([A, IMAGE, B], 7, [A], IMAGE),
        ([A, Block((C, IMAGE)), B], 7, [A], Block((C, IMAGE))),
        ([A, Block((IMAGE,), hidden=True), Block((IMAGE,))], 7, [A], Block((IMAGE,), hidden=True)),
        ([Block((A, Block((C, IMAGE)), B))], 7, [Block((A,))], Block((C, IMAGE))),
        ([Block((A, C, B))], 3, [Block((A, C))], B),
        ([Block((A, B))], 2, [], A),
    ],
)
def test_sampling_begins_before_the_innermost_block(items, source, before, found):
    assert cut(items, source) == (before, found)


class Plain:
    """Text and images of patches, every image drawn in place; `roles` of BOI, and of the image."""

    vocab = SimpleNamespace(pad=0, bos=101, eos=102, boi=103, eoi=104)
    config = SimpleNamespace(image=ImageConfig(1, 1, 2))
    image_codes, encoder_side = 0, None
    terms = (LossTerm("text", 1.0), LossTerm("image", 1.0))
    fields = PREDICTED

    def choices(self, shape):
        return drawing_all(shape, 1.0, 0.0)

    def spans(self, shape):
        def image(part):
            patches = Span(2, source=part.source, grid=(1, 2), role=Role.IN_PLACE, term="image")
            return [special(103, Role.NEXT, "text"), Block((patches,)), special(104)]

        return in_order(shape, self.vocab, lambda part: text(part, self.vocab, "text"), image, [special(102)])

    def fill(self, draft, streams):
        for place, _ in draft.images():
            draft.targets[place.at] = IGNORE


def words(*ids, **more):
    return TextSegment(np.array(ids), **more)


def picture(**more):
    return ImageSegment(np.zeros((1, 1, 2), np.float32), **more)


def test_labels_stand_before_what_is_next_and_on_what_is_in_place():
    document = lay_out(Plain(), Sample(0, "", (words(1, 2), picture(), words(3, loss=False), words(4))))
    assert document.tokens.tolist() == [101, 1, 2, 103, 0, 0, 104, 3, 4, 102]
    n = IGNORE
    assert document.fields["labels"].tolist() == [1, 2, 103, n, n, n, n, 4, n, n]
    assert document.fields["term"].tolist() == [0, 0, 0, NO_TERM, 1, 1, NO_TERM, 0, NO_TERM, NO_TERM]


def test_pieces_of_a_document_have_no_bos_or_no_eos():
    whole = Sample(0, "", (words(1, 2), words(3)))
    cuts = {
        (True, True): [101, 1, 2, 3, 102],
        (True, False): [101, 1, 2, 3],
        (False, True): [1, 2, 3, 102],
        (False, False): [1, 2, 3],
    }
    for (begins, ends), tokens in cuts.items():
        document = lay_out(Plain(), Sample(0, "", whole.segments, begins=begins, ends=ends))
        assert document.tokens.tolist() == tokens
        learnt = [token for token in (1, 2, 3) if token != tokens[0]]
        assert [label for label in document.fields["labels"].tolist() if label != IGNORE] == learnt


def test_turns_end_in_eos_which_the_last_one_does_not_repeat():
    document = lay_out(
        Plain(), Sample(0, "", (words(1, loss=False), words(2, ends=True), words(3, loss=False), words(4, ends=True)))
    )
    assert document.tokens.tolist() == [101, 1, 2, 102, 3, 4, 102]
    assert document.fields["labels"].tolist() == [IGNORE, 2, 102, IGNORE, 4, 102, IGNORE]


def test_length_is_the_longest_over_choices_and_encoded_images_their_mean():
    class Either(Plain):
        def choices(self, shape):
            return [(0.25, shape), (0.75, shape.of(shape.texts)), (0.0, shape.of([*shape.parts, *shape.parts]))]

        def spans(self, shape):
            return [special(101), *(Span(2, source=p.source, grid=(1, 2), encoded=True) for p in shape.images)]

    shape = Shape((TextPart(0, 5), ImagePart(1, 1, 2)))
    assert Builder(Either()).length(shape) == 3 and Builder(Either()).encoded_images(shape) == 0.25


def kinds(shape):
    """As letters: what is learnt or drawn in capitals."""
    found = ""
    for part in shape.parts:
        letter = "t" if isinstance(part, TextPart) else "i"
        found += letter.upper() if (part.loss if letter == "t" else part.drawn) else letter
    return found + "." * shape.ends


def parts(letters):
    """Capitals may be learnt."""
    made = [
        TextPart(n, 2, loss=kind.isupper()) if kind in "tT" else ImagePart(n, 1, 2, loss=kind.isupper())
        for n, kind in enumerate(letters)
    ]
    return Shape(tuple(made))


def weighed(choices):
    found = {}
    for weight, shape in choices:
        if weight:
            found[kinds(shape)] = found.get(kinds(shape), 0) + weight
    return {name: round(weight, 6) for name, weight in found.items()}


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("TI", {"IT.": 0.2, "TI.": 0.72, "I.": 0.08}),
        ("IT", {"IT.": 0.2, "TI.": 0.72, "I.": 0.08}),
        ("tI", {"tI.": 1}),
        ("TiT", {"TiT.": 1}),
        ("TITI", {"TITI.": 1}),
    ],
)
def test_choices_that_draw_every_image(letters, expected):
    assert weighed(drawing_all(parts(letters), 0.8, 0.1)) == expected


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("TI", {"iT.": 0.7, "tI.": 0.27, "I.": 0.03}),
        ("tI", {"tI.": 0.9, "I.": 0.1}),
        ("iT", {"iT.": 1}),
        ("I", {"I.": 1}),
        ("T", {"T.": 1}),
        ("TIT", {"TiT.": 1}),
        ("TITI", {"TiTI.": 1}),
        ("ITi", {"iTi.": 1}),
        ("TTI", {"ttI.": 0.9, "I.": 0.1}),
    ],
)
def test_choices_that_draw_the_image_at_the_end(letters, expected):
    assert weighed(drawing_one(parts(letters), 0.3, 0.1)) == expected


def test_a_task_overrules_the_shares():
    pair = parts("TI")
    for task, expected in (("understanding", {"iT.": 1}), ("generation", {"tI.": 1})):
        assert weighed(drawing_one(Shape(pair.parts, task), 0.3, 0.0)) == expected
    assert weighed(drawing_one(Shape(parts("TITI").parts, "understanding"), 0.3, 0.0)) == {"TiTi.": 1}


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("TITI", {"tI": 0.3, "I": 0.033333, "tiT.": 0.333333, "titI": 0.333333}),
        ("tTtT", {"tT.": 0.5, "ttt T.".replace(" ", ""): 0.5}),
        ("itT", {"itT.": 1}),
        ("I", {"I": 1}),
    ],
)
def test_choices_of_one_answer(letters, expected):
    assert weighed(answering_one(parts(letters), 0.1)) == expected

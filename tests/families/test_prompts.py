"""Segments that are given have no loss, in every family: questions, instructions, and images asked about."""

from dataclasses import replace

import numpy as np
import pytest
from documents import lay_out, length
from tiny_models import config_for

from megatron_mm.families.registry import build_family
from megatron_mm.types import IGNORE, ImageSegment, Sample, TextSegment

FAMILIES = ("transfusion", "chameleon", "showo", "mmada", "showo_flow")
QUESTION, ANSWER = np.arange(50, 57), np.arange(80, 85)


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    config = config_for(request.param, tmp_path, "model.condition_dropout=0")
    return build_family(config.model, 256)


def image(family):
    if family.vocab.image_codes:
        return ImageSegment(np.arange(16).reshape(4, 4))
    return ImageSegment(np.zeros((1, 8, 8), np.float32))


def learnt(family, sample, epochs=30):
    """Every token that is ever a label of text, and whether it was always the text's own."""
    found = set()
    for epoch in range(epochs):
        document = lay_out(family, sample, epoch)
        assert len(document.tokens) <= length(family, sample)
        labels = document.fields["labels"]
        found |= set(labels[labels != IGNORE].tolist())
    return found


def question(*segments, given):
    segments = (*segments, TextSegment(QUESTION), TextSegment(ANSWER))
    return Sample(1, "q", tuple(replace(s, loss=number >= given) for number, s in enumerate(segments)))


def test_only_the_answer_is_learnt(family):
    expected = {*ANSWER.tolist(), family.vocab.eos}
    assert learnt(family, question(given=1)) == expected
    assert learnt(family, question(image(family), given=2)) == expected
    assert learnt(family, question(given=0)) >= {*QUESTION.tolist(), *expected}


def test_what_is_given_may_stand_between(family):
    """Of three turns the second is given: the labels of the others stay, and nothing is learnt of it."""
    turns = (TextSegment(QUESTION), TextSegment(np.arange(20, 24), loss=False), TextSegment(ANSWER))
    found = learnt(family, Sample(1, "turns", turns))
    assert not found & set(range(20, 24)) and found >= {*ANSWER.tolist(), family.vocab.eos}
    if family.name != "mmada":  # which learns answers to something
        assert found >= set(QUESTION.tolist())


def test_a_given_image_is_never_drawn(family):
    sample = Sample(1, "given", (TextSegment(QUESTION), replace(image(family), loss=False), TextSegment(ANSWER)))
    for epoch in range(10):
        document = lay_out(family, sample, epoch)
        first, h, w = document.images[0].tolist()
        assert (document.fields["term"][first - 1 : first + h * w - 1] == -1).all()
        assert family.vocab.boi not in document.fields["labels"]


def test_questions_about_images_are_understanding(family):
    document = lay_out(family, question(image(family), given=2))
    if "mmu" in family.vocab.special:
        assert document.tokens[0] == family.vocab.special["mmu"]
    assert document.images[0, 0] < 5


def test_pairs_stay_in_order_behind_a_prompt(family):
    pair = Sample(1, "q", (replace(image(family), loss=False), TextSegment(ANSWER)))
    drawn = [lay_out(family, replace(pair, uid=uid)) for uid in range(20)]
    assert all(document.images[0, 0] < 4 for document in drawn), "the image leads"

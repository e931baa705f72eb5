"""Segments that are given have no loss, in every family: questions, instructions, and images asked about."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import config_for

from megatron_mm.data.corrupt import Streams
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
        document = family.lay_out(sample, Streams(0, 1, epoch))
        assert len(document.tokens) <= family.length(
            sum(len(s.ids) for s in sample.segments if isinstance(s, TextSegment)),
            sum(isinstance(s, TextSegment) for s in sample.segments),
            sum(isinstance(s, ImageSegment) for s in sample.segments),
        )
        labels = document.fields["labels"]
        found |= set(labels[labels != IGNORE].tolist())
    return found


def question(*segments, count):
    return Sample(1, "q", (*segments, TextSegment(QUESTION), TextSegment(ANSWER)), {"prompt_segments": count})


def test_only_the_answer_is_learnt(family):
    expected = {*ANSWER.tolist(), family.vocab.eos}
    assert learnt(family, question(count=1)) == expected
    assert learnt(family, question(image(family), count=2)) == expected
    assert learnt(family, question(count=0)) >= {*QUESTION.tolist(), *expected}


def test_questions_about_images_are_understanding(family):
    document = family.lay_out(question(image(family), count=2), Streams(0, 1, 0))
    if "mmu" in family.vocab.special:
        assert document.tokens[0] == family.vocab.special["mmu"]
    assert document.images[0, 0] < 5


@pytest.mark.parametrize("count", [-1, 2, "1", 1.0])
def test_prompts_must_leave_something(family, count):
    with pytest.raises(ValueError, match="'q' has prompt_segments=.* must be a whole number that leaves"):
        family.lay_out(question(count=count), Streams(0, 1, 0))


def test_pairs_stay_in_order_behind_a_prompt(family):
    pair = Sample(1, "q", (image(family), TextSegment(ANSWER)), {"prompt_segments": 1})
    drawn = [family.lay_out(replace(pair, uid=uid), Streams(0, uid, 0)) for uid in range(20)]
    assert all(document.images[0, 0] < 4 for document in drawn), "the image leads"

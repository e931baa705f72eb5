"""Show-o's layouts, omni mask and losses against their definitions, written out densely."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import label_counts, length
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.masked import ShowoConfig
from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import NO_TERM, Builder
from megatron_mm.families.showo import Showo
from megatron_mm.types import IGNORE

T2I, LM, MMU = range(3)
"""Numbers of the loss terms."""
CONFIG = ShowoConfig(
    trunk=TrunkConfig(hidden_size=16), image=ImageConfig(height=2, width=3), image_codes=32, condition_dropout=0.0
)


def codes(rng):
    return rng.integers(0, 32, (2, 3))


def family(**changes):
    return Showo(replace(CONFIG, **changes), 100)


def lay_out(fam, sample, epoch=0):
    return Builder(fam).lay_out(sample, Streams(0, sample.uid, epoch))


def ids(fam, segment):
    return (segment.data.ravel() + fam.vocab.image_start).tolist()


def test_text_to_image(sample):
    fam = family(generation_share=1.0)
    v = fam.vocab
    source = sample("it", codes)
    image, text = source.segments
    document = lay_out(fam, source)
    clean = [v.special["t2i"], v.bos, *text.ids.tolist(), v.eos, v.boi, *ids(fam, image), v.eoi]
    masked = document.tokens == v.special["mask"]
    assert np.where(masked, clean, document.tokens).tolist() == clean and masked.any()
    assert not masked[:-7].any() and not masked[-1]
    labels, term = document.fields["labels"], document.fields["term"]
    assert np.where(masked, clean, IGNORE).tolist() == labels.tolist(), "in place, not shifted"
    assert np.where(masked, T2I, NO_TERM).tolist() == term.tolist()
    n = len(clean)
    assert len(clean) == length(fam, source)
    causal, image_rows = np.tri(n, dtype=bool), np.arange(n) >= n - 8
    np.testing.assert_array_equal(masks.dense(document.mask), causal | image_rows[:, None])


def test_image_to_text(sample):
    fam = family(generation_share=0.0)
    v = fam.vocab
    source = sample("ti", codes)
    text, image = source.segments
    document = lay_out(fam, source)
    tokens = [v.special["mmu"], v.boi, *ids(fam, image), v.eoi, v.bos, *text.ids.tolist(), v.eos]
    assert document.tokens.tolist() == tokens
    n, bos = len(tokens), 9
    assert document.fields["labels"].tolist() == [IGNORE] * bos + tokens[bos + 1 :] + [IGNORE]
    assert document.fields["term"].tolist() == [NO_TERM] * bos + [MMU] * (n - bos - 1) + [NO_TERM]
    key = np.arange(n)
    np.testing.assert_array_equal(masks.dense(document.mask), np.tri(n, dtype=bool) | (key <= 8)[None])


def test_text_alone(sample):
    fam = family()
    source = sample("t", codes)
    document = lay_out(fam, source)
    tokens = [fam.vocab.bos, *source.segments[0].ids.tolist(), fam.vocab.eos]
    assert document.tokens.tolist() == tokens
    assert document.fields["labels"].tolist() == [*tokens[1:], IGNORE]
    assert document.fields["term"].tolist() == [LM] * (len(tokens) - 1) + [NO_TERM]
    np.testing.assert_array_equal(document.mask, masks.causal(len(tokens)))


@pytest.mark.parametrize("kinds", ["tit", "titi", "iti"])
def test_interleaved(sample, kinds):
    """Text is predicted from the position before, BOI included; only an image at the end is masked."""
    fam = family()
    v = fam.vocab
    document = lay_out(fam, sample(kinds, codes))
    assert len(document.tokens) == length(fam, sample(kinds, codes))
    tokens, labels, term = document.tokens, document.fields["labels"], document.fields["term"]
    n = len(tokens)
    spans = [(first - 1, first + 7) for first, _, _ in document.images.tolist()]
    masked = tokens == v.special["mask"]
    last = np.arange(n) >= spans[-1][0]
    assert masked.any() == kinds.endswith("i") and not masked[~last].any()
    assert (term[masked] == T2I).all() and (labels[masked] >= v.image_start).all()
    text = (term == MMU).nonzero()[0]
    assert (labels[text] == tokens[text + 1]).all()
    assert set(text + 1) == {i for i in range(1, n) if tokens[i] < 100 or tokens[i] in (v.boi, v.eos)}
    dense = np.tri(n, dtype=bool)
    for first, end in spans:
        dense[first:end, :end] = True
    np.testing.assert_array_equal(masks.dense(document.mask), dense)


def test_pairs_are_shared_out(sample):
    fam = family(generation_share=0.3)
    draws = [lay_out(fam, sample("ti", codes, uid)).tokens[0] == fam.vocab.special["t2i"] for uid in range(400)]
    assert abs(np.mean(draws) - 0.3) < 0.07
    for task, first in ("generation", "t2i"), ("understanding", "mmu"):
        told = [lay_out(fam, replace(sample("ti", codes, uid), task=task)).tokens[0] for uid in range(20)]
        assert set(told) == {fam.vocab.special[first]}
    drawn = [lay_out(family(generation_share=1.0), sample("ti", codes, 1), epoch).tokens for epoch in range(20)]
    assert len({tuple(tokens == fam.mask_id) for tokens in drawn}) > 5, "every epoch masks anew"


def test_condition_dropout_leaves_out_the_caption_only_where_it_is_one(sample):
    fam = family(generation_share=1.0, condition_dropout=1.0)
    v = fam.vocab
    assert lay_out(fam, sample("ti", codes)).tokens[:4].tolist() == [v.special["t2i"], v.bos, v.eos, v.boi]
    fam = family(generation_share=0.0, condition_dropout=1.0)
    assert len(lay_out(fam, sample("ti", codes)).tokens) == length(fam, sample("ti", codes)) > 12


def test_losses(sample, packed):
    torch.manual_seed(0)
    fam = family(lm_weight=0.25)
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    kinds = ["ti", "t", "iti", "ti", "ti", "ti"]
    samples = [sample(kind, codes, uid) for uid, kind in enumerate(kinds)]
    batch, documents = packed(fam, [samples[:3], samples[3:]], 64)
    hidden = front(batch)
    sums, labels, logits = back(hidden, batch), batch.fields["labels"], back.logits(hidden)
    for number, name in enumerate(("t2i", "lm", "mmu")):
        chosen = torch.from_numpy(np.isin(batch.fields["term"].numpy(), number))
        assert chosen.any() and label_counts(fam, batch)[name] == int(chosen.sum())
        torch.testing.assert_close(sums[name], F.cross_entropy(logits[chosen], labels[chosen], reduction="sum"))
    assert (batch.fields["term"] >= 0).sum() == (labels != IGNORE).sum()
    assert [(term.name, term.weight) for term in fam.terms] == [("t2i", 1.0), ("lm", 0.25), ("mmu", 1.0)]
    assert sum(len(document.tokens) for document in documents[0]) < 64


def test_vocabulary_is_full(sample):
    fam = family()
    v = fam.vocab
    assert list(v.special.values()) == [105, 106, 107] and v.image_start == 108 and v.size == 140
    with pytest.raises(ValueError, match="vocab_size=120 is too small: 100 text tokens, 8 specials and 32 image codes"):
        family(vocab_size=120)
    with pytest.raises(ValueError, match="codes from 32 to 32"):
        lay_out(fam, sample("ti", lambda rng: np.full((2, 3), 32)))

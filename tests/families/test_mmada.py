"""MMaDA's layouts and losses against a plain restatement of the paper's objectives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.masked import MMaDAConfig
from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.families.mmada import MMaDA
from megatron_mm.types import IGNORE, ImageSegment, Sample, TextSegment

CONFIG = MMaDAConfig(
    trunk=TrunkConfig(hidden_size=16),
    image=ImageConfig(height=2, width=3),
    image_codes=32,
    condition_dropout=0.0,
    text_block=8,
)


def codes(rng):
    return rng.integers(0, 32, (2, 3))


def family(**changes):
    return MMaDA(replace(CONFIG, **changes), 100)


def streams_of(sample):
    return Streams(0, sample.uid, 0)


def unmasked(fam, document):
    """Its tokens before they were masked; checks that labels stand where masks do, and nowhere else."""
    masked = document.tokens == fam.mask_id
    labels = document.fields["labels"]
    assert ((labels != IGNORE) == masked).all()
    return np.where(masked, labels, document.tokens).tolist(), masked


def ids(fam, segment):
    if isinstance(segment, TextSegment):
        return segment.ids.tolist()
    return [fam.vocab.boi, *(segment.data.ravel() + fam.vocab.image_start).tolist(), fam.vocab.eoi]


def test_every_document_sees_itself_whole(sample):
    for kinds in "t", "ti", "tit", "i":
        document = family().lay_out(sample(kinds, codes), streams_of(sample(kinds, codes)))
        np.testing.assert_array_equal(document.mask, masks.full(len(document.tokens)))


def test_text_to_image(sample):
    fam = family(generation_share=1.0)
    v, source = fam.vocab, sample("it", codes)
    image, text = source.segments
    document = fam.lay_out(source, streams_of(source))
    tokens, masked = unmasked(fam, document)
    assert tokens == [v.special["t2i"], v.bos, *text.ids.tolist(), v.eos, *ids(fam, image)]
    assert masked[-7:-1].any() and not masked[:-7].any() and not masked[-1]


def test_image_to_text_ends_in_a_full_block(sample):
    fam = family(generation_share=0.0)
    v = fam.vocab
    for uid in range(30):
        source = sample("ti", codes, uid)
        text, image = source.segments
        document = fam.lay_out(source, streams_of(source))
        tokens, masked = unmasked(fam, document)
        assert tokens == [v.special["mmu"], *ids(fam, image), v.bos, *text.ids.tolist(), *[v.eos] * (8 - len(text.ids))]
        assert not masked[:10].any()
        assert len(tokens) <= fam.length(len(text.ids), 1, 1)


def test_interleaved_documents_are_cut_behind_an_answer(sample):
    fam = family()
    source = sample("titi", codes)
    whole = [fam.vocab.bos, *(token for segment in source.segments for token in ids(fam, segment))]
    ends = np.cumsum([1, *(len(ids(fam, segment)) for segment in source.segments)])
    seen = set()
    for epoch in range(40):
        document = fam.lay_out(source, Streams(0, source.uid, epoch))
        tokens, masked = unmasked(fam, document)
        answer = int(Streams(0, source.uid, epoch).generator("answer").integers(1, 4))
        text = isinstance(source.segments[answer], TextSegment)
        end = ends[answer + 1]
        assert tokens[:end] == whole[:end] and not masked[: ends[answer]].any()
        assert set(tokens[end:]) <= {fam.vocab.eos}
        assert (len(tokens) - ends[answer]) % 8 == 0 if text else len(tokens) == end
        seen.add(answer)
    assert seen == {1, 2, 3}


def test_losses_are_those_of_the_paper(packed, sample):
    """lm: sum CE / p over (B L); mmu: CE / p / answer length, a mean over samples; t2i: mean CE of masked codes."""
    torch.manual_seed(0)
    fam = family(generation_share=0.5)
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    samples = [sample(kind, codes, uid) for uid, kind in enumerate(["ti", "t", "ti", "t", "ti", "ti", "t", "ti"])]
    batch, rows = packed(fam, [samples[:4], samples[4:]], 128)
    logits = back.logits(front(batch))
    log_p = F.log_softmax(logits, -1)
    expected, counted = {"t2i": 0.0, "lm": 0.0, "mmu": 0.0}, {"t2i": 0, "lm": 0, "mmu": 0}
    for row, documents in enumerate(rows):
        start = 0
        for document, source in zip(documents, samples[4 * row :], strict=False):
            n = len(document.tokens)
            tokens, masked = unmasked(fam, document)
            ce = [-log_p[row, start + i, tokens[i]].item() for i in np.flatnonzero(masked)]
            t = streams_of(source).generator("mask").random()  # the document's own time
            p = (1 - 1e-3) * t + 1e-3
            if not any(isinstance(segment, ImageSegment) for segment in source.segments):
                expected["lm"] += sum(ce) / p
                counted["lm"] += n - 1  # all but BOS
            elif tokens[0] == fam.vocab.special["mmu"]:
                answer = n - 10
                expected["mmu"] += sum(ce) / p / answer
                counted["mmu"] += 1
            else:
                expected["t2i"] += sum(ce)
                counted["t2i"] += len(ce)
            start += n
    assert all(counted.values())
    assert fam.counts(batch) == counted
    sums = back(front(batch), batch)
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-6)  # weights are fp32


def test_an_answer_without_masks_counts_all_the_same(packed):
    fam = family(generation_share=0.0)
    source = next(
        made
        for uid in range(1000)
        if not (fam.lay_out(made := Sample(uid, "", (TextSegment(np.arange(3)), ImageSegment(np.zeros((2, 3), int)))),
                            streams_of(made)).tokens == fam.mask_id).any()
    )  # fmt: skip
    batch, _ = packed(fam, [[source]], 32)
    assert fam.counts(batch) == {"t2i": 0, "lm": 0, "mmu": 1}

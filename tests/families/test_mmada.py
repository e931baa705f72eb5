"""MMaDA's layouts and losses against a plain restatement of the paper's objectives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import label_counts, lay_out, length
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.masked import MMaDAConfig
from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import Builder
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
        document = Builder(family()).lay_out(sample(kinds, codes), streams_of(sample(kinds, codes)))
        np.testing.assert_array_equal(document.mask, masks.full(len(document.tokens)))


def test_text_to_image(sample):
    fam = family(generation_share=1.0)
    v, source = fam.vocab, sample("it", codes)
    image, text = source.segments
    document = Builder(fam).lay_out(source, streams_of(source))
    tokens, masked = unmasked(fam, document)
    assert tokens == [v.special["t2i"], v.bos, *text.ids.tolist(), v.eos, *ids(fam, image)]
    assert masked[-7:-1].any() and not masked[:-7].any() and not masked[-1]


def test_image_to_text_ends_in_a_full_block(sample):
    fam = family(generation_share=0.0)
    v = fam.vocab
    for uid in range(30):
        source = sample("ti", codes, uid)
        text, image = source.segments
        document = Builder(fam).lay_out(source, streams_of(source))
        tokens, masked = unmasked(fam, document)
        assert tokens == [v.special["mmu"], *ids(fam, image), v.bos, *text.ids.tolist(), *[v.eos] * (8 - len(text.ids))]
        assert not masked[:10].any()
        assert len(tokens) == length(fam, source)


def test_interleaved_documents_are_cut_behind_an_answer(sample):
    """Which is any segment but the first: an image that only text precedes is text to image, as when it is sampled."""
    fam = family(condition_dropout=0.0)
    v, source = fam.vocab, sample("titi", codes)
    seen = set()
    for epoch in range(40):
        document = lay_out(fam, source, epoch)
        tokens, masked = unmasked(fam, document)
        answer = 2 if tokens[-1] == v.eos else 2 * len(document.images) - 1
        parts = [ids(fam, segment) for segment in source.segments[: answer + 1]]
        if answer == 1:
            whole = [v.special["t2i"], v.bos, *parts[0], v.eos, *parts[1]]
        else:
            whole = [v.bos, *(token for part in parts for token in part)]
        assert tokens[: len(whole)] == whole and set(tokens[len(whole) :]) <= {v.eos}
        first = len(whole) - len(parts[-1])
        assert not masked[:first].any()
        assert (len(tokens) - first) % 8 == 0 if answer == 2 else len(tokens) == len(whole)
        seen.add(answer)
    assert seen == {1, 2, 3}


def asked(source):
    """The same with a question before it, which is given."""
    return replace(source, segments=(TextSegment(np.arange(4), loss=False), *source.segments))


def test_answers_to_text_end_in_a_full_block(sample):
    fam = family()
    for uid in range(10):
        source = asked(sample("t", codes, uid))
        question, answer = (segment.ids.tolist() for segment in source.segments)
        document = lay_out(fam, source)
        tokens, masked = unmasked(fam, document)
        assert tokens == [fam.vocab.bos, *question, *answer, *[fam.vocab.eos] * (8 - len(answer) % 8)]
        assert not masked[:5].any()
        assert (document.fields["counted"] >= 0).nonzero()[0].tolist() == [5], "one answer, divided by its length"


def test_losses_are_those_of_the_paper(packed, sample):
    """lm: sum CE / p over (B L); mmu: CE / p / answer length, a mean over samples; t2i: mean CE of masked codes."""
    torch.manual_seed(0)
    fam = family(generation_share=0.5)
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    samples = [sample(kind, codes, uid) for uid, kind in enumerate(["ti", "t", "ti", "t", "ti", "ti", "t", "ti"])]
    samples[3] = asked(samples[3])
    batch, rows = packed(fam, [samples[:4], samples[4:]], 128)
    logits = back.logits(front(batch))
    log_p = F.log_softmax(logits, -1)
    expected, counted = (dict.fromkeys(("t2i", "lm", "mmu", "chat"), zero) for zero in (0.0, 0))
    for row, documents in enumerate(rows):
        start = 0
        for document, source in zip(documents, samples[4 * row :], strict=False):
            n = len(document.tokens)
            tokens, masked = unmasked(fam, document)
            ce = [-log_p[row, start + i, tokens[i]].item() for i in np.flatnonzero(masked)]
            t = streams_of(source).generator("mask").random()  # the document's own time
            p = (1 - 1e-3) * t + 1e-3
            if source is samples[3]:
                answer = n - 1 - len(source.segments[0].ids)
                assert answer % 8 == 0
                expected["chat"] += sum(ce) / p / answer
                counted["chat"] += 1
            elif not any(isinstance(segment, ImageSegment) for segment in source.segments):
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
    assert label_counts(fam, batch) == counted
    sums = back(front(batch), batch)
    for name, value in expected.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-6)  # weights are fp32


def test_an_answer_without_masks_counts_all_the_same(packed):
    fam = family(generation_share=0.0)
    pair = (TextSegment(np.arange(3)), ImageSegment(np.zeros((2, 3), int)))
    source = next(
        made for uid in range(1000) if not (lay_out(fam, made := Sample(uid, "", pair)).tokens == fam.mask_id).any()
    )
    batch, _ = packed(fam, [[source]], 32)
    assert label_counts(fam, batch) == {"t2i": 0, "lm": 0, "mmu": 1, "chat": 0}

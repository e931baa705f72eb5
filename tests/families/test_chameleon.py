"""Chameleon's layout and losses against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import label_counts, length
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.model import ChameleonConfig, ImageConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import Builder
from megatron_mm.families.chameleon import Chameleon
from megatron_mm.types import IGNORE

CONFIG = ChameleonConfig(trunk=TrunkConfig(hidden_size=16), image=ImageConfig(height=2, width=3), image_codes=32)
TEXT_VOCAB = 100


def codes(rng):
    return rng.integers(0, 32, (2, 3))


def family(**changes):
    return Chameleon(replace(CONFIG, **changes), TEXT_VOCAB)


def lay_out(fam, sample, epoch=0):
    return Builder(fam).lay_out(sample, Streams(0, sample.uid, epoch))


def test_everything_is_a_token(sample):
    fam = family()
    v, source = fam.vocab, sample("tit", codes)
    before, grid, after = source.segments
    document = lay_out(fam, source)
    image = (grid.data.ravel() + v.image_start).tolist()
    expected = [v.bos, *before.ids.tolist(), v.boi, *image, v.eoi, *after.ids.tolist(), v.eos]
    assert document.tokens.tolist() == expected
    assert document.images.tolist() == [[2 + len(before.ids), 2, 3]]
    assert document.fields["labels"].tolist() == [*expected[1:], IGNORE]
    assert max(expected) < v.size == TEXT_VOCAB + 5 + 32
    assert length(fam, source) == len(expected)
    np.testing.assert_array_equal(document.mask, masks.causal(len(expected)))


def test_pairs_put_the_image_first_at_the_configured_rate(sample):
    fam = family(image_first=0.3)
    first = [lay_out(fam, sample("ti", codes, uid)).images[0, 0] == 2 for uid in range(400)]
    assert abs(np.mean(first) - 0.3) < 0.07
    again = [lay_out(fam, sample("ti", codes, uid)).images[0, 0] == 2 for uid in range(400)]
    other_epoch = [lay_out(fam, sample("ti", codes, uid), epoch=1).images[0, 0] == 2 for uid in range(400)]
    assert first == again != other_epoch


def test_condition_dropout_leaves_out_the_caption(sample):
    fam = family(image_first=0.0, condition_dropout=1.0)
    document = lay_out(fam, sample("ti", codes))
    assert document.tokens[:2].tolist() == [fam.vocab.bos, fam.vocab.boi]
    assert len(document.tokens) == 2 + 2 + 6


def test_losses_are_cross_entropy_and_squared_log_z(sample, packed):
    torch.manual_seed(0)
    fam = family(z_loss_weight=0.01)
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    batch, _ = packed(fam, [[sample("ti", codes, 1), sample("t", codes, 2)], [sample("iti", codes, 3)]], 40)
    hidden = front(batch)
    torch.testing.assert_close(hidden, front.embedding.weight[batch.tokens])
    sums, labels = back(hidden, batch), batch.fields["labels"]
    valid = labels != IGNORE
    logits = back.logits(hidden)[valid]
    torch.testing.assert_close(sums["ce"], F.cross_entropy(logits, labels[valid], reduction="sum"))
    torch.testing.assert_close(sums["z"], logits.exp().sum(-1).log().square().sum())
    assert label_counts(fam, batch) == {"ce": int(valid.sum()), "z": int(valid.sum())}
    assert [(term.name, term.weight) for term in fam.terms] == [("ce", 1.0), ("z", 0.01)]


def test_vocabulary_may_be_larger_but_not_smaller():
    assert family(vocab_size=256).vocab.size == 256
    with pytest.raises(ValueError, match="vocab_size=120 is too small"):
        family(vocab_size=120)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((3, 2), int), r"int64 \[3, 2\], but model.image says integer codes \[2, 3\]"),
        (np.zeros((2, 3), np.float32), "float32"),
        (np.full((2, 3), 32), "codes from 32 to 32"),
    ],
)
def test_images_of_another_kind_are_refused(sample, data, message):
    with pytest.raises(ValueError, match=message):
        lay_out(family(), sample("ti", lambda rng: data))

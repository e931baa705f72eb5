"""Uni-MoE's layout, and its front."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from documents import length
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.janus import EncoderConfig
from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.unimoe import UniMoEConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import Builder
from megatron_mm.families.unimoe import UniMoE
from megatron_mm.nn.patch import unpatchify
from megatron_mm.types import IGNORE, ImageSegment, Sample, TextSegment

ENCODER = EncoderConfig(hidden_size=12, num_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
FAMILY = UniMoE(UniMoEConfig(trunk=TrunkConfig(hidden_size=16, num_experts=2), encoder=ENCODER), 100)


def make(kinds, uid=0, task="auto", side=8):
    rng = np.random.default_rng(uid)
    text = lambda: TextSegment(rng.integers(0, 100, 5))  # noqa: E731
    image = lambda: ImageSegment(np.zeros((3, 8, 8)), rng.uniform(-1, 1, (3, side, side)).astype(np.float32))  # noqa: E731
    return Sample(uid, f"sample-{uid}", tuple(text() if kind == "t" else image() for kind in kinds), task=task)


@pytest.mark.parametrize("kinds", ["ti", "it"])
def test_a_pair_is_an_image_and_its_labelled_text(kinds):
    sample = make(kinds)
    text = next(s for s in sample.segments if isinstance(s, TextSegment)).ids.tolist()
    image = next(s for s in sample.segments if isinstance(s, ImageSegment))
    document, v = Builder(FAMILY).lay_out(sample, Streams(0, 0, 0)), FAMILY.vocab
    assert document.tokens.tolist() == [v.bos, v.boi, *[v.pad] * 4, v.eoi, *text, v.eos]
    assert document.images.tolist() == [[2, 2, 2]]
    assert document.fields["labels"].tolist() == [IGNORE] * 6 + [*text, v.eos, IGNORE]
    np.testing.assert_array_equal(unpatchify(document.fields["pixels"][2:6], 2, 2, 4), image.pixels)
    np.testing.assert_array_equal(document.mask, masks.causal(len(document.tokens)))
    assert length(FAMILY, sample) == len(document.tokens)


@pytest.mark.parametrize("kinds", ["t", "tit", "iitti"])
def test_other_documents_keep_their_order_and_all_their_text_is_labelled(kinds):
    document, v = Builder(FAMILY).lay_out(make(kinds), Streams(0, 0, 0)), FAMILY.vocab
    wanted = {v.pad, v.boi, v.eoi}
    following = document.tokens[1:]
    labels = document.fields["labels"]
    assert (labels[:-1] == np.where(np.isin(following, list(wanted)), IGNORE, following)).all() and labels[-1] == IGNORE
    assert length(FAMILY, make(kinds)) == len(document.tokens)


def test_images_stand_where_they_are_and_take_gradients(packed):
    batch, _ = packed(FAMILY, [[make("it", 1), make("t", 2)], [make("tit", 3)]], 48)
    front = FAMILY.build_front(PlainOps())
    for parameter in front.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = front(batch)
    plain = front.embedding(batch.tokens)
    inside = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, first, h, w in batch.images.tolist():
        inside[row, first : first + h * w] = True
        pixels = unpatchify(batch.fields["pixels"][row, first : first + h * w].numpy(), h, w, 4)
        encoded = front.vision.encoder(torch.from_numpy(pixels)[None]).last_hidden_state[0]
        expected = encoded @ front.vision.adaptor.weight.T + front.vision.adaptor.bias  # a linear connector
        torch.testing.assert_close(x[row, first : first + h * w], expected, rtol=1e-4, atol=1e-5)
    assert inside.sum() == 8 and torch.equal(x[~inside], plain[~inside])
    x.sum().backward()
    assert all(parameter.grad is not None for parameter in front.parameters())


def test_it_draws_no_images():
    with pytest.raises(ValueError, match="a unimoe model draws no images: give its source task=understanding"):
        Builder(FAMILY).lay_out(make("ti", task="generation"), Streams(0, 0, 0))


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"'sample-0' has an image with pixels \[3, 12, 12\], but .*image_size=8"):
        Builder(FAMILY).lay_out(make("ti", side=12), Streams(0, 0, 0))


def test_without_experts_it_is_dense():
    config = replace(FAMILY.config, trunk=replace(FAMILY.trunk, num_experts=None))
    assert UniMoE(config, 100).trunk.moe_layers == 0

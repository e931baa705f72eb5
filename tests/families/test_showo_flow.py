"""Show-o2's layouts and losses against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import label_counts, length
from plain_ops import PlainOps, with_further

from megatron_mm import mask as masks
from megatron_mm.config.flow import ShowoFlowConfig
from megatron_mm.config.model import ImageConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import Builder
from megatron_mm.families.showo_flow import NO_TIME, ShowoFlow
from megatron_mm.nn.flow import UNIT
from megatron_mm.nn.patch import patchify
from megatron_mm.types import IGNORE

CONFIG = ShowoFlowConfig(
    trunk=TrunkConfig(hidden_size=16, num_attention_heads=2),
    image=ImageConfig(channels=3, height=4, width=6),
    semantic_hidden_size=8,
    semantic_layers=1,
    semantic_heads=2,
    semantic_ffn_size=16,
    flow_layers=1,
    flow_hidden_size=8,
    flow_heads=2,
    flow_query_groups=1,
    flow_ffn_size=16,
    condition_dropout=0.0,
)


def latents(rng):
    return rng.standard_normal((3, 4, 6)).astype(np.float32)


def family(**changes):
    return ShowoFlow(replace(CONFIG, **changes), 100)


def lay_out(fam, sample, epoch=0):
    return Builder(fam).lay_out(sample, Streams(0, sample.uid, epoch))


def test_text_to_image(sample):
    fam = family(generation_share=1.0)
    v, source = fam.vocab, sample("it", latents)
    image, text = source.segments
    document = lay_out(fam, source)
    k = len(text.ids)
    assert document.tokens.tolist() == [v.bos, *text.ids.tolist(), v.boi, v.pad, *[v.pad] * 6, v.eoi, v.eos]
    assert document.images.tolist() == [[k + 3, 2, 3]] and len(document.tokens) == length(fam, source)
    assert (document.fields["labels"] == IGNORE).all()
    time, where = document.fields["time"], slice(k + 3, k + 9)
    assert 0 < time[k + 3] < UNIT and (time[where] == time[k + 3]).all() and (time >= 0).sum() == 6
    clock = np.full(len(time), NO_TIME)
    clock[k + 2] = time[k + 3]
    np.testing.assert_array_equal(document.fields["clock"], clock)
    x1 = patchify(image.data, 2)
    x0 = x1 - document.fields["velocity"][where]
    assert abs(x0.mean()) < 0.4 and 0.7 < x0.std() < 1.3, "noise"
    t = time[k + 3] / UNIT
    np.testing.assert_allclose(document.fields["patches"][where], t * x1 + (1 - t) * x0, atol=1e-5)
    dense = np.tri(len(time), dtype=bool)
    dense[k + 2 : k + 9, k + 2 : k + 9] = True
    np.testing.assert_array_equal(masks.dense(document.mask), dense)


def test_image_to_text_is_clean(sample):
    fam = family(generation_share=0.0)
    v, source = fam.vocab, sample("ti", latents)
    text, image = source.segments
    document = lay_out(fam, source)
    tokens = [v.bos, v.boi, v.pad, *[v.pad] * 6, v.eoi, *text.ids.tolist(), v.eos]
    assert document.tokens.tolist() == tokens
    np.testing.assert_array_equal(document.fields["patches"][3:9], patchify(image.data, 2))
    assert (document.fields["time"][3:9] == UNIT).all() and document.fields["clock"][2] == UNIT
    assert document.fields["labels"].tolist() == [*[IGNORE] * 9, *tokens[10:], IGNORE]


@pytest.mark.parametrize(("kinds", "noised"), [("tit", 0), ("titi", 1), ("iti", 1), ("i", 1), ("t", 0)])
def test_only_an_image_that_ends_a_document_is_noised(sample, kinds, noised):
    document = lay_out(family(), sample(kinds, latents))
    times = [int(document.fields["time"][first]) for first, _, _ in document.images.tolist()]
    assert [time < UNIT for time in times] == [False] * (len(times) - noised) + [True] * noised


def test_losses(sample, packed):
    torch.manual_seed(0)
    fam = family(flow_weight=2.0)
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    for parameter in back.flow.parameters():
        parameter.data.normal_(std=0.2)
    samples = [sample(kinds, latents, uid) for uid, kinds in enumerate(["ti", "t", "iti", "ti", "ti", "ti"])]
    batch, _ = packed(fam, [samples[:3], samples[3:]], 80)
    batch = batch.to("cpu", torch.float64)
    embedded = front(batch)
    hidden = with_further(back, embedded, batch)
    sums, labels, time = back(hidden, batch), batch.fields["labels"], batch.fields["time"]
    valid, noised = labels != IGNORE, (time >= 0) & (time < UNIT)
    assert label_counts(fam, batch) == {"text": int(valid.sum()), "image": int(noised.sum())} and noised.any()
    torch.testing.assert_close(
        sums["text"], F.cross_entropy(back.logits(hidden)[valid], labels[valid], reduction="sum")
    )
    predicted = back.velocity(hidden)
    expected = F.mse_loss(predicted[noised], batch.fields["velocity"][noised], reduction="sum") / fam.patch_dim
    torch.testing.assert_close(sums["image"], expected)
    assert [(term.name, term.weight) for term in fam.terms] == [("text", 1.0), ("image", 2.0)]


def test_the_front_puts_both_paths_and_the_time_in_their_places(sample, packed):
    torch.manual_seed(0)
    fam = family()
    front = fam.build_front(PlainOps()).double()
    batch, _ = packed(fam, [[sample("iti", latents, 1)]], 40)
    batch = batch.to("cpu", torch.float64)
    x = front(batch)
    time, clock = batch.fields["time"], batch.fields["clock"]
    text = (time < 0) & (clock < 0)
    torch.testing.assert_close(x[text], front.embedding(batch.tokens)[text])
    torch.testing.assert_close(x[clock >= 0], front.clock_in(front.clock(clock[clock >= 0])))
    patches = batch.fields["patches"]
    fused = front.fusion(front.semantic(patches, batch.grids), front.projector(patches))
    torch.testing.assert_close(x[time >= 0], fused[time >= 0])
    assert not torch.allclose(x[clock >= 0][0], x[clock >= 0][1]), "clean and noised"


def test_images_of_another_size_are_refused(sample):
    with pytest.raises(ValueError, match=r"image of shape \[3, 4, 4\], but model.image says \[3, 4, 6\]"):
        lay_out(family(), sample("ti", lambda rng: np.zeros((3, 4, 4), np.float32)))

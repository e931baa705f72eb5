"""Transfusion's layout, mask and losses against their definitions and diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from documents import label_counts, length
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.model import ImageConfig, TransfusionConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import Builder
from megatron_mm.families.transfusion import Transfusion
from megatron_mm.nn.patch import unpatchify
from megatron_mm.types import IGNORE, ImageSegment

CONFIG = TransfusionConfig(
    trunk=TrunkConfig(hidden_size=16), image=ImageConfig(channels=2, height=8, width=12), patch_size=4, unet_channels=4
)
PATCHES = 2 * 3
TEXT_VOCAB = 100


def image(rng):
    return rng.standard_normal((2, 8, 12)).astype(np.float32)


def family(**changes):
    return Transfusion(replace(CONFIG, **changes), TEXT_VOCAB)


def lay_out(fam, sample, seed=0, epoch=0):
    return Builder(fam).lay_out(sample, Streams(seed, sample.uid, epoch))


@pytest.mark.parametrize("kinds", ["t", "i", "tit", "iitti"])
def test_sequence_is_bos_segments_eos_with_framed_images(sample, kinds):
    fam = family()
    v = fam.vocab
    document = lay_out(fam, sample(kinds, image))
    expected, starts = [v.bos], []
    for segment in sample(kinds, image).segments:
        if isinstance(segment, ImageSegment):
            starts.append(len(expected) + 1)
            expected += [v.boi, *[v.pad] * PATCHES, v.eoi]
        else:
            expected += segment.ids.tolist()
    expected.append(v.eos)
    assert document.tokens.tolist() == expected
    assert document.images.tolist() == [[start, 2, 3] for start in starts]
    assert length(fam, sample(kinds, image)) == len(expected)
    for name, spec in fam.fields.items():
        assert document.fields[name].shape == (len(expected), *spec.shape)
        assert document.fields[name].dtype == spec.dtype


def paper_mask(document):
    """Causal, or in the same image: written from the tokens and images, not from intervals."""
    n = len(document.tokens)
    owner = np.full(n, -1)
    for i, (first, h, w) in enumerate(document.images):
        owner[first : first + h * w] = i
    query, key = np.mgrid[:n, :n]
    return (key <= query) | ((owner[:, None] == owner[None, :]) & (owner[:, None] >= 0))


@pytest.mark.parametrize("kinds", ["ti", "it", "titi", "iitt"])
def test_mask_is_causal_or_same_image(sample, kinds):
    document = lay_out(family(), sample(kinds, image))
    masks.validate(document.mask)
    np.testing.assert_array_equal(masks.dense(document.mask), paper_mask(document))
    causal = masks.dense(masks.causal(len(document.tokens)))
    assert not np.array_equal(causal, paper_mask(document)), "a causal mask must not pass for Transfusion's"
    first = document.images[0, 0]
    boi, eoi = masks.dense(document.mask)[[first - 1, first + PATCHES]]
    assert boi.sum() == first and eoi.sum() == first + PATCHES + 1, "BOI and EOI are causal"


def test_labels_are_next_tokens_but_around_images(sample):
    fam = family()
    document = lay_out(fam, sample("tit", image))
    labels, tokens, v = document.fields["labels"], document.tokens, fam.vocab
    (first, _, _) = document.images[0]
    boi, eoi = first - 1, first + PATCHES
    assert tokens[boi] == v.boi and tokens[eoi] == v.eoi
    assert (labels[boi:eoi] == IGNORE).all(), "no loss where the input is BOI or a patch"
    assert labels[-1] == IGNORE
    for i in [*range(boi), *range(eoi, len(tokens) - 1)]:
        assert labels[i] == tokens[i + 1]
    assert labels[boi - 1] == v.boi and labels[-2] == v.eos


def test_patches_are_diffusers_noise_added_before_patchification(sample):
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    document = lay_out(family(), sample("iti", image))
    timesteps = set()
    clean = [s.data for s in sample("iti", image).segments if isinstance(s, ImageSegment)]
    for (first, h, w), x0 in zip(document.images, clean, strict=True):
        at = slice(first, first + h * w)
        (t,) = set(document.fields["timestep"][at].tolist())
        timesteps.add(t)
        x_t, noise = (unpatchify(document.fields[name][at], h, w, 4) for name in ("patches", "noise"))
        theirs = scheduler.add_noise(*(torch.from_numpy(a)[None] for a in (x0, noise)), torch.tensor([t]))[0]
        np.testing.assert_allclose(x_t, theirs, atol=1e-5)
    assert len(timesteps) == 2, "every image draws its own timestep"
    assert (document.fields["timestep"] >= 0).sum() == 2 * PATCHES


def test_noise_is_standard_normal_and_timesteps_cover_the_schedule(sample):
    fam = family()
    documents = [lay_out(fam, sample("tiit", image, uid)) for uid in range(200)]
    inside = [document.fields["timestep"] >= 0 for document in documents]
    noise = np.concatenate([d.fields["noise"][i] for d, i in zip(documents, inside, strict=True)])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    t = np.array([d.fields["timestep"][first] for d in documents for first, _, _ in d.images])
    assert t.min() < 20 and t.max() > 980 and abs(t.mean() - 500) < 50


def test_pairs_put_the_caption_first_at_the_configured_rate_and_bound_t_otherwise(sample):
    fam = family(caption_first=0.7, image_first_max_timestep=300)
    image_first, timesteps = [], {True: [], False: []}
    for uid in range(400):
        document = lay_out(fam, sample("ti" if uid % 2 else "it", image, uid))
        image_first.append(bool(document.images[0, 0] == 2))
        timesteps[image_first[-1]].append(document.fields["timestep"].max())
    assert abs(np.mean(image_first) - 0.3) < 0.07
    assert max(timesteps[False]) > 900 and 250 < max(timesteps[True]) <= 300


def test_longer_documents_keep_their_order_and_their_timesteps(sample):
    fam = family(caption_first=0.0, image_first_max_timestep=0, condition_dropout=1.0)
    documents = [lay_out(fam, sample("tit", image, uid)) for uid in range(20)]
    assert all(document.images[0, 0] > 2 for document in documents)
    assert max(document.fields["timestep"].max() for document in documents) > 0


def test_condition_dropout_leaves_out_the_caption_of_caption_first_pairs_only(sample):
    dropped = lay_out(family(caption_first=1.0, condition_dropout=1.0), sample("it", image))
    v = family().vocab
    assert dropped.tokens.tolist() == [v.bos, v.boi, *[v.pad] * PATCHES, v.eoi, v.eos]
    kept = lay_out(family(caption_first=0.0, condition_dropout=1.0), sample("it", image))
    assert len(kept.tokens) == len(dropped.tokens) + 5
    fam = family(condition_dropout=0.1)
    lengths = [len(lay_out(fam, sample("ti", image, uid)).tokens) for uid in range(600)]
    assert abs(np.mean(np.array(lengths) == len(dropped.tokens)) - 0.8 * 0.1) < 0.04


def test_layout_is_a_pure_function_of_seed_uid_and_epoch(sample):
    fam = family()
    one = lay_out(fam, sample("ti", image))
    lay_out(fam, sample("it", image, uid=9))
    np.random.seed(1)
    again = lay_out(family(), sample("ti", image))
    for name in fam.fields:
        np.testing.assert_array_equal(one.fields[name], again.fields[name])
    np.testing.assert_array_equal(one.tokens, again.tokens)
    noises = [one] + [lay_out(fam, sample("tii", image), seed=s, epoch=e) for s, e in ((0, 1), (1, 0))]
    drawn = [d.fields["noise"][d.images[0, 0]].tobytes() for d in noises]
    drawn.append(lay_out(fam, sample("ti", image, uid=1)).fields["noise"].max(0).tobytes())
    assert len(set(drawn)) == 4


@pytest.fixture(params=["linear", "unet"])
def model(request, sample, packed):
    """A family with its front and back on random weights, and a batch of two rows."""
    torch.manual_seed(0)
    fam = family(patch_codec=request.param)
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    rows = [[sample("ti", image, 1), sample("t", image, 2)], [sample("iti", image, 3), sample("it", image, 4)]]
    batch, documents = packed(fam, rows, 64)
    return fam, front, back, batch.to("cpu", torch.float64), documents


def test_losses_are_cross_entropy_and_diffusers_epsilon_error(model):
    fam, front, back, batch, documents = model
    hidden = front(batch)
    sums, counts = back(hidden, batch), label_counts(fam, batch)
    assert set(sums) == set(counts) == {term.name for term in fam.terms}

    text = counted = 0
    logits, noise = back.logits(hidden), back.predict_noise(hidden, batch)
    for row, first, h, w in batch.images.tolist():
        at = slice(first, first + h * w)
        predicted, target = (unpatchify(t[row, at].detach().numpy(), h, w, 4) for t in (noise, batch.fields["noise"]))
        sums["image"] = sums["image"] - h * w * F.mse_loss(torch.from_numpy(predicted), torch.from_numpy(target))
    for row, parts in enumerate(documents):
        start = 0
        for document in parts:
            for i, label in enumerate(document.fields["labels"]):
                if label != IGNORE:
                    text = text - logits[row, start + i].log_softmax(-1)[label]
                    counted += 1
            start += len(document.tokens)
    torch.testing.assert_close(sums["image"].item(), 0.0, atol=1e-9, rtol=0)
    torch.testing.assert_close(sums["text"], text)
    assert counts == {"text": counted, "image": 4 * PATCHES}


def test_front_embeds_tokens_outside_and_patches_inside_images(model):
    _, front, _, batch, _ = model
    inside = batch.fields["timestep"] >= 0
    embeddings = front(batch)
    torch.testing.assert_close(embeddings[~inside], front.embedding(batch.tokens)[~inside], atol=0, rtol=0)
    moved = batch.fields | {"timestep": torch.where(inside, (batch.fields["timestep"] + 500) % 1000, -1)}
    assert ((front(replace(batch, fields=moved)) - embeddings)[inside].abs().amax(-1) > 0).all()


def test_every_parameter_gets_a_gradient_with_and_without_images(model, sample, packed):
    fam, front, back, batch, _ = model
    text_only, _ = packed(fam, [[sample("t", image)]], 16)
    for data, zero in ((batch, False), (text_only.to("cpu", torch.float64), True)):
        for module in (front, back):
            module.zero_grad()
        sum(back(front(data), data).values()).backward()
        gradients = {n: p.grad for m in (front, back) for n, p in m.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        assert all((g == 0).all() == zero for n, g in gradients.items() if n.startswith("patch"))


def test_weights_of_the_terms():
    assert [(t.name, t.weight) for t in family(ddpm_weight=7.0).terms] == [("text", 1.0), ("image", 7.0)]


def test_an_image_of_another_size_is_refused(sample):
    with pytest.raises(ValueError, match=r"'sample-0' has an image of shape \[2, 8, 8\]"):
        lay_out(family(), sample("ti", lambda rng: np.zeros((2, 8, 8), np.float32)))

"""Janus's layouts and losses against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from documents import label_counts, length
from plain_ops import PlainOps

from megatron_mm import mask as masks
from megatron_mm.config.janus import EncoderConfig, JanusConfig
from megatron_mm.config.model import ImageConfig, SpecialsConfig, TrunkConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.documents.builder import Builder
from megatron_mm.families.janus import DRAWN, NO_IMAGE, SEEN, Janus
from megatron_mm.nn.patch import unpatchify
from megatron_mm.types import IGNORE, ImageSegment, Sample, TextSegment

TEXT_VOCAB, SIDE = 100, 8
ENCODER = EncoderConfig(hidden_size=12, num_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=4)
CONFIG = JanusConfig(
    trunk=TrunkConfig(hidden_size=16),
    image=ImageConfig(height=2, width=3),
    image_codes=32,
    encoder=ENCODER,
    condition_dropout=0.0,
)


def family(**changes):
    return Janus(replace(CONFIG, **changes), TEXT_VOCAB)


def make(kinds, uid=0, task="auto"):
    """Segments by letters: t (text), i (an image with codes and pixels)."""
    rng = np.random.default_rng(uid)
    text = lambda: TextSegment(rng.integers(0, TEXT_VOCAB, 5 + uid % 3))  # noqa: E731
    image = lambda: ImageSegment(rng.integers(0, 32, (2, 3)), rng.uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32))  # noqa: E731
    return Sample(uid, f"sample-{uid}", tuple(text() if kind == "t" else image() for kind in kinds), task=task)


def lay_out(fam, sample, epoch=0):
    return Builder(fam).lay_out(sample, Streams(0, sample.uid, epoch))


@pytest.mark.parametrize("kinds", ["ti", "it"])
def test_generation_is_caption_then_codes_with_code_labels_only(kinds):
    fam, sample = family(), make(kinds, task="generation")
    v, caption = fam.vocab, next(s for s in sample.segments if isinstance(s, TextSegment)).ids.tolist()
    codes = next(s for s in sample.segments if isinstance(s, ImageSegment)).data.ravel().tolist()
    document, first = lay_out(fam, sample), 2 + len(caption)
    expected = [v.bos, *caption, v.boi, *[v.pad] * 6, v.eoi, v.eos]
    assert document.tokens.tolist() == expected and document.images.tolist() == [[first, 2, 3]]
    fields = document.fields
    assert fields["kind"].tolist() == [NO_IMAGE] * first + [DRAWN] * 6 + [NO_IMAGE] * 2
    assert fields["codes"][first : first + 6].tolist() == codes
    assert fields["labels"].tolist() == [IGNORE] * (first - 1) + codes + [IGNORE] * 3, "BOI predicts code 0"
    assert fields["term"].tolist() == [-1] * (first - 1) + [1] * 6 + [-1] * 3 and not fields["pixels"].any()
    np.testing.assert_array_equal(document.mask, masks.causal(len(expected)))


@pytest.mark.parametrize("kinds", ["ti", "it"])
def test_understanding_is_pixels_then_text_with_text_labels_only(kinds):
    fam, sample = family(), make(kinds, task="understanding")
    v, text = fam.vocab, next(s for s in sample.segments if isinstance(s, TextSegment)).ids.tolist()
    image = next(s for s in sample.segments if isinstance(s, ImageSegment))
    document = lay_out(fam, sample)
    expected = [v.bos, v.boi, *[v.pad] * 4, v.eoi, *text, v.eos]
    assert document.tokens.tolist() == expected and document.images.tolist() == [[2, 2, 2]]
    fields = document.fields
    assert fields["kind"].tolist() == [NO_IMAGE] * 2 + [SEEN] * 4 + [NO_IMAGE] * (len(expected) - 6)
    np.testing.assert_array_equal(unpatchify(fields["pixels"][2:6], 2, 2, 4), image.pixels)
    assert not fields["pixels"][[0, 1, *range(6, len(expected))]].any()
    assert fields["labels"].tolist() == [IGNORE] * 6 + [*text, v.eos] + [IGNORE], "EOI predicts the first text token"
    assert not (fields["term"] == 1).any()
    np.testing.assert_array_equal(document.mask, masks.causal(len(expected)))


@pytest.mark.parametrize("kinds", ["t", "tit", "iitt"])
@pytest.mark.parametrize("task", ["auto", "understanding"])
def test_every_other_document_may_be_read_and_all_its_text_is_labelled(kinds, task):
    fam, sample = family(generation_share=0.0 if task == "auto" else 1.0), make(kinds, task=task)
    v, document = fam.vocab, lay_out(fam, sample)
    expected, is_text = [v.bos], [False]
    for segment in sample.segments:
        if isinstance(segment, TextSegment):
            expected += segment.ids.tolist()
            is_text += [True] * len(segment.ids)
        else:
            expected += [v.boi, *[v.pad] * 4, v.eoi]
            is_text += [False] * 6
    expected, is_text = [*expected, v.eos], [*is_text, True]
    assert document.tokens.tolist() == expected
    wanted = [token if text else IGNORE for token, text in zip(expected[1:], is_text[1:], strict=True)]
    assert document.fields["labels"].tolist() == [*wanted, IGNORE]
    assert (document.fields["kind"] == SEEN).sum() == 4 * kinds.count("i")
    assert not (document.fields["term"] == 1).any()
    assert length(fam, sample) == len(expected)


def test_condition_dropout_pads_the_caption_in_place():
    fam = family(condition_dropout=1.0)
    kept = lay_out(family(), make("ti", task="generation"))
    dropped = lay_out(fam, make("ti", task="generation"))
    v, boi = fam.vocab, int(dropped.images[0, 0]) - 1
    assert dropped.tokens.tolist() == [v.bos, *[v.pad] * (boi - 1), *kept.tokens[boi:]] and boi > 2
    assert all(np.array_equal(dropped.fields[name], kept.fields[name]) for name in fam.fields)
    read = lay_out(fam, make("ti", task="understanding"))
    assert np.array_equal(read.tokens, lay_out(family(), make("ti", task="understanding")).tokens)
    fam = family(condition_dropout=0.1, generation_share=1.0)
    share = np.mean([lay_out(fam, make("ti", uid)).tokens[1] == v.pad for uid in range(600)])
    assert abs(share - 0.1) < 0.04


def test_pairs_are_generated_at_the_configured_rate():
    fam = family(generation_share=0.3)
    draw = lambda epoch: [(lay_out(fam, make("ti", uid), epoch).fields["kind"] == DRAWN).any() for uid in range(400)]  # noqa: E731
    first = draw(0)
    assert abs(np.mean(first) - 0.3) < 0.07 and first == draw(0) != draw(1)


@pytest.mark.parametrize("image", [ImageConfig(height=2, width=3), ImageConfig(height=1, width=1)])
def test_length_of_a_pair_is_that_of_its_longer_layout(image):
    fam = family(image=image)
    segment = replace(make("i").segments[0], data=np.zeros((image.height, image.width), int))
    pair = (TextSegment(np.arange(5)), segment)
    lengths = [len(lay_out(fam, Sample(0, "", pair, task=task)).tokens) for task in ("understanding", "generation")]
    assert length(fam, Sample(0, "", pair)) == max(lengths) and len(set(lengths)) == 2


@pytest.mark.parametrize("kinds", ["titi", "iti"])
def test_an_image_that_ends_an_interleaved_document_is_generated(kinds):
    fam, sample = family(), make(kinds)
    document, v = lay_out(fam, sample), fam.vocab
    first, second = document.images[:, 0]
    assert document.fields["kind"][first] == SEEN and document.fields["kind"][second] == DRAWN
    labels, term = document.fields["labels"], document.fields["term"]
    assert labels[term == 1].tolist() == sample.segments[-1].data.ravel().tolist()
    assert v.boi not in labels[term == 0] and labels[-2] == v.eos


@pytest.fixture
def model(packed):
    """A family with its front and back on random weights, and a batch of two rows with every kind of document."""
    torch.manual_seed(0)
    fam = family()
    front, back = (build(PlainOps()).double() for build in (fam.build_front, fam.build_back))
    rows = [
        [make("ti", 1, "generation"), make("t", 2), make("ti", 5, "understanding")],
        [make("iti", 3), make("ti", 4, "generation")],
    ]
    batch, documents = packed(fam, rows, 64)
    return fam, front, back, batch.to("cpu", torch.float64), documents


def test_front_embeds_pixels_codes_and_tokens(model):
    """Pixels as the encoder and adaptor embed the whole picture, picture by picture."""
    _, front, _, batch, _ = model
    embeddings, kind = front(batch), batch.fields["kind"]
    torch.testing.assert_close(embeddings[kind == NO_IMAGE], front.embedding(batch.tokens)[kind == NO_IMAGE])
    drawn = front.code_adaptor(front.code_embedding(batch.fields["codes"][kind == DRAWN]))
    torch.testing.assert_close(embeddings[kind == DRAWN], drawn)
    seen = 0
    for row, first, h, w in batch.images.tolist():
        if kind[row, first] == SEEN:
            at = slice(first, first + h * w)
            picture = torch.from_numpy(unpatchify(batch.fields["pixels"][row, at].numpy(), h, w, 4))
            expected = front.vision.adaptor(front.vision.encoder(picture[None]).last_hidden_state[0])
            torch.testing.assert_close(embeddings[row, at], expected)
            seen += 1
    assert seen == 2 and len(batch.images) == 5


def test_losses_are_cross_entropies_of_the_two_heads(model):
    fam, front, back, batch, _ = model
    hidden = front(batch)
    sums, counts = back(hidden, batch), label_counts(fam, batch)
    labels = batch.fields["labels"]
    for number, (name, head) in enumerate((("text", back.logits), ("image", back.code_logits))):
        valid = batch.fields["term"] == number
        torch.testing.assert_close(sums[name], F.cross_entropy(head(hidden)[valid], labels[valid], reduction="sum"))
        assert counts[name] == int(valid.sum()) > 0
    assert counts["image"] == 18 and set(sums) == {"text", "image"}
    assert [(t.name, t.weight) for t in family(text_weight=2.0, image_weight=3.0).terms] == [("text", 2), ("image", 3)]


def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(model, packed):
    fam, front, back, batch, _ = model
    without = {kinds: packed(fam, [[make(kinds, 1, "generation")]], 32)[0] for kinds in ("t", "ti")}
    for data, reads, draws in ((batch, True, True), (without["t"], False, False), (without["ti"], False, True)):
        front.zero_grad()
        back.zero_grad()
        hidden = front(data.to("cpu", torch.float64))
        mixed = hidden + hidden.mean()  # as attention does: positions that are seen have no labels of their own
        sum(back(mixed, data).values()).backward()
        gradients = {n: p.grad for m in (front, back) for n, p in m.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        assert any(g.any() for n, g in gradients.items() if n.startswith("vision.encoder")) == reads
        assert gradients["code_embedding.weight"].any() == draws


def test_a_frozen_encoder_is_left_out_of_training():
    front = family(freeze_encoder=True).build_front(PlainOps())
    frozen = {name for name, parameter in front.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in front.named_parameters() if name.startswith("vision.encoder.")} != set()


def test_ids_may_be_given():
    ids = SpecialsConfig(pad=1, bos=2, eos=3, boi=4, eoi=5)
    v = family(vocabulary=ids, vocab_size=120).vocab
    assert (v.pad, v.bos, v.eos, v.boi, v.eoi, v.size, v.image_codes) == (1, 2, 3, 4, 5, 120, 0)
    with pytest.raises(ValueError, match="an id twice"):
        family(vocabulary=replace(ids, pad=5), vocab_size=120)
    with pytest.raises(ValueError, match="model.vocab_size must be too"):
        family(vocabulary=ids)
    assert family().vocab.size == TEXT_VOCAB + 5


@pytest.mark.parametrize(
    ("task", "image", "message"),
    [
        ("generation", ImageSegment(np.zeros((3, 2), int)), r"int64 \[3, 2\], but model.image says .* codes \[2, 3\]"),
        ("generation", ImageSegment(np.full((2, 3), 32)), "codes from 32 to 32, but model.image_codes=32"),
        ("understanding", ImageSegment(np.zeros((2, 3), int)), r"pixels None, but model.encoder.image_size=8 reads"),
        (
            "understanding",
            ImageSegment(np.zeros((2, 3), int), np.zeros((3, 8, 4), np.float32)),
            r"'pair' has an image with pixels \[3, 8, 4\], but model.encoder.image_size=8 reads \[3, 8, 8\]",
        ),
    ],
)
def test_images_of_another_kind_are_refused(task, image, message):
    with pytest.raises(ValueError, match=message) as error:
        lay_out(family(), Sample(0, "pair", (TextSegment(np.arange(3)), image), task=task))
    assert "\n" not in str(error.value)

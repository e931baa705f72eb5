"""Sampling from Janus: guidance over a padded prompt, the two heads, and what it is not trained for."""

import numpy as np
import pytest
import torch
from documents import finished
from tiny_models import config_for, with_model

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.image_codec import picture_of
from megatron_mm.data.pack import pack
from megatron_mm.families.janus import DRAWN
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.text import choose
from megatron_mm.types import ImageSegment, TextSegment

FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


def text(*ids):
    return TextSegment(np.array(ids, dtype=np.int64))


def code_logits(model, segments, without_prompt):
    """Logits [16, V] of an image's codes, by one pass without cache over a finished document."""
    document, vocab = finished(model.family, segments, drawn=True), model.family.vocab
    if without_prompt:
        first = int(np.flatnonzero(document.fields["kind"] == DRAWN)[0])
        document.tokens[1 : first - 1] = vocab.pad
    fields = {name: model.family.fields[name] for name in document.fields}
    batch = pack([[document]], len(document.tokens), fields, vocab.pad, [[0]])
    stage = model.stage
    first = int(np.flatnonzero(document.fields["kind"] == DRAWN)[0])
    with torch.no_grad():
        hidden = stage.hidden(Part.of(batch.to(model.device, stage.config.params_dtype))).transpose(0, 1)
        return stage.back.code_logits(hidden)[0, first - 1 : first + 15].cpu()


def guided_codes(model, scale):
    """Generated codes, and those that (guided) logits of whole sequences give."""
    settings = SamplingConfig(cfg_scale=scale, image_temperature=2.0, image_top_p=0.9)
    (generated,), *_ = generate(model, [[text(1, 2, 3)]], "image", settings)
    assert generated.pixels is None
    logits = code_logits(model, (text(1, 2, 3), generated), without_prompt=False)
    if scale != 1:
        u = code_logits(model, (text(1, 2, 3), generated), without_prompt=True)
        logits = u + scale * (logits - u)
    allowed = (torch.arange(logits.shape[1]) < 16).expand(16, -1)
    expected = choose(logits, allowed, torch.tensor(Streams(0, 0, 0).generator("text").random(16)), 2.0, 0.9)
    return generated.data.ravel().tolist(), expected.tolist()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_codes_equal_plain_logits(scale, device, folder):
    ours, expected = with_model(guided_codes, config_for("janus", folder, *FP64), scale, device=device)
    assert ours == expected and len(set(ours)) > 3


def greedy_codes(model):
    """By default and by the paper's scale; the default without condition dropout is none."""
    settings = [SamplingConfig(image_temperature=0, cfg_scale=scale) for scale in (None, 5.0, 3.0)]
    return [generate(model, [[text(5, 6, 7, 8)]], "image", s)[0][0].data.tolist() for s in settings]


def test_guidance_is_the_paper_s_by_default(folder):
    default, paper, other = with_model(greedy_codes, config_for("janus", folder, *FP64))
    assert default == paper != other


def what_it_writes(model):
    rng = np.random.default_rng(0)
    images = [ImageSegment(np.zeros((4, 4), int), rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32)) for _ in range(2)]
    settings = SamplingConfig(temperature=2.0, max_new_tokens=12)
    written = [generate(model, [[image, text(9)]], "text", settings)[0] for image in images]
    assert all(isinstance(s, TextSegment) and s.ids.max() < 256 for document in written for s in document)
    with pytest.raises(ValueError, match="Prompt 1 takes 81 positions and leaves no room for an image"):
        generate(model, [[text(*([65] * 79))]], "image")
    return [[s.ids.tolist() for s in document] for document in written]


def test_text_depends_on_the_pixels_alone(device, folder):
    """Both images have the same codes, which understanding does not read."""
    one, other = with_model(what_it_writes, config_for("janus", folder), device=device)
    assert one != other


def turns(model):
    """A greedy document of several turns, and the same by one call a turn, each of which reads all so far anew."""
    model.stage.back.head.weight.data[model.family.vocab.eos] *= -1  # texts end after a few tokens
    greedy = {"temperature": 0, "image_temperature": 0, "repetition_penalty": 3.0}
    settings = SamplingConfig(**greedy, cfg_scale=2.0, max_new_tokens=8)
    write = ["image", "text", "image", "text"]
    (document,) = generate(model, [[text(1, 2)]], ",".join(write), settings)
    so_far, expected = [text(1, 2)], []
    for kind in write:
        (segment,) = generate(model, [so_far], kind, settings)[0]
        expected.append(segment)
        drawn = isinstance(segment, ImageSegment)
        so_far.append(model.read_image(picture_of(model.codec.decode(segment.data))) if drawn else segment)
    return [[(s.ids if isinstance(s, TextSegment) else s.data).tolist() for s in side] for side in (document, expected)]


def test_interleaved_reads_its_own_images(device, folder):
    ours, expected = with_model(turns, config_for("janus", folder, *FP64), device=device)
    assert ours == expected and len(ours) >= 4, "too few turns to show anything"

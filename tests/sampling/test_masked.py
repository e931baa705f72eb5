"""Masked decoding against plain restatements of the papers' loops, over whole documents and without a cache."""

import math

import numpy as np
import pytest
import torch
from tiny_models import config_for, with_model

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import pack
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.remask import least_confident, masked_after, most_confident
from megatron_mm.types import Document, ImageSegment, TextSegment

FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


def text(*ids):
    return TextSegment(np.array(ids, dtype=np.int64))


def official_masking(probs, mask_len, temperature, gumbel):
    """`mask_by_random_topk` of Show-o's code, from the paper's definition: below the mask_len-th smallest."""
    confidence = torch.log(probs) + temperature * gumbel
    cut_off = torch.sort(confidence, dim=-1).values.gather(1, mask_len)
    return confidence < cut_off


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_remasking_is_the_official_one(temperature):
    generator = torch.Generator().manual_seed(0)
    n = 16
    unknown = torch.rand(50, n, generator=generator, dtype=torch.float64) < 0.6
    unknown[:, 0] = True
    unknown[:, 1] = True
    probs = torch.rand(50, n, generator=generator, dtype=torch.float64).clamp(1e-3)
    gumbel = torch.randn(50, n, generator=generator, dtype=torch.float64)
    for count in (0, 3, 9, 15):
        mask_len = torch.full((50, 1), count)
        mask_len = torch.max(torch.tensor([1]), torch.min(unknown.sum(-1, keepdim=True) - 1, mask_len))
        selected = torch.where(unknown, probs, torch.finfo(torch.float64).max)
        expected = official_masking(selected, mask_len, temperature, gumbel)
        ours = least_confident(probs.log(), unknown, gumbel, temperature, count)
        assert torch.equal(ours, expected) and ours.any(-1).all() and not (ours & ~unknown).any()


def test_the_schedule_falls_along_the_cosine():
    left = [masked_after(step, 8, 256) for step in range(8)]
    assert left == [math.floor(256 * math.cos(math.pi / 16 * (step + 1))) for step in range(8)]
    assert left[-1] == 0 and left == sorted(left, reverse=True)


def test_the_most_confident_unknown_tokens_are_taken():
    confidence = torch.tensor([[-1.0, -0.1, -3.0, -2.0], [-1.0, -2.0, -3.0, -4.0]], dtype=torch.float64)
    unknown = torch.tensor([[True, False, True, True], [False, False, True, False]])
    taken = most_confident(confidence, unknown, 2)
    assert taken.tolist() == [[True, False, False, True], [False, False, True, False]]


def logits_of(model, tokens, mask):
    """[n, V] of one document, by one pass."""
    family, stage = model.family, model.stage
    document = Document(0, np.array(tokens), mask, {}, np.zeros((0, 3), dtype=np.int32))
    batch = pack([[document]], len(tokens), {}, family.vocab.pad, [[0]]).to(model.device)
    with torch.no_grad():
        return stage.back.logits(stage.hidden(Part.of(batch)).transpose(0, 1))[0].cpu()


def document_mask(model, tokens, image):
    """Text to image: BOI stands at `image`, and all from there on sees everything; so does MMaDA's text."""
    n = len(tokens)
    lo, hi = np.zeros(n, np.int32), np.arange(1, n + 1, dtype=np.int32)
    if model.family.name == "mmada":
        hi[:] = n
    hi[image:] = n
    return np.stack([lo, hi, np.full(n, n, np.int32)])


def draw_plainly(model, steps, scale):
    """(generated codes, those of the papers' loop)."""
    vocab, mask_id, n = model.family.vocab, model.family.mask_id, 16
    settings = SamplingConfig(steps=steps, cfg_scale=scale, seed=3)
    (generated,), *_ = generate(model, [[text(1, 2, 3)]], "image", settings)
    stream, tokens, temperature = Streams(3, 0, 0).generator("image", 0), np.full(n, mask_id), 1.0
    heads = [[vocab.special["t2i"], vocab.bos, *words, vocab.eos, vocab.boi] for words in ([1, 2, 3], [])]
    for step in range(steps):
        both = []
        for head in heads[: 1 if scale == 1 else 2]:
            whole = [*head, *tokens, vocab.eoi]
            logits = logits_of(model, whole, document_mask(model, whole, len(head) - 1))
            both.append(logits[len(head) : len(head) + n, vocab.image_start : vocab.image_start + 16])
        w = scale - 1
        logits = (1 + w) * both[0] - w * both[1] if w else both[0]
        probs = logits.softmax(-1)
        uniforms = torch.from_numpy(stream.random((2, n)))
        order = probs.sort(dim=-1, descending=True, stable=True)
        drawn = order.indices.gather(-1, torch.searchsorted(order.values.cumsum(-1), uniforms[0][:, None]))[:, 0]
        unknown = torch.from_numpy(tokens == mask_id)
        selected = torch.where(unknown, probs.gather(-1, drawn[:, None])[:, 0], torch.finfo(torch.float64).max)
        tokens = np.where(unknown, drawn + vocab.image_start, tokens)
        if step + 1 == steps:
            break
        ratio = (step + 1) / steps
        temperature *= 1 - ratio
        length = max(1, min(int(unknown.sum()) - 1, math.floor(n * math.cos(ratio * math.pi / 2))))
        gumbel = -torch.log(-torch.log(uniforms[1]))
        again = official_masking(selected[None], torch.tensor([[length]]), temperature, gumbel[None])[0]
        tokens[again.numpy()] = mask_id
    return generated.data.ravel().tolist(), (tokens - vocab.image_start).tolist()


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("family", ["showo", "mmada"])
def test_images_are_those_of_the_official_loop(family, scale, device, folder):
    ours, plain_loop = with_model(draw_plainly, config_for(family, folder, *FP64), 6, scale, device=device)
    assert ours == plain_loop and len(set(ours)) > 3


def answer_plainly(model, per_step, unit, block):
    """(generated text, that of LLaDA's loop) of up to 13 tokens, every block's most confident tokens first."""
    vocab, mask_id = model.family.vocab, model.family.mask_id
    image = ImageSegment(np.arange(16).reshape(4, 4))
    settings = SamplingConfig(temperature=0.0, tokens_per_step=per_step, max_new_tokens=13, block_length=block)
    (generated,) = generate(model, [[image, text(5, 6)]], "text", settings)
    codes = (image.data.ravel() + vocab.image_start).tolist()
    head = [vocab.special["mmu"], vocab.boi, *codes, vocab.eoi, vocab.bos, 5, 6]
    x = np.array(head)
    forbidden = [vocab.pad, vocab.bos, vocab.boi, vocab.eoi, *vocab.special.values()]
    for first in range(len(head), len(head) + -(-13 // unit) * unit, block):
        if vocab.eos in x[len(head) :]:
            break
        if first == len(x):
            x = np.append(x, [mask_id] * unit)
            full = np.tile(np.array([[0], [len(x)], [len(x)]], np.int32), (1, len(x)))
        for _ in range(-(-block // per_step)):
            logits = logits_of(model, x, full).double()
            logits[:, forbidden] = logits[:, vocab.image_start :] = -torch.inf
            x0, p = logits.argmax(-1), logits.softmax(-1).max(-1).values
            p = torch.where(torch.from_numpy(x == mask_id), p, -torch.inf)
            p[:first] = p[first + block :] = -torch.inf
            taken = p.topk(per_step).indices
            taken = taken[p[taken] > -torch.inf]
            x[taken] = x0[taken].numpy()
    answer = x[len(head) :].tolist()
    ends = [i for i, token in enumerate(answer) if token in (vocab.eos, mask_id)]
    return [t for s in generated for t in s.ids.tolist()], answer[: min([*ends, 13])]


@pytest.mark.parametrize(("per_step", "unit", "block"), [(1, 8, 8), (3, 8, 8), (1, 16, 8), (2, 8, 4)])
def test_answers_are_those_of_lladas_loop(per_step, unit, block, device, folder):
    config = config_for("mmada", folder, f"model.text_block={unit}", *FP64)
    ours, plain_loop = with_model(answer_plainly, config, per_step, unit, block, device=device)
    assert ours == plain_loop and len(ours) > 0


def fills_the_context(model):
    """Prompts that leave exactly room for an image or a block, and one position less."""
    settings = SamplingConfig(steps=2, max_new_tokens=500)
    longest = 96 - 3 - 18
    assert generate(model, [[text(*([65] * longest))]], "image", settings)[0][0].data.shape == (4, 4)
    with pytest.raises(ValueError, match="leaves no room for an image"):
        generate(model, [[text(*([65] * (longest + 1)))]], "image", settings)
    for write in ("text", "text,image,text"):
        for n in (80, 50):
            written = generate(model, [[text(*([65] * n))]], write, settings)[0]
            assert sum(len(s.ids) if isinstance(s, TextSegment) else 18 for s in written) <= 96 - 1 - n
    with pytest.raises(ValueError, match="leaves no room for text"):
        generate(model, [[text(*([65] * 95))]], "text", settings)


@pytest.mark.parametrize("family", ["showo", "mmada"])
def test_full_context(family, folder):
    with_model(fills_the_context, config_for(family, folder))

"""What `generate` promises: grammar, reproducibility, independence of the batch, exactness against plain loops."""

import numpy as np
import pytest
import torch
from documents import finished
from tiny_models import config_for, with_model

from megatron_mm.config.generate import SamplingConfig
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.pack import pack
from megatron_mm.nn.patch import patchify, unpatchify
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.ops import padded_vocab_size
from megatron_mm.sampling.decoding import settings_for
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.text import Next, choose, grammar
from megatron_mm.types import ImageSegment, Sample, TextSegment

FAMILIES = ("transfusion", "transfusion_unet", "chameleon", "janus", "showo", "mmada", "showo_flow")
FAST = ("transfusion", "chameleon")
"""Of the fast subset."""
FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]
WILD = {
    "steps": 3,
    "temperature": 20.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 60,
    "cfg_scale": 1.0,
    "image_temperature": 20.0,
    "image_top_p": 1.0,
}
"""Nearly uniform over what is allowed, so that images begin by themselves."""


def text(*ids):
    return TextSegment(np.array(ids, dtype=np.int64))


def prompts_of(model, write):
    """Five prompts of different lengths."""
    rng = np.random.default_rng(2)
    texts = [text(*rng.integers(0, 256, n)) for n in (4, 11, 0, 7, 1)]
    if write != "text":
        return [[t] for t in texts]
    image = (lambda: rng.integers(0, 16, (4, 4))) if model.codec.codes else (lambda: rng.random((1, 8, 8), np.float32))
    pixels = (lambda: rng.random((3, 8, 8), np.float32)) if model.family.encoder_side else lambda: None
    return [[ImageSegment(image(), pixels()), t] for t in texts]


def plain(documents):
    """As lists of (kind, array), which compare and pickle."""
    return [[(type(s).__name__, s.ids if isinstance(s, TextSegment) else s.data) for s in d] for d in documents]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert [kind for kind, _ in one] == [kind for kind, _ in other]
        for (_, a), (_, b) in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if a.dtype == np.int64 else 1e-4)


def batched_and_single(model, write):
    prompts = prompts_of(model, write)
    settings = {
        "steps": 4,
        "temperature": 20.0 if "," in write or write == "auto" else 0.7,
        "max_new_tokens": 8,
        "num_samples": 2,
    }
    runs = [
        generate(model, prompts[:count], write, settings_for(model.family.name, **settings, **more))
        for count, more in ((5, {"batch_size": 10}), (5, {"batch_size": 1}), (2, {}), (2, {"seed": 1}))
    ]
    return [plain(run) for run in runs]


def writes_of(family):
    return ("text", "image", "text,image,text", *(() if family in ("janus", "mmada") else ("auto",)))


@pytest.mark.parametrize(
    ("family", "write"),
    [
        pytest.param(family, write, marks=() if family in FAST else pytest.mark.slow)
        for family in FAMILIES
        for write in writes_of(family)
    ],
)
def test_batch_changes_nothing_and_seed_everything(family, write, device, folder):
    config = config_for(family, folder)
    together, alone, fewer, reseeded = with_model(batched_and_single, config, write, device=device)
    assert len(together) == 10
    assert_same(together, alone)
    assert_same(together[:4], fewer)
    first, second, other_seed = (np.concatenate([a.ravel() for _, a in d]) for d in (fewer[0], fewer[1], reseeded[0]))
    assert not np.array_equal(first, second) and not np.array_equal(first, other_seed)


def write_wildly(model, seq_length):
    prompts = [[text(*range(i % 7))] for i in range(60)]
    documents = generate(model, prompts, "auto", settings_for(model.family.name, **WILD))
    lengths = [sum(len(s.ids) if isinstance(s, TextSegment) else 18 for s in d) for d in documents]
    new = [sum(len(s.ids) for s in d if isinstance(s, TextSegment)) for d in documents]
    assert all(1 + i % 7 + length <= seq_length for i, length in enumerate(lengths))
    assert max(new) <= WILD["max_new_tokens"]
    return plain(documents)


@pytest.mark.parametrize("family", ["transfusion", "chameleon"])
def test_interleaved_grammar(family, device, folder):
    documents = with_model(write_wildly, config_for(family, folder), 96, device=device)
    kinds = [[kind for kind, _ in document] for document in documents]
    assert any("ImageSegment" in k[:-1] for k in kinds), "no text follows an image: choose another seed"
    for document in documents:
        for kind, array in document:
            if kind == "TextSegment":
                assert array.size and array.min() >= 0 and array.max() < 256
            elif family == "chameleon":
                assert array.shape == (4, 4) and array.min() >= 0 and array.max() < 16
            else:
                assert array.shape == (1, 8, 8) and np.isfinite(array).all() and np.abs(array).max() <= 1
        texts = [kind == "TextSegment" for kind, _ in document]
        assert not any(a and b for a, b in zip(texts, texts[1:], strict=False)), "text in two segments"


def fills_the_context(model):
    """Prompts that leave exactly 17 positions (an image behind its BOI) or 1."""
    asked = {"steps": 2, "temperature": 0, "image_temperature": 0, "cfg_scale": 2.0, "max_new_tokens": 500}
    settings = settings_for(model.family.name, **asked)
    long = [[text(*([65] * n))] for n in (96 - 1 - 17, 40)]
    assert [d[0].data.size for d in generate(model, long, "image", settings)] in ([64, 64], [16, 16])
    for write in ("text", "auto", "text,image,text"):
        for n in (94, 60):
            written = generate(model, [[text(*([65] * n))]], write, settings)[0]
            assert sum(len(s.ids) if isinstance(s, TextSegment) else 18 for s in written) <= 96 - 1 - n
    with pytest.raises(ValueError, match="Prompt 2 takes 81 positions and leaves no room for an image"):
        generate(model, [[text(1)], [text(*([65] * 79))]], "image", settings)
    with pytest.raises(ValueError, match="Prompt 1 takes 96 positions and leaves no room for text"):
        generate(model, [[text(*([65] * 95))]], "text", settings)
    with pytest.raises(ValueError, match="write=banana must be text, image, several of them"):
        generate(model, [[text(1)]], "banana", settings)
    with pytest.raises(ValueError, match="Prompt 1' has an image of"):
        generate(model, [[ImageSegment(np.zeros((3, 5, 5), np.float32))]], "text", settings)


@pytest.mark.parametrize("family", ["transfusion", "chameleon"])
def test_full_context(family, folder):
    with_model(fills_the_context, config_for(family, folder))


def at_once(model, sample):
    """Logits [n, V] at every position of a finished document, by one pass without cache; its tokens."""
    document = finished(model.family, sample.segments)
    fields = {name: model.family.fields[name] for name in document.fields}
    batch = pack([[document]], len(document.tokens), fields, model.family.vocab.pad, [[0]])
    stage = model.stage
    with torch.no_grad():
        hidden = stage.hidden(Part.of(batch.to(model.device, stage.config.params_dtype)))
        return stage.back.logits(hidden.transpose(0, 1))[0].float(), document.tokens


def replay(model, scale):
    """Every token of documents written by `auto` is the one that the whole document's logits and the row's draws
    give."""
    vocab, images = model.family.vocab, 0
    settings = settings_for(model.family.name, **{**WILD, "cfg_scale": scale, "image_cfg_scale": 1.0})
    codes = torch.arange(padded_vocab_size(vocab.size)) - vocab.image_start
    codes = (codes >= 0) & (codes < vocab.image_codes)
    for ordinal, written in enumerate(generate(model, [[text(7, 8, 9)]] * 24, "auto", settings)):
        logits, tokens = at_once(model, Sample(0, "", (text(7, 8, 9), *written)))
        if scale != 1:
            seen = []
            for first, image in zip(np.flatnonzero(tokens == vocab.boi), images_of(written), strict=True):
                u = at_once(model, Sample(0, "", (image,)))[0][1:17]
                at = 1 + 18 * len(seen)
                i = at_once(model, Sample(0, "", (*seen, image)))[0][at : at + 16]
                logits[first : first + 16] = u + 1.0 * (i - u) + scale * (logits[first : first + 16] - u)
                seen.append(image)
        allowed = grammar(vocab, logits.shape[1], logits.device)
        draws, inside = Streams(0, ordinal, 0).generator("text"), None
        new = 0
        for position in range(4, len(tokens)):
            token = int(tokens[position])
            kind = allowed[Next.TEXT_OR_IMAGE if 96 - position >= 18 else Next.TEXT]
            if inside is not None:
                inside += 1
                if inside > 16:
                    inside = None
                    continue  # EOI is not drawn
                if vocab.image_codes == 0:
                    continue  # nor are patches
                kind = codes.to(kind.device)
            elif token == vocab.boi:
                inside, images = 0, images + 1
            else:
                new += 1
            uniform = torch.tensor([draws.random()], dtype=torch.float64, device=model.device)
            assert choose(logits[position - 1 : position], kind[None], uniform, 20.0, 1.0).item() == token
        if len(tokens) < 96 and new < WILD["max_new_tokens"]:
            uniform = torch.tensor([draws.random()], dtype=torch.float64, device=model.device)
            kind = Next.TEXT_OR_IMAGE if 96 - len(tokens) >= 18 else Next.TEXT
            assert choose(logits[-1:], allowed[kind, None], uniform, 20.0, 1.0).item() == vocab.eos
    return images


def images_of(document):
    return [segment for segment in document if isinstance(segment, ImageSegment)]


@pytest.mark.parametrize(("family", "scale"), [("transfusion", 1.0), ("chameleon", 1.0), ("chameleon", 2.5)])
def test_interleaved_equals_replay_without_cache(family, scale, device, folder):
    images = with_model(replay, config_for(family, folder, *FP64), scale, device=device)
    assert images >= 2, "too few images to show anything"


def guided_image(model):
    """(generated, DDIM over whole sequences without cache), guided with a scale of 2.5."""
    family, stage, settings = model.family, model.stage, SamplingConfig(steps=5, cfg_scale=2.5, seed=3)
    (generated,), *_ = generate(model, [[text(1, 2, 3)]], "image", settings)
    documents = [finished(family, (*prompt, generated)) for prompt in ([text(1, 2, 3)], [])]
    fields = {name: family.fields[name] for name in documents[0].fields}
    noise = Streams(3, 0, 0).generator("image", 0).standard_normal((1, 8, 8), dtype=np.float32)
    x = torch.from_numpy(patchify(noise, 2)).to(model.device)
    timesteps = family.schedule.timesteps(5)
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        eps = []
        for document in documents:
            (first, h, w), n = document.images[0], len(document.tokens)
            batch = pack([[document]], n, fields, family.vocab.pad, [[0]])
            batch.fields["patches"][0, first : first + h * w] = x.cpu()
            batch.fields["timestep"][0, first : first + h * w] = t
            batch = batch.to(model.device, stage.config.params_dtype)
            with torch.no_grad():
                out = stage.back.predict_noise(stage.hidden(Part.of(batch)).transpose(0, 1), batch)
            eps.append(out[0, first : first + h * w].float())
        x = family.schedule.step(x, eps[1] + 2.5 * (eps[0] - eps[1]), t, t_prev, clip=1.0)
    return generated.data, unpatchify(x.cpu().numpy(), 4, 4, 2)


@pytest.mark.parametrize("family", ["transfusion", "transfusion_unet", "transfusion_native"])
def test_guided_diffusion_equals_loop_without_cache(family, device, folder):
    ours, plain_loop = with_model(guided_image, config_for(family, folder, *FP64), device=device)
    assert np.abs(ours).mean() > 0.1 and (np.abs(ours) < 1).mean() > 0.2  # neither empty nor all clipped
    np.testing.assert_allclose(ours, plain_loop, rtol=0, atol=1e-5)


def guided_codes(model):
    """Generated codes, and those that guided logits of whole sequences give: without a prompt, with its images alone,
    with all of it."""
    first = ImageSegment(np.arange(16).reshape(4, 4))
    settings = SamplingConfig(cfg_scale=2.5, image_cfg_scale=1.7, image_temperature=0.9, image_top_p=0.8)
    (generated,), *_ = generate(model, [[first, text(1, 2, 3)]], "image", settings)
    full, _ = at_once(model, Sample(0, "", (first, text(1, 2, 3), generated)))
    pictures, _ = at_once(model, Sample(0, "", (first, generated)))
    nothing, _ = at_once(model, Sample(0, "", (generated,)))
    u = nothing[1:17]  # behind BOS comes BOI, whose logits are the first code's
    logits = u + 1.7 * (pictures[19:35] - u) + 2.5 * (full[22:38] - u)
    start = model.family.vocab.image_start
    draws = torch.tensor(Streams(0, 0, 0).generator("text").random(16), device=model.device)
    allowed = torch.ones(16, 16, dtype=torch.bool, device=model.device)
    expected = choose(logits[:, start : start + 16], allowed, draws, 0.9, 0.8)
    return generated.data.ravel().tolist(), expected.tolist()


def test_guided_codes_equal_plain_logits(device, folder):
    ours, expected = with_model(guided_codes, config_for("chameleon", folder, *FP64), device=device)
    assert ours == expected and len(set(ours)) > 3

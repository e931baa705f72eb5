"""A document read piece by piece over the KV cache gives what one forward pass over the whole of it gives."""

import numpy as np
import pytest
import torch
from documents import finished
from tiny_models import config_for, with_model

from megatron_mm.data.pack import pack
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.sampling.decoder import Decoder
from megatron_mm.types import Grids, ImageSegment, PackedBatch, TextSegment

FAMILIES = ("transfusion", "transfusion_unet", "chameleon", "chameleon_phi", "janus")
FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


def documents_of(model):
    """Two documents: text, image, text, of different lengths."""
    rng = np.random.default_rng(1)
    image = (lambda: rng.integers(0, 16, (4, 4))) if model.codec.codes else (lambda: rng.random((1, 8, 8), np.float32))
    pixels = lambda: rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32) if model.family.encoder_side else None  # noqa: E731
    text = lambda n: TextSegment(rng.integers(0, 256, n))  # noqa: E731
    documents = [(text(n), ImageSegment(image(), pixels()), text(m)) for n, m in ((3, 9), (7, 4))]
    return [finished(model.family, segments) for segments in documents]


def whole_batch(model, documents):
    fields = {name: model.family.fields[name] for name in documents[0].fields}
    length = max(len(document.tokens) for document in documents)
    batch = pack([[d] for d in documents], length, fields, model.family.vocab.pad, [[0]] * len(documents))
    return batch.to("cpu", model.stage.config.params_dtype)


def cut(batch: PackedBatch, rows, starts, n, images=()):
    """Positions starts[i] .. starts[i] + n of rows[i], in coordinates of their own."""
    take = lambda t: torch.stack([t[row, start : start + n] for row, start in zip(rows, starts, strict=True)])  # noqa: E731
    meta = torch.stack([batch.meta[row, :, start : start + n] for row, start in zip(rows, starts, strict=True)])
    meta[:, 1] -= torch.tensor(starts, dtype=torch.int32)[:, None]
    fields = {name: take(t) for name, t in batch.fields.items()}
    where = np.array(images, np.int32).reshape(-1, 4)
    return PackedBatch(take(batch.tokens), meta, fields, where, 0, 0, Grids.of(images, n))


def read_both_ways(model):
    """(logits piece by piece, at once) and, for a diffusion family, the same of the noise in a noised image."""
    documents, stage = documents_of(model), model.stage
    batch, firsts = whole_batch(model, documents), [int(d.images[0, 0]) for d in documents]
    lengths = [len(document.tokens) for document in documents]
    h, w = documents[0].images[0, 1:].tolist()
    at_once, by_piece, noises = [], [], []
    with torch.inference_mode():
        expected = stage.back.logits(stage.hidden(Part.of(batch.to(model.device))).transpose(0, 1))
    with Decoder.open(model, rows=3, capacity=max(lengths)) as decoder:
        rows = [2, 0]  # not a prefix of the cache's rows, and not in order
        prompts = [prompt_of(document, first) for document, first in zip(documents, firsts, strict=True)]
        follow = decoder.logits(decoder.read(rows, prompts))
        for i, first in enumerate(firsts):
            by_piece.append(follow[i])
            at_once.append(expected[i, first - 1])
        span = cut(batch, [0, 1], firsts, h * w, [(0, 0, h, w), (1, 0, h, w)])
        if "patches" in batch.fields:
            noised = whole_batch(model, documents)
            for row, first in enumerate(firsts):
                noised.fields["patches"][row, first : first + h * w] += torch.randn(h * w, model.family.patch_dim)
                noised.fields["timestep"][row, first : first + h * w] = 500
            piece = cut(noised, [0, 1], firsts, h * w, [(0, 0, h, w), (1, 0, h, w)])
            ours = stage.back.predict_noise(decoder.forward(rows, piece, keep=0), piece)
            whole = stage.back.predict_noise(stage_without_cache(model, decoder, noised), noised)
            noises = [(ours[i], whole[i, first : first + h * w]) for i, first in enumerate(firsts)]
        hidden = decoder.logits(decoder.forward(rows, span, keep=h * w))
        for i, first in enumerate(firsts):
            by_piece.extend(hidden[i])
            at_once.extend(expected[i, first : first + h * w])
        at = [first + h * w for first in firsts]
        while going := [i for i in (0, 1) if at[i] < lengths[i]]:
            piece = cut(batch, going, [at[i] for i in going], 1)
            follow = decoder.logits(decoder.forward([rows[i] for i in going], piece, keep=1)[:, 0])
            for i, logits in zip(going, follow, strict=True):
                by_piece.append(logits)
                at_once.append(expected[i, at[i]])
                at[i] += 1
    pairs = [(torch.stack(by_piece), torch.stack(at_once)), *noises]
    real = model.family.vocab.size
    return [(ours[..., :real].cpu().numpy(), whole[..., :real].cpu().numpy()) for ours, whole in pairs]


def prompt_of(document, end):
    fields = {name: value[:end] for name, value in document.fields.items()}
    none = np.zeros((0, 3), np.int32)
    return type(document)(document.uid, document.tokens[:end], document.mask[:, :end], fields, none)


def stage_without_cache(model, decoder, batch):
    caches = [(m, m.cache) for m in model.stage.modules() if getattr(m, "cache", None) is decoder.cache]
    assert caches
    for module, _ in caches:
        module.cache = None
    hidden = model.stage.hidden(Part.of(batch.to(model.device))).transpose(0, 1)
    for module, cache in caches:
        module.cache = cache
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [pytest.param("fp32", 1e-5, marks=pytest.mark.slow), ("fp64", 1e-12)]
)
def test_by_piece_equals_at_once(family, precision, tolerance, device, folder):
    extra = FP64 if precision == "fp64" else []
    pairs = with_model(read_both_ways, config_for(family, folder, *extra), device=device)
    assert len(pairs) == (1 if family.startswith(("chameleon", "janus")) else 3)
    for ours, whole in pairs:
        assert whole.std() > 0.1  # not a constant that anything would match
        np.testing.assert_allclose(ours, whole, rtol=0, atol=tolerance * np.abs(whole).max())


def cache_outlives(model):
    with pytest.raises(RuntimeError, match="stop"), Decoder.open(model, 1, 4):
        raise RuntimeError("stop")
    return [m.cache for m in model.stage.modules() if hasattr(m, "cache")]


def test_cache_is_detached_after_an_error(folder):
    caches = with_model(cache_outlives, config_for("chameleon", folder))
    assert caches == [None] * 4

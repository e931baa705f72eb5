"""With `clean_context`, what follows an image that is learnt sees in training what it sees in sampling."""

import numpy as np
import pytest
import torch
from documents import finished, lay_out
from tiny_models import config_for, with_model

from megatron_mm.data.pack import pack
from megatron_mm.documents.traits import MaskTraits
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.types import ImageSegment, Sample, TextSegment

FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


def logits_of(model, document):
    """[n, V] of a document, by one pass."""
    fields = {name: model.family.fields[name] for name in document.fields}
    batch = pack([[document]], len(document.tokens), fields, model.family.vocab.pad, [[0]])
    stage = model.stage
    with torch.no_grad():
        hidden = stage.hidden(Part.of(batch.to(model.device, stage.config.params_dtype)))
        return stage.back.logits(hidden.transpose(0, 1))[0]


def compare(model):
    """(training, sampling) logits at the tokens of texts, training's positions above sampling's, places of the texts in
    both."""
    rng = np.random.default_rng(0)
    text = lambda n: TextSegment(rng.integers(0, 256, n))  # noqa: E731
    image = lambda: ImageSegment(rng.standard_normal((1, 8, 8)).astype(np.float32))  # noqa: E731
    segments = (text(4), image(), text(3), image(), text(5))
    assert MaskTraits.of(model.family).hides_keys == model.config.model.clean_context
    documents = [lay_out(model.family, Sample(0, "", segments)), finished(model.family, segments)]
    texts = [np.flatnonzero(document.tokens < 256) for document in documents]
    logits = [logits_of(model, d)[torch.from_numpy(at)].cpu().numpy() for d, at in zip(documents, texts, strict=True)]
    places = [document.positions[at].tolist() for document, at in zip(documents, texts, strict=True)]
    return logits, len(documents[0].tokens) - len(documents[1].tokens), places


@pytest.mark.parametrize(("family", "copy"), [("transfusion", 16), ("transfusion_unet", 16), ("showo_flow", 17)])
def test_text_behind_images_sees_what_sampling_sees(family, copy, device, folder):
    config = config_for(family, folder, "model.clean_context=true", *FP64)
    (ours, sampled), more, (places, expected) = with_model(compare, config, device=device)
    np.testing.assert_allclose(ours, sampled, rtol=0, atol=1e-10)
    assert sampled.std() > 0.1 and more == 1 + 2 * copy, "EOS, and each image once more"
    assert places == expected and len(places) == 12


def test_without_it_text_sees_the_noise(device, folder):
    (ours, sampled), more, _ = with_model(compare, config_for("transfusion", folder, *FP64), device=device)
    assert np.abs(ours[4:] - sampled[4:]).max() > 0.01 and more == 1
    np.testing.assert_allclose(ours[:4], sampled[:4], rtol=0, atol=1e-10)

"""Prompts and drawings of many sizes (`model.image.transform=native`)."""

import numpy as np
import pytest
from tiny_models import config_for, with_model

from megatron_mm.data.shape import ImagePart, Shape, TextPart
from megatron_mm.documents.builder import Builder
from megatron_mm.nn.flow import FlowTimes
from megatron_mm.sampling.decoding import settings_for
from megatron_mm.sampling.generation import generate
from megatron_mm.types import FRONT, ImageSegment, Sample, TextSegment


def text(*ids):
    return TextSegment(np.array(ids, dtype=np.int64))


def drawn(model):
    """Behind images of two sizes, batched and one by one; then without a size."""
    rng, name = np.random.default_rng(0), model.family.name
    prompts = [[ImageSegment(rng.random((1, h, w), np.float32)), text(1, 2)] for h, w in ((8, 8), (4, 12))]
    asked = {"steps": 2, "height": 6, "width": 10, "cfg_scale": 3.0, "max_new_tokens": 4}
    runs = [generate(model, prompts, "image,text", settings_for(name, **asked, batch_size=size)) for size in (2, 1)]
    with pytest.raises(ValueError, match="the next such size is height=4 width=14"):
        generate(model, prompts, "image", settings_for(name, height=5, width=14))
    with pytest.raises(ValueError, match="say both"):
        generate(model, prompts, "image", settings_for(name, height=4))
    runs.append(generate(model, prompts, "image", settings_for(name, steps=1)))
    return [[document[0].data for document in run] for run in runs]


@pytest.mark.parametrize("family", ["transfusion", "transfusion_unet", "showo_flow"])
def test_images_are_drawn_in_the_size_that_is_asked(family, folder):
    together, alone, unasked = with_model(drawn, config_for(f"{family}_native", folder))
    assert [image.shape for image in together] == 2 * [(1, 6, 10)]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert [image.shape for image in unasked] == 2 * [(1, 8, 8)]


def image_alone(model):
    """The rows and columns that its patches carry."""
    family = model.family
    image = ImageSegment(np.random.default_rng(0).random((1, 4, 12), np.float32))
    shape = Shape((TextPart(0, 2, loss=False), ImagePart(1, 4, 12)))
    document = Builder(family).whole(Sample(0, "", (text(1, 2), image)), shape)
    assert document.images.tolist() == [[4, 2, 6]]
    places = document.fields["place"][4:16].tolist()
    return places == [[row, column] for row in range(2) for column in range(6)] and family.fields["place"].readers


def test_linear_patches_carry_their_places(folder):
    assert with_model(image_alone, config_for("transfusion_native", folder)) == (FRONT,)


def refuses(model):
    with pytest.raises(ValueError, match=r"with model\.image\.transform=crop all images have one size"):
        generate(model, [[text(1)]], "image", settings_for(model.family.name, height=8, width=8))


@pytest.mark.parametrize("family", ["transfusion", "showo"])
def test_one_size_fits_all_others(family, folder):
    with_model(refuses, config_for(family, folder))


def times_of(model):
    return [model.family.times(n) for n in (16, 40)]


def test_larger_images_get_noisier_times(folder):
    assert with_model(times_of, config_for("showo_flow_native", folder)) == [FlowTimes(16, True), FlowTimes(40, True)]

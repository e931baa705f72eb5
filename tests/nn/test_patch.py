"""Patchification, the linear patch layers and the U-Net blocks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid

from megatron_mm.families.patches import places
from megatron_mm.nn.patch import (
    LinearPatchIn,
    LinearPatchOut,
    TimestepEmbedding,
    patchify,
    place_embedding,
    unpatchify,
)
from megatron_mm.nn.unet import UNetPatchIn, UNetPatchOut
from megatron_mm.types import Grids

C, P, HIDDEN = 2, 4, 24
PATCH_DIM = C * P * P


def redraw(module):
    """Weights as the engine would draw them, but for zero-initialised ones, which tests want to see at work."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.init_std or 0.1, generator=generator)
    return module


@pytest.mark.parametrize("p", [1, 2, 4])
def test_unpatchify_inverts_patchify_in_the_order_of_pixel_unshuffle(p):
    image = np.random.default_rng(0).standard_normal((3, 8, 12), dtype=np.float32)
    patches = patchify(image, p)
    assert patches.shape == (8 * 12 // p**2, 3 * p * p)
    np.testing.assert_array_equal(unpatchify(patches, 8 // p, 12 // p, p), image)
    np.testing.assert_array_equal(patches, F.pixel_unshuffle(torch.from_numpy(image), p).flatten(1).T)


def test_timestep_embedding_tells_timesteps_apart():
    vectors = redraw(TimestepEmbedding(PATCH_DIM))(torch.arange(1000, dtype=torch.int32))
    assert vectors.shape == (1000, PATCH_DIM)
    assert torch.pdist(vectors.detach()).min() > 1e-3


def test_timestep_joins_the_patch_before_the_linear_layer():
    layer = redraw(LinearPatchIn(PATCH_DIM, HIDDEN))
    patches, timestep = torch.randn(2, 5, PATCH_DIM), torch.randint(0, 1000, (2, 5))
    expected = F.linear(patches + layer.time(timestep), layer.proj.weight)
    torch.testing.assert_close(layer(patches, timestep, torch.empty(0, 4, dtype=torch.int32)), expected)


@pytest.mark.parametrize(
    "module",
    [
        LinearPatchIn(PATCH_DIM, HIDDEN),
        LinearPatchOut(HIDDEN, PATCH_DIM),
        UNetPatchIn(C, P, HIDDEN, 8),
        UNetPatchOut(HIDDEN, C, P, 8),
    ],
)
def test_every_matrix_names_its_std_and_every_bias_is_zero(module):
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            assert parameter.init_std >= 0, name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
    stds = {name: parameter.init_std for name, parameter in module.named_parameters() if parameter.ndim > 1}
    assert (0.0 in stds.values()) == isinstance(module, LinearPatchOut | UNetPatchOut)


@pytest.mark.parametrize("p", [1, 2, 4])
def test_unet_treats_every_image_on_its_own(p):
    """Two rows with images of two sizes give what each image gives alone, and zeros elsewhere."""
    patch_dim = C * p * p
    down, up = redraw(UNetPatchIn(C, p, HIDDEN, 8)), redraw(UNetPatchOut(HIDDEN, C, p, 8))
    places = [(0, 2, 2, 3), (0, 10, 3, 3), (1, 0, 2, 3)]
    images = Grids.of(places, 20)
    assert [len(size.index) for size in images] == [12, 9] and images[0].images(20) == places[::2]
    patches, timestep = torch.randn(2, 20, patch_dim), torch.full((2, 20), 7)
    hidden = down(patches, timestep, images)
    back = up(hidden, images)
    assert hidden.shape == (2, 20, HIDDEN) and back.shape == (2, 20, patch_dim)
    inside = torch.zeros(2, 20, dtype=torch.bool)
    for row, first, h, w in places:
        where = (slice(row, row + 1), slice(first, first + h * w))
        inside[where] = True
        alone = Grids.of([(0, 0, h, w)], h * w)
        torch.testing.assert_close(down(patches[where], timestep[where], alone), hidden[where], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(up(hidden[where], alone), back[where], atol=1e-5, rtol=1e-4)
    assert (hidden[~inside] == 0).all() and (back[~inside] == 0).all()


def test_unet_sees_neighbouring_patches_as_neighbours():
    """A patch's embedding depends on the patches around it, and not on far ones of its row, as in a picture."""
    down = redraw(UNetPatchIn(1, 2, HIDDEN, 8))
    h, w, row, column = 3, 24, 1, 12
    patches = torch.randn(1, h * w, 4, requires_grad=True)
    hidden = down(patches, torch.zeros(1, h * w, dtype=torch.int32), Grids.of([(0, 0, h, w)], h * w))
    reach = torch.autograd.grad(hidden[0, row * w + column].square().sum(), patches)[0].abs().sum(-1).view(h, w)
    assert (reach[:, column - 1 : column + 2] > 0).all()
    assert (reach[:, [0, -1]] == 0).all()


def test_unet_without_images_still_gives_every_parameter_a_gradient():
    for module, args in (
        (UNetPatchIn(C, P, HIDDEN, 8), (torch.randn(1, 6, PATCH_DIM), torch.full((1, 6), -1))),
        (UNetPatchOut(HIDDEN, C, P, 8), (torch.randn(1, 6, HIDDEN),)),
    ):
        out = module(*args, ())
        out.sum().backward()
        assert (out == 0).all()
        assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in module.parameters())


def test_unet_needs_a_power_of_two():
    with pytest.raises(ValueError, match="patch_size=3"):
        UNetPatchIn(C, 3, HIDDEN, 8)


def test_places_are_diffusers_sines_and_cosines():
    place = torch.from_numpy(places((3, 5)))
    rows, columns = place.T.double()
    expected = get_2d_sincos_pos_embed_from_grid(16, torch.stack([columns, rows]), output_type="pt")
    assert place.tolist() == [[row, column] for row in range(3) for column in range(5)]
    torch.testing.assert_close(place_embedding(place, 16), expected.float())

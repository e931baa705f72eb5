"""loss.png and mask.png are written, and show what they should."""

import numpy as np
from PIL import Image

from megatron_mm.mask import concatenate, with_spans
from megatron_mm.report.plots import _smooth, plot_losses, plot_mask


def test_losses(tmp_path):
    rows = [{"iteration": i, "loss": 1.0, "loss/a": 1.0 / i, "loss/b": 0.0} for i in range(1, 5)]
    plot_losses(rows, tmp_path / "loss.png")
    one = Image.open(tmp_path / "loss.png").width
    plot_losses([row | {"loss/c": 1.0} for row in rows], tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width == one * 3 / 2


def test_smoothing_is_a_centred_mean():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert np.allclose(_smooth(values, 1), [1.5, 7 / 3, 14 / 3, 28 / 3, 12])
    assert np.allclose(_smooth(values, 0), values)


def test_mask_shows_images_in_their_own_colour(tmp_path):
    mask = concatenate([with_spans(40, [(8, 33)])], 64)
    plot_mask(mask, np.array([[8, 5, 5]]), tmp_path / "mask.png")
    pixels = np.asarray(Image.open(tmp_path / "mask.png").convert("RGB")).reshape(-1, 3)
    blue, orange = ((pixels == colour).all(1).sum() for colour in ([31, 119, 180], [255, 127, 14]))
    # 625 pairs within the image; causal text has 8 * 9 / 2 before it, then 25 * 8 and 33 * 7 + 7 * 8 / 2.
    assert np.isclose(blue / orange, (36 + 200 + 259) / 625, rtol=0.05)

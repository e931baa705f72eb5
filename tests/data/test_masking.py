"""Shares of masked tokens against the integrals of their schedules."""

import math

import numpy as np
import pytest

from megatron_mm.data.corrupt import Streams
from megatron_mm.data.masking import LEAST, mask_image, mask_text


def generators(count):
    return [Streams(0, uid, 0).generator("mask") for uid in range(count)]


def test_images_follow_the_cosine_schedule():
    masked = np.stack([mask_image(64, generator) for generator in generators(4000)])
    share = masked.mean(1)
    assert share.min() == 1 / 64 and share.max() == 1.0
    # t is uniform, so the share's mean is the integral of cos(pi t / 2), and half of all shares exceed cos(pi / 4).
    assert share.mean() == pytest.approx(2 / math.pi, abs=0.02)
    assert np.median(share) == pytest.approx(math.cos(math.pi / 4), abs=0.02)
    assert masked.mean(0).std() < 0.02, "every place is as likely"


def test_one_code_is_always_masked():
    assert all(mask_image(1, generator).all() for generator in generators(20))


def test_texts_are_masked_with_their_own_probability():
    drawn = [mask_text(200, generator) for generator in generators(2000)]
    p = np.array([p for _, p in drawn])
    assert p.min() >= LEAST and p.max() <= 1.0 and p.mean() == pytest.approx((1 + LEAST) / 2, abs=0.02)
    again = (1 - LEAST) * np.array([generator.random() for generator in generators(2000)]) + LEAST
    np.testing.assert_allclose(p, again)
    z = np.array([(mask.sum() - 200 * q) / math.sqrt(200 * q * (1 - q) + 1e-9) for mask, q in drawn])
    assert abs(z.mean()) < 0.1 and z.std() == pytest.approx(1.0, abs=0.1)

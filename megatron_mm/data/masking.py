"""Which tokens of a document are masked: absorbing-state corruption, drawn on the host from a sample's own streams."""

from __future__ import annotations

import math

import numpy as np

LEAST = 1e-3
"""Smallest probability with which a text token is masked (LLaDA, arXiv 2502.09992)."""


def mask_image(codes: int, generator: np.random.Generator) -> np.ndarray:
    """bool [codes]: round(codes * cos(pi t / 2)) of them, at least one, for t uniform in [0, 1) (arXiv 2202.04200)."""
    masked = max(1, round(codes * math.cos(math.pi / 2 * generator.random())))
    return rank(generator.random(codes)) < masked


def mask_text(tokens: int, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """(bool [tokens], p): each masked with probability p = (1 - LEAST) t + LEAST, t uniform in [0, 1)."""
    p = (1 - LEAST) * generator.random() + LEAST
    return generator.random(tokens) < p, p


def rank(values: np.ndarray) -> np.ndarray:
    """How many values are smaller than each: int64 [n], a permutation."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")

"""Randomness of the data path: streams that depend on (seed, sample, epoch, purpose) and on nothing else.

Every draw that shapes a training sequence (order of a pair, timestep, noise, masking, condition dropout) comes from
here, so that it is the same under any layout, rank, worker, micro-batch and resume. The generator is counter-based
(Philox), so a stream costs nothing to open anywhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Streams:
    """The random streams of one sample in one epoch."""

    seed: int
    uid: int
    epoch: int

    def generator(self, purpose: str, ordinal: int = 0) -> np.random.Generator:
        """A fresh generator for `purpose` (and its `ordinal`-th use, such as the image's number in the document)."""
        digest = hashlib.blake2b(
            f"{self.seed}/{self.uid}/{self.epoch}/{purpose}/{ordinal}".encode(), digest_size=16
        ).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    @property
    def dropout_key(self) -> int:
        """A non-negative int32 that identifies this sample and epoch to the model's dropout."""
        digest = hashlib.blake2b(f"{self.seed}/{self.uid}/{self.epoch}/dropout".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") & 0x7FFFFFFF

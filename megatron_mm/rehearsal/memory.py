"""What lives on the device: every storage from its first tensor to its last, by who made it, and its peak."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch

BLOCK = 512
"""Bytes that CUDA's caching allocator rounds a request up to."""


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment when most were allocated, and what held them."""

    total: int = 0
    by: dict[str, int] = field(default_factory=dict)


class Ledger:
    """Live storages of one device. `block` is what the size of each is rounded up to."""

    def __init__(self, device: torch.device, block: int = BLOCK):
        self._device, self._block = device, block
        self._live: dict[int, tuple[str, int, weakref.ref]] = {}
        self._by: Counter[str] = Counter()
        self.total = 0
        self.peak = Peak()
        self.high = 0
        """The most since `mark`."""

    def add(self, tensor: torch.Tensor, owner: str) -> None:
        """Counts the tensor's storage as `owner`'s, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or tensor.device != self._device:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        self._live[key] = owner, size, weakref.ref(storage, lambda _: self._free(key))
        self._by[owner] += size
        self.total += size
        self.high = max(self.high, self.total)
        if self.total > self.peak.total:
            self.peak = Peak(self.total, dict(self._by))

    def give(self, tensor: torch.Tensor, owner: str) -> None:
        """What is counted already becomes `owner`'s."""
        key = tensor.untyped_storage()._cdata
        previous, size, reference = self._live[key]
        self._live[key] = owner, size, reference
        self._by[previous] -= size
        self._by[owner] += size

    def mark(self) -> None:
        self.high = self.total

    def restart(self) -> None:
        """The peak counts from here on."""
        self.mark()
        self.peak = Peak(self.total, dict(self._by))

    def _free(self, key: int) -> None:
        owner, size, _ = self._live.pop(key)
        self._by[owner] -= size
        self.total -= size

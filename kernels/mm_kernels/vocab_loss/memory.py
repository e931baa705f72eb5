"""Counts what torch's operators allocate, on any device, the meta device too, which holds no memory.

Trade-off: exact for tensors, but blind to what an operator needs inside itself, and to the allocator's rounding.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active: `now`, the bytes of living tensors that were made since; `peak`, the most that `now` has been;
    `largest`, the bytes of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._notice(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._notice(tensor, made=True)
        return result

    def _notice(self, tensor: torch.Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known[storage._cdata] = weakref.finalize(storage, self._forget, storage._cdata, size)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

"""From the host to the device in one copy: tensors side by side in one buffer, pinned where the device is CUDA.

A copy from memory that is not pinned makes the host wait, and each of many small ones costs a call. The buffer is
filled in a loader's thread, and the copy is one entry in the device's queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch

ALIGNMENT = 256
"""Bytes; as torch's own allocator."""
T = TypeVar("T")


@dataclass(frozen=True)
class Staged(Generic[T]):
    """`tree`: dataclasses, mappings and tuples, whose tensors are dense views of `buffer`, uint8."""

    tree: T
    buffer: torch.Tensor

    @staticmethod
    def of(tree: T, device: torch.device) -> Staged[T]:
        """A copy of host tensors on their way to `device`; a tensor that is there twice is copied once."""
        firsts: dict[int, int] = {}
        size = 0

        def measure(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            if id(tensor) not in firsts:
                firsts[id(tensor)] = size
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return tensor

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return _view(buffer, firsts[id(tensor)], tensor).copy_(tensor)

        _map(tree, measure)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type != "cpu")
        return Staged(_map(tree, place), buffer)

    def to(self, device: torch.device) -> T:
        """The tree on `device`. The host waits for nothing."""
        there = self.buffer.to(device, non_blocking=True)
        moved: T = _map(self.tree, lambda t: _view(there, t.storage_offset() * t.element_size(), t))
        return moved


def _view(buffer: torch.Tensor, first: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[first : first + like.nbytes].view(like.dtype).view(like.shape)


def _map(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tree with every tensor replaced; what is neither a tensor nor holds any stays."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _map(getattr(tree, field.name), function) for field in fields(tree)})
    if isinstance(tree, Mapping):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_map(value, function) for value in tree)
    return tree

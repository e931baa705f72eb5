"""Layers that carry their own initial standard deviation.

The engine draws every weight matrix by its name, so that it does not depend on layout or on the order of building. It
reads `init_std` from the parameter where it has one. Vectors stay as built, hence zero biases here.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T", bound=nn.Module)


class Undrawn(TorchDispatchMode):
    """Builds modules of torch and transformers with zeros for what they draw, since the engine draws weights by their
    names."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return args[0].zero_() if func in _DRAWS else func(*args, **(kwargs or {}))


_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


def linear(inputs: int, outputs: int, std: float | None = None, bias: bool = True) -> nn.Linear:
    """A linear layer with weight std `std` (None: 1 / sqrt(inputs), which keeps the variance) and zero bias."""
    layer = nn.Linear(inputs, outputs, bias)
    scale_init(layer, std)
    return layer


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, std: float | None = None) -> nn.Conv2d:
    """A convolution that keeps the grid's size (at stride 1), with weight std as `linear` and zero bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    scale_init(layer, std)
    return layer


def adopt(module: T) -> T:
    """A library's module, its linear layers and convolutions initialised as `linear` and `conv` are."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            scale_init(layer)
    return module


def scale_init(layer: nn.Linear | nn.Conv2d, std: float | None = None) -> None:
    """Marks a layer's weight with std `std` (None: 1 / sqrt(fan-in)) and zeroes its bias."""
    fan_in = layer.weight[0].numel()
    layer.weight.init_std = 1 / math.sqrt(fan_in) if std is None else std
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

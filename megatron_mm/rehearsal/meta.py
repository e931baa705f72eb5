"""The meta device in the place of CUDA, for as long as a rehearsal lasts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from unittest.mock import patch

import megatron.core.pipeline_parallel.schedules as schedules
import megatron.core.tensor_parallel.random as tp_random
import torch
from torch.overrides import TorchFunctionMode

from megatron_mm.parallel import cpu_device

META = torch.device("meta")


class CudaToMeta(TorchFunctionMode):
    """Rewrites `device="cuda"` to the meta device and remembers what the host has pinned.

    A tensor that torch makes from numbers of the host (`torch.tensor`) is made there and copied, as on CUDA, so that
    the copy is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: dict[Callable, Callable] = {}
        """Functions that choose their kernels by device -> what they run on CUDA."""
        self._pinned: set[int] = set()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(tensor.untyped_storage()._cdata)
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory:
            return self._pin(args[0].clone())
        if func is torch.Tensor.is_pinned:
            return self.is_pinned(args[0])
        if func is torch.Tensor.cuda:
            return args[0].to(META, **{k: v for k, v in kwargs.items() if k == "non_blocking"})
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return cpu_device._cuda_type_name(args[0])
        pin = kwargs.pop("pin_memory", False)
        if cpu_device._is_cuda(kwargs.get("device")):
            kwargs["device"] = META
        if func is torch.Tensor.to and len(args) > 1 and cpu_device._is_cuda(args[1]):
            args = (args[0], META, *args[2:])
        if func in (torch.tensor, torch.as_tensor) and _on_meta(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(META)
        if func is torch.Tensor.new_tensor and args[0].device == META and "device" not in kwargs:
            return torch.tensor(*args[1:], dtype=kwargs.pop("dtype", args[0].dtype), device="cpu", **kwargs).to(META)
        if func in self.replaced and args[0].device == META:
            return self.replaced[func](*args, **kwargs)
        result = func(*args, **kwargs)
        return self._pin(result) if pin and result.device.type == "cpu" else result


def _on_meta(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device) == META


@contextlib.contextmanager
def in_place_of_cuda() -> Iterator[CudaToMeta]:
    """`torch.cuda` and megatron-core mean the meta device in here."""
    with contextlib.ExitStack() as stack:
        for name, replacement in {**cpu_device._CUDA_FUNCTIONS, "current_device": lambda: META}.items():
            stack.enter_context(patch.object(torch.cuda, name, replacement))
        stack.enter_context(patch.dict(os.environ))
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
        stack.enter_context(patch.object(schedules, "torch", torch))
        stack.enter_context(patch.object(tp_random, "_get_cuda_rng_state", cpu_device._get_rng_state))
        stack.enter_context(patch.object(tp_random, "_set_cuda_rng_state", cpu_device._set_rng_state))
        mode = CudaToMeta()
        backward = torch.autograd._engine_run_backward

        def run_backward(*args, **kwargs):
            """A mode is off while torch runs what it has caught, the whole backward pass among it."""
            with mode:
                return backward(*args, **kwargs)

        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", run_backward))
        yield stack.enter_context(mode)

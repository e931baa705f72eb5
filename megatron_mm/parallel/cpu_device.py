"""megatron-core on a CPU: everything it hard-codes for CUDA, redirected in this one place.

megatron-core 0.16 writes `device="cuda"`, `torch.cuda.current_device()` and CUDA RNG calls literally in some twenty
modules. Rather than patch each, one `TorchFunctionMode` rewrites the device of every torch call, and the few
`torch.cuda` functions it relies on get a CPU meaning. On a machine that trains on CUDA, `enable` does nothing.

Trade-off: the mode costs some three microseconds a torch call. An optimizer step, which asks for no CUDA device but in
one place, runs outside of it, by `direct`.
"""

from __future__ import annotations

import contextlib
import os
import types
import warnings

import megatron.core.pipeline_parallel.schedules as schedules
import megatron.core.tensor_parallel.random as tp_random
import megatron.core.transformer.moe.token_dispatcher as token_dispatcher
import torch
from torch.overrides import TorchFunctionMode


def enable(device: torch.device) -> None:
    """Make megatron-core usable on `device`; does nothing for CUDA, and nothing the second time."""
    if device.type != "cpu" or tp_random._set_cuda_rng_state is _set_rng_state:
        return
    # Its jit fusers cost 17 s of cold compilation on a CPU and gain nothing there.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # The schedule asks activations for their gradient, as on CUDA; only through the mode does torch remark on it.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    CudaToCpu().__enter__()
    for name, replacement in _CUDA_FUNCTIONS.items():
        setattr(torch.cuda, name, replacement)
    tp_random._get_cuda_rng_state = _get_rng_state
    tp_random._set_cuda_rng_state = _set_rng_state
    # It makes numbers of tokens plain ones only where they come from a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = _as_plain
    # It counts tokens on "cuda" in the midst of what runs outside of the mode.
    schedules.torch = _TorchOnCpu("torch")


def direct(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU, torch without the mode: nothing in it may ask for CUDA by a literal. Elsewhere, torch as it is."""
    return torch._C.DisableTorchFunction() if device.type == "cpu" else contextlib.nullcontext()


class CudaToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` to the CPU, drops `pin_memory`, and makes `Tensor.cuda()` the identity."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _cuda_type_name(args[0])
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = torch.device("cpu")
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        return func(*args, **kwargs)


class _TorchOnCpu(types.ModuleType):
    """The torch that a module sees whose only literal "cuda" is in a call of `zeros`."""

    zeros = staticmethod(lambda *args, device=None, **kwargs: torch.zeros(*args, device="cpu", **kwargs))

    def __getattr__(self, name: str):
        return getattr(torch, name)


def _is_cuda(device) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _cuda_type_name(tensor: torch.Tensor) -> str:
    """The type name that the optimizers compare with. They know no float64: it passes for their full precision."""
    dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
    return _TYPE_NAMES[dtype]


_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.int32: "torch.cuda.IntTensor",
    torch.int64: "torch.cuda.LongTensor",
    torch.uint8: "torch.cuda.ByteTensor",
    torch.bool: "torch.cuda.BoolTensor",
}


def _get_rng_state(device="cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _as_plain(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False):
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class NullStream:
    """A CUDA stream, or an event on one, where there is none: work is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> NullStream:
        return self


_CUDA_FUNCTIONS = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda device=None: None,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": lambda seed: torch.manual_seed(seed) and None,
    "Stream": NullStream,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: NullStream(),
    "default_stream": lambda device=None: NullStream(),
}

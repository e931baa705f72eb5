"""Chains that torch.compile makes kernels of: traced and cut as it does it, and counted as what comes out."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from megatron_mm.nn import fusion
from megatron_mm.rehearsal.costs import Cost, nbytes
from megatron_mm.rehearsal.recorder import Recorder

KERNELS = {"norm_heads backward": 3, "weighted_swiglu_back": 2}
"""Chains that inductor makes more than one kernel of: a sum in another direction than the rest reads all once more, and
over many tokens takes two steps."""


class FusedChains:
    """What stands in for torch.compile: a kernel for each direction of a chain (but for KERNELS), which reads its
    inputs and writes its outputs, those that its backward pass needs among them."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def compile(self, function: Callable | None = None, **_options: Any) -> Callable:
        """`torch.compile`: a differentiable function."""
        if function is None:
            return self.compile
        traced: dict[tuple, Callable] = {}

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            key = tuple(map(_specialised, args))
            if key not in traced:
                traced[key] = self._trace(function)
            with self._recorder.quiet():  # tracing makes tensors of its own, as large as the storages of its inputs
                return traced[key](*args)

        return run

    def _trace(self, function: Callable) -> Callable:
        name = function.__name__
        return aot_function(
            function,
            fw_compiler=lambda graph, _: make_boxed_func(self._kernel(name, graph)),
            bw_compiler=lambda graph, _: make_boxed_func(self._kernel(f"{name} backward", graph)),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    def whole(self, function: Callable) -> Callable:
        """A function that is not differentiated, as one kernel."""

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            if self._recorder.is_quiet:
                return function(*args)
            with self._recorder.quiet():
                out = function(*args)
            self._count(function.__name__, args, pytree.tree_leaves(out))
            return out

        return run

    def _kernel(self, name: str, graph: torch.fx.GraphModule) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with _disable_current_modes():
                out = graph(*args)
            self._count(name, args, [value for value in out if isinstance(value, torch.Tensor)])
            return out

        return run

    def _count(self, name: str, args: Sequence[Any], outs: Sequence[torch.Tensor]) -> None:
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        read = {tensor.untyped_storage()._cdata for tensor in tensors}
        written = {tensor.untyped_storage()._cdata: tensor for tensor in outs}  # a result may be kept, too
        made = [tensor for key, tensor in written.items() if key not in read]
        launches = KERNELS.get(name, 1)
        moved = min(launches, 2) * sum(map(nbytes, tensors)) + sum(map(nbytes, made))
        self._recorder.launch(Cost(name, "fused chain", 0, moved, launches), made)


def _specialised(value: Any) -> Any:
    """What a chain is compiled anew for."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.requires_grad


@contextlib.contextmanager
def counted_chains(recorder: Recorder) -> Iterator[None]:
    """torch.compile, and megatron-core's functions that it has compiled, count in here."""
    chains = FusedChains(recorder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch, "compile", chains.compile))
        fusion.compiled.cache_clear()
        stack.callback(fusion.compiled.cache_clear)
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron.core.fusions."):
                for key, value in list(vars(module).items()):
                    if original := _compiled_from(value):
                        stack.enter_context(patch.object(module, key, chains.whole(original)))
        yield


def _compiled_from(value: object) -> Callable | None:
    """What torch.compile was given, now or when it is called first (`parallel.compile_later`)."""
    later = getattr(value, "__module__", "").startswith("megatron.core.fusions.") and hasattr(value, "__wrapped__")
    return value.__wrapped__ if later else getattr(value, "_torchdynamo_orig_callable", None)

"""Compile what torch.compile makes of a function for a GPU that is not here: inductor's own Triton kernels.

A function traces where its tensors are, on the CPU or, without memory, on the meta device, since autograd of CUDA
tensors needs a GPU or a build of torch for CUDA. Its graphs, forward and backward, are moved to CUDA before inductor's
first pass; inductor writes its kernels, and each is compiled with every configuration that it would be tuned over. Then
the graphs run on where they were traced. Like `offline`, not for a process that shall use a GPU afterwards.

Trade-off: what torch decomposes by device is decomposed as on the tracing one. The meta device stands for a GPU in all
that is compiled here; on a CPU LayerNorm keeps its statistics in the input's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import hints, triton_helpers
from torch.utils._pytree import tree_map

from mm_kernels.offline import Compiled, compiling

META, CUDA = torch.device("meta"), torch.device("cuda", 0)


@contextmanager
def compiling_graphs(capability: int = 90, device: torch.device = META) -> Iterator[list[Compiled]]:
    """Whatever torch.compile meets inside, with tensors on `device`, is compiled for compute capability `capability`
    and runs uncompiled; yields the kernels, in order."""
    compiled: list[Compiled] = []

    def compile_kernel(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> None:
        tuner = getattr(PyCodeCache.load(source), name)
        compiled.extend(Compiled(name, tuner._precompile_config(choice).kernel) for choice in tuner.configs)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return compile_fx.compile_fx(graph, inputs, inner_compile=partial(_compile_for_cuda, home=device))

    gpu = _absent_gpu(capability)
    device_interface.get_interface_for_device("cuda")  # torch's own must be registered before
    torch.compiler.reset()  # what was compiled for another GPU
    hints.DeviceProperties.create.cache_clear()
    with ExitStack() as stack:
        stack.enter_context(compiling(capability))
        stack.enter_context(config.patch(_options()))
        stack.enter_context(patch.dict(device_interface.device_interfaces, {"cuda": gpu}))
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", gpu.get_device_properties))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True))
        stack.enter_context(patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(patch.object(AsyncCompile, "triton", compile_kernel))
        stack.enter_context(torch.compiler.set_stance(force_backend=backend))
        yield compiled


def _options() -> dict[str, Any]:
    """Inductor's options: compile here and now, from the first kernel on, and keep what Triton made."""
    return {
        "compile_threads": 1,
        "force_disable_caches": True,
        "joint_custom_pre_pass": partial(_move, device=CUDA),
        "use_static_triton_launcher": False,
    }


def _compile_for_cuda(
    graph: torch.fx.GraphModule, inputs: list[Any], home: torch.device, **options: Any
) -> Callable[..., Any]:
    """Compiles one of AOTAutograd's graphs; returns it for tensors on `home`, called with a list that it empties."""
    traced = copy.deepcopy(graph)
    _move(traced.graph, home)
    traced.recompile()
    _move(graph.graph, CUDA)
    graph.recompile()
    with torch._C.DisableTorchFunction():  # a mode may turn CUDA into something else
        with detect_fake_mode(inputs):
            inputs = tree_map(partial(_on, CUDA), inputs)
        compile_fx.compile_fx_inner(graph, inputs, **options)

    def run(arguments: list[Any]) -> Any:
        results = traced(*arguments)
        arguments.clear()
        return results

    run._boxed_call = True
    return run


def _move(graph: torch.fx.Graph, device: torch.device) -> None:
    """Makes a graph one of tensors on `device`."""
    move = partial(_on, device)
    for node in graph.nodes:
        node.args, node.kwargs = tree_map(move, (node.args, node.kwargs))
        with torch._C.DisableTorchFunction(), detect_fake_mode(node.meta.get("val")) or nullcontext():
            node.meta["val"] = tree_map(move, node.meta.get("val"))


def _on(device: torch.device, value: Any) -> Any:
    """A tensor or a device as `device` has it, anything else as it is."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
    return device if isinstance(value, torch.device) else value


def _absent_gpu(capability: int) -> type[device_interface.CudaInterface]:
    """What inductor asks of a GPU in order to write code for it; figures of an H100."""
    properties = SimpleNamespace(
        name=f"compute capability {capability}", major=capability // 10, minor=capability % 10,
        multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, warp_size=32, shared_memory_per_block_optin=232448, total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
    )  # fmt: skip

    class AbsentGPU(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            get_device_properties = staticmethod(lambda device=None: properties)

        get_device_properties = staticmethod(lambda device=None: properties)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)

    return AbsentGPU

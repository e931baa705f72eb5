"""Compile Triton kernels for a GPU that is not here, through the very path that a launch takes.

What a compiler says costs no GPU: whether a kernel compiles, its registers, spills and shared memory, whether it
reaches the tensor cores by the fast instructions, and whether other lengths would compile it anew. How fast it is, it
does not say. Not for a process that shall launch kernels afterwards: Triton's driver is replaced while it lasts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """One compilation: the kernel's name and what came out."""

    name: str
    kernel: triton.compiler.CompiledKernel

    @property
    def capability(self) -> int:
        """The compute capability that it was compiled for, times ten."""
        return int(self.kernel.metadata.target.arch)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program."""
        return int(self.kernel.metadata.shared)

    @property
    def registers(self) -> int:
        """Registers of one thread."""
        return self._resource("REG")

    @property
    def spill_bytes(self) -> int:
        """Local memory of one thread: what did not fit into registers."""
        return self._resource("STACK")

    @property
    def fast_products(self) -> int:
        """Matrix products out of shared memory: Hopper's warpgroup instructions, Blackwell's of the tensor memory."""
        return self.count("HGMMA") + self.count("UTCHMMA")

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the machine code, e.g. UTMALDG (a load by the copy engine)."""
        return len(re.findall(rf"\b{instruction}\b", self._machine_code))

    def _resource(self, name: str) -> int:
        found = re.search(rf"{name}:(\d+)", self._usage)
        assert found is not None, f"cuobjdump says nothing of {name}"
        return int(found[1])

    @cached_property
    def _usage(self) -> str:
        return self._inspect("--dump-resource-usage")

    @cached_property
    def _machine_code(self) -> str:
        return self._inspect("--dump-sass")

    def _inspect(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            return subprocess.run([tool, what, file.name], check=True, capture_output=True, text=True).stdout


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """Launches inside compile for compute capability `capability` and do not run; yields what they compiled, in order.

    A launch that finds its kernel compiled already yields the same kernel again.
    """
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.__name__, kernel))
        return kernel

    before = driver._active
    driver.set_active(_AbsentGPU(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before


class _AbsentGPU:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)  # Triton keeps what it compiled by this number: one for each capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

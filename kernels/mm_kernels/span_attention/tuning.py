"""The fastest tile sizes of this GPU: measured at first use on the call's own tensors, kept in a file.

A choice depends on the kernel, the head dimension, the dtype, whether keys are hidden or heads share keys, and four
classes of length, never on the length itself. MM_KERNELS_AUTOTUNE=0 measures nothing and takes the defaults;
MM_KERNELS_CACHE says where the file lies (~/.cache/mm_kernels). Nothing is measured while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from mm_kernels.span_attention.configs import TileConfig, candidates
from mm_kernels.span_attention.launch import Problem

LENGTH_CLASSES = (1024, 4096, 16384)


def choose(kernel: str, problem: Problem, run: Callable[[TileConfig], None]) -> TileConfig:
    """The configuration for `kernel` ("forward", "dq" or "dkv") on this problem; `run` launches it with another."""
    configs = candidates(kernel, problem.head_dim, problem.q.element_size())
    if problem.q.device.type != "cuda" or os.environ.get("MM_KERNELS_AUTOTUNE", "1") == "0":
        return configs[0]
    table = _table(torch.cuda.get_device_name(problem.q.device))
    key = _key(kernel, problem)
    if key not in table.found:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        table.keep(key, _fastest(configs, run))
    return table.found[key]


class Table:
    """Choices by key, in memory and in one JSON file that several processes may write."""

    def __init__(self, path: Path):
        self.path = path
        self.found = self._read()

    def keep(self, key: str, config: TileConfig) -> None:
        """Adds a choice; what other processes have found meanwhile stays."""
        self.found = {**self.found, **self._read(), key: config}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({k: asdict(c) for k, c in sorted(self.found.items())}, indent=1))
        draft.replace(self.path)

    def _read(self) -> dict[str, TileConfig]:
        if not self.path.exists():
            return {}
        return {key: TileConfig(**values) for key, values in json.loads(self.path.read_text()).items()}


def cache_file(device_name: str) -> Path:
    """Where choices for a GPU lie; another version of Triton measures anew."""
    folder = Path(os.environ.get("MM_KERNELS_CACHE", Path.home() / ".cache" / "mm_kernels"))
    return folder / f"span_attention-{device_name.replace(' ', '_')}-triton{triton.__version__}.json"


@lru_cache
def _table(device_name: str) -> Table:
    return Table(cache_file(device_name))


def _key(kernel: str, problem: Problem) -> str:
    _, queries, keys, heads, groups = problem.sizes
    length = sum(max(queries, keys) > limit for limit in LENGTH_CLASSES)
    dtype = str(problem.q.dtype).removeprefix("torch.")
    flags = ("-until" if problem.until is not None else "") + ("-grouped" if heads > groups else "")
    return f"{kernel}-d{problem.head_dim}-{dtype}-length{length}{flags}"


def _fastest(configs: list[TileConfig], run: Callable[[TileConfig], None]) -> TileConfig:
    timings = {}
    for config in configs:
        try:
            timings[config] = triton.testing.do_bench(lambda c=config: run(c), warmup=5, rep=25, return_mode="median")
        except OutOfResources:
            continue
    return min(timings, key=timings.__getitem__)

"""What the compiler makes of each tile size, for a GPU that need not be here.

    python -m mm_kernels.span_attention.resources --capability 90 --head-dims 64 128 > resources.csv

One CSV row a kernel and configuration: registers and spilled bytes a thread, shared memory a program, and how many
matrix products of the fast kind (HGMMA on Hopper, UTCHMMA on Blackwell) stand in the code.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator

import torch
import triton

from mm_kernels.offline import Compiled, compiling
from mm_kernels.span_attention import launch
from mm_kernels.span_attention.configs import KERNELS, TileConfig, candidates

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLUMNS = (
    "kernel", "head_dim", "dtype", "until", "block_q", "block_k", "num_warps", "num_stages",
    "registers", "spill_bytes", "shared_bytes", "fast_products", "triton",
)  # fmt: skip


def problem(
    head_dim: int, dtype: torch.dtype, until: bool = False, length: int = 256, kv_heads: int = 2
) -> launch.Problem:
    """A small attention problem of two heads on the CPU: enough to compile for."""
    q, kv = (torch.zeros(1, length, heads, head_dim, dtype=dtype) for heads in (2, kv_heads))
    mask = torch.zeros(1, 3, length, dtype=torch.int32)
    return launch.Problem(q, kv, kv, mask[:, :2], mask[:, 2] if until else None, 1.0)


def launch_kernel(kernel: str, call: launch.Problem, config: TileConfig) -> None:
    """Launches one kernel of `KERNELS` with made-up intermediate results."""
    batch, queries, keys, heads, _ = call.sizes
    sums = torch.zeros(batch, heads, 2, launch.PAD.value + queries)
    transposed = torch.zeros(2, batch, keys, dtype=torch.int32)
    if kernel == "forward":
        launch.forward(call, torch.empty_like(call.q), sums[:, :, 0], config)
    elif kernel == "dq":
        launch.dq(call, call.q, sums, call.q, config)
    else:
        launch.dkv(call, call.q, sums, transposed, (call.k, call.v), config)


def compile_kernel(kernel: str, call: launch.Problem, config: TileConfig, capability: int = 90) -> Compiled:
    with compiling(capability) as compiled:
        launch_kernel(kernel, call, config)
    return compiled[-1]


def table(head_dims: list[int], dtype: str, until: bool, capability: int) -> Iterator[dict[str, object]]:
    """Rows of `COLUMNS` for every candidate of the tuner."""
    for kernel in KERNELS:
        for head_dim in head_dims:
            call = problem(head_dim, DTYPES[dtype], until)
            for config in candidates(kernel, head_dim, call.q.element_size()):
                made = compile_kernel(kernel, call, config, capability)
                found = (made.registers, made.spill_bytes, made.shared_bytes, made.fast_products, triton.__version__)
                sizes = (config.block_q, config.block_k, config.num_warps, config.num_stages)
                yield dict(zip(COLUMNS, (kernel, head_dim, dtype, until, *sizes, *found), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 96, 128, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--until", action="store_true", help="with hidden keys")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it.")
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in table(args.head_dims, args.dtype, args.until, args.capability):
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()

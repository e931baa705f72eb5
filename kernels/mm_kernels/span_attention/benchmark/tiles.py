"""`python -m mm_kernels.span_attention.benchmark.tiles --out DIR`: every tile size that the tuner may choose, timed.

Appends a row to DIR/tiles.csv for each kernel and candidate of `configs` as soon as it is measured, and prints the
fastest ones: from these, defaults are chosen. Started again it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import partial
from itertools import product
from pathlib import Path

import torch

from mm_kernels.rows import AROUND, Rows, around
from mm_kernels.span_attention import launch
from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS
from mm_kernels.span_attention.benchmark.measure import median
from mm_kernels.span_attention.benchmark.peers import Case
from mm_kernels.span_attention.configs import KERNELS, TileConfig, candidates

KEY = ("distribution", "length", "batch", "heads", "kv_heads", "head_dim", "dtype", "kernel")
TILE = tuple(field.name for field in fields(TileConfig))


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    rows = Rows(args.out / "tiles.csv", (*AROUND, *KEY, *TILE, "ms", "note"), (*AROUND, *KEY, *TILE))
    here = around(device)
    for case in cases(args, device):
        calls = launches(case) if any(here | row not in rows for row in rows_of(case)) else {}
        for row in (here | row for row in rows_of(case)):
            if row not in rows:
                config = TileConfig(*(row[name] for name in TILE))
                rows.append(row | timed(partial(calls[row["kernel"]], config), device, args.milliseconds))
        for kernel in KERNELS:
            of = here | named(case, kernel)
            measured = [row for row in rows.read() if row["ms"] and all(row[name] == str(of[name]) for name in of)]
            best = min(measured, key=lambda row: float(row["ms"]), default=None)
            if best:
                print(*(f"{of[name]:>12}" for name in KEY), *(f"{best[name]:>4}" for name in (*TILE, "ms")), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of tiles.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--distributions", nargs="+", default=["interleaved", "causal"], choices=DISTRIBUTIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 2048, 32768])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128, 64, 256])
    parser.add_argument("--heads", nargs="+", default=["32:4", "16:16"], help="query heads : key heads")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch: rows = tokens / length, at least 1")
    parser.add_argument("--milliseconds", type=int, default=50, help="time spent on each median")
    return parser.parse_args()


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # Triton's interpreter computes bf16 wrongly
    for head_dim, length, heads, name in product(args.head_dims, args.lengths, args.heads, args.distributions):
        batch = max(1, args.tokens // length)
        yield Case(name, length, batch, *map(int, heads.split(":")), head_dim, dtype, device)


def named(case: Case, kernel: str) -> dict[str, object]:
    sizes = (case.length, case.batch, case.heads, case.kv_heads, case.head_dim)
    dtype = str(case.dtype).removeprefix("torch.")
    return dict(zip(KEY, (case.distribution, *sizes, dtype, kernel), strict=True))


def rows_of(case: Case) -> Iterator[dict]:
    """What names each row of a case."""
    for kernel in KERNELS:
        for config in candidates(kernel, case.head_dim, case.dtype.itemsize):
            yield named(case, kernel) | asdict(config)


def launches(case: Case) -> dict[str, Callable[[TileConfig], None]]:
    """Each kernel on the case's tensors, as a function of its tile sizes."""
    q, k, v, dout = (tensor.detach() for tensor in case.qkv)
    problem = launch.Problem(q, k, v, case.mask, None, case.head_dim**-0.5)
    out, lse = torch.empty_like(q), q.new_empty(case.batch, case.heads, case.length, dtype=torch.float32)
    launch.forward(problem, out, lse, candidates("forward", case.head_dim, q.element_size())[0])
    sums, transposed = launch.prepare(problem, out, lse, dout, None)
    gradients = [torch.empty_like(tensor) for tensor in (q, k, v)]
    return {
        "forward": lambda config: launch.forward(problem, out, lse, config),
        "dq": lambda config: launch.dq(problem, dout, sums, gradients[0], config),
        "dkv": lambda config: launch.dkv(problem, dout, sums, transposed, tuple(gradients[1:]), config),
    }


def timed(call: Callable[[], None], device: torch.device, milliseconds: int) -> dict[str, object]:
    """Milliseconds, or why there are none."""
    try:
        call()
        return {"ms": median(call, device, milliseconds), "note": ""}
    except torch.AcceleratorError:
        raise
    except Exception as error:  # too much shared memory, or a compiler that gives up: the other tiles still count
        return {"ms": None, "note": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


if __name__ == "__main__":
    main()

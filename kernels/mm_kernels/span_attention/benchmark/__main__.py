"""Measure span attention beside its peers.

    python -m mm_kernels.span_attention.benchmark --out benchmarks/attention

Appends one CSV row a case and implementation to OUT/attention.csv as soon as it is measured, and draws
OUT/attention.png from all rows. Started again it goes on: what the file holds for this device and these versions is not
measured twice. TFLOP/s count the mask's allowed pairs only, so that skipped work never inflates a figure. What does not
first agree with an fp64 softmax is not timed: a peer that is wrong, fails or is not installed is a row whose note says
so, tried again next time; ours stops the benchmark.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS
from mm_kernels.span_attention.benchmark.measure import forward_backward, matrix_rate, median, wrong
from mm_kernels.span_attention.benchmark.peers import MASK_BUILDERS, OURS, PEERS, Case, Unavailable
from mm_kernels.span_attention.benchmark.plot import draw

KEY = ("device", "torch", "triton", "distribution", "length", "batch", "heads", "kv_heads", "head_dim", "dtype", "peer")
FIGURES = ("forward_ms", "backward_ms", "mask_build_ms", "forward_tflops", "backward_tflops", "share_of_matrix_rate")
COLUMNS = (*KEY, *FIGURES, "note")
OUT_OF_MEMORY = "out of memory"
TOLERANCE = 16
"""Error allowed before timing, in units of the last place of the largest result; flash-attn's own bf16 makes 2 to 4."""
CHECKED = 4096
"""Up to this length results are checked: the fp64 softmax is S x S."""


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "attention.csv"
    known = {tuple(row[name] for name in KEY): row["note"] for row in read(path)}
    rate = matrix_rate(args.device)
    print(f"{device_name(args.device)}: {f'{rate:.0f} TFLOP/s in bf16 matrix products' if rate else 'no matrix rate'}")
    deadline = time.monotonic() + args.budget
    for case, peer in cases(args):
        row = key(case, peer)
        said = known.get(tuple(row.values()))
        if said in ("", OUT_OF_MEMORY):
            continue
        if time.monotonic() > deadline:
            print("The time is up; start the same command again to go on.")
            break
        figures = measure(case, peer, rate, args.milliseconds)
        if figures is not None and (said is None or figures["note"] != said):
            append(path, row | figures)
            print(" ".join(f"{row[name]:>12}" for name in KEY[3:]), *(f"{value:>8}" for value in figures.values()))
            sys.stdout.flush()
    draw(read(path), args.out / "attention.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mm_kernels.span_attention.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV file and the plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--distributions", nargs="+", default=list(DISTRIBUTIONS), choices=DISTRIBUTIONS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2**n for n in range(10, 18)])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--heads", nargs="+", default=["16:16", "32:4"], help="query heads : key heads")
    parser.add_argument("--tokens", type=int, default=16384, help="of a batch: rows = tokens / length, at least 1")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--milliseconds", type=int, default=100, help="time spent on each median")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing new is started")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here.")
    for pair in args.heads:
        heads = pair.split(":")
        if len(heads) != 2 or not all(n.isdigit() and int(n) for n in heads) or int(heads[0]) % int(heads[1]):
            parser.error(f"--heads {pair}: expected QUERY_HEADS:KEY_HEADS, the first a multiple of the second.")
    return args


def cases(args: argparse.Namespace) -> Iterator[tuple[Case, str]]:
    """Every case with every peer; peers of one case follow each other, on the same tensors."""
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    for length, head_dim, pair, name in product(args.lengths, args.head_dims, args.heads, args.distributions):
        heads, kv_heads = map(int, pair.split(":"))
        batch = max(1, args.tokens // length)
        case = Case(name, length, batch, heads, kv_heads, head_dim, dtype, args.device)
        for peer in args.peers:
            yield case, peer


def key(case: Case, peer: str) -> dict[str, str]:
    """What names a row, as text, the way the file holds it."""
    dtype = str(case.dtype).removeprefix("torch.")
    sizes = (case.length, case.batch, case.heads, case.kv_heads, case.head_dim)
    values = (device_name(case.device), torch.__version__, triton_version(), case.distribution, *sizes, dtype, peer)
    return dict(zip(KEY, map(str, values), strict=True))


def measure(case: Case, peer: str, rate: float | None, milliseconds: int) -> dict[str, object] | None:
    """The figures of one row, or a note that says why there are none; None where the peer cannot express the case.

    Raises:
        RuntimeError: our result is wrong.
    """
    try:
        made = PEERS[peer](case)
        if made is None:
            return None
        call, inputs = made
        if case.length <= CHECKED and (error := wrong(call, case)) > TOLERANCE:
            raise RuntimeError(f"{peer} on {case.distribution} of {case.length} is wrong by {error:.0f} units.")
        forward, backward = forward_backward(call, inputs, case.qkv[3], milliseconds)
        build = median(MASK_BUILDERS[peer](case), case.device, milliseconds) if peer in MASK_BUILDERS else 0.0
    except Unavailable as missing:
        return dict.fromkeys(FIGURES, "") | {"note": str(missing)}
    except torch.OutOfMemoryError:
        return dict.fromkeys(FIGURES, "") | {"note": OUT_OF_MEMORY}
    except Exception as error:  # whatever another's code makes of our case
        if peer in OURS:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return dict.fromkeys(FIGURES, "") | {"note": said[:200]}
    done = case.forward_flops / 1e9
    share = 3.5 * done / (forward + backward) / rate if rate else float("nan")
    values = (forward, backward, build, done / forward, 2.5 * done / backward, share)
    return {name: f"{value:.4g}" for name, value in zip(FIGURES, values, strict=True)} | {"note": ""}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()

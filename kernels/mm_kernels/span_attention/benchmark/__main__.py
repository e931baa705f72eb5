"""Measure span attention beside its peers.

    python -m mm_kernels.span_attention.benchmark --out benchmarks/attention

Appends one CSV row a case and implementation to OUT/attention.csv as soon as it is measured, and draws
OUT/attention.png from all rows. Started again it goes on: what the file holds for this device, these versions and this
commit is not measured twice. TFLOP/s count the mask's allowed pairs only, so that skipped work never inflates a figure.
What does not first agree with an fp64 softmax is not timed, and its row says so, as that of a peer that fails or is not
installed, which is tried again next time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from mm_kernels.rows import AROUND, Rows, around
from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS
from mm_kernels.span_attention.benchmark.measure import forward_backward, matrix_rate, median, wrong
from mm_kernels.span_attention.benchmark.peers import MASK_BUILDERS, OURS, PEERS, Case, Unavailable
from mm_kernels.span_attention.benchmark.plot import draw

KEY = ("distribution", "length", "batch", "heads", "kv_heads", "head_dim", "dtype", "peer")
FIGURES = ("forward_ms", "backward_ms", "mask_build_ms", "forward_tflops", "backward_tflops", "share_of_matrix_rate")
TOLERANCE = 16
"""Error allowed before timing, in units of the last place of the largest result; flash-attn's own bf16 makes 2 to 4."""
CHECKED = 4096
"""Up to this length results are checked: the fp64 softmax is S x S."""
NOT_HERE = "not here"
"""How the note of a peer begins that this machine lacks something for."""
OUT_OF_MEMORY = "out of memory"
DEVICE_LOST = torch.AcceleratorError.__name__
"""How the note of a fault on the device begins, after which nothing runs in its process."""


def main() -> None:
    args = arguments()
    rows = Rows(args.out / "attention.csv", (*AROUND, *KEY, *FIGURES, "note"), (*AROUND, *KEY))
    here, rate = around(args.device), matrix_rate(args.device)
    print(f"{here['device']}: {f'{rate:.0f} TFLOP/s in bf16 matrix products' if rate else 'no matrix rate'}")
    deadline = time.monotonic() + args.budget
    failed = []
    for case, peer in cases(args):
        row = here | key(case, peer)
        said = rows.read(row)[-1]["note"] if row in rows else None
        if said is not None and (not said or said.startswith((OUT_OF_MEMORY, DEVICE_LOST))):
            continue
        if time.monotonic() > deadline:
            print("The time is up; start the same command again to go on.")
            break
        figures = measure(case, peer, rate, args.milliseconds)
        if figures is None or figures["note"] == said:
            continue
        rows.append(row | figures)
        print(" ".join(f"{row[name]:>12}" for name in KEY), *(f"{value:>8}" for value in figures.values()), flush=True)
        if figures["note"] and peer in OURS and not figures["note"].startswith(NOT_HERE):
            failed.append(f"{peer} on {case.distribution} of {case.length}: {figures['note']}")
        if figures["note"].startswith(DEVICE_LOST):
            failed.append(f"{peer} took the device with it; start the same command again to go on behind it.")
            break
    draw(rows.read(), args.out / "attention.png")
    if failed:
        sys.exit("\n".join(failed))


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


def key(case: Case, peer: str) -> dict[str, object]:
    """What names a row on one machine."""
    dtype = str(case.dtype).removeprefix("torch.")
    sizes = (case.length, case.batch, case.heads, case.kv_heads, case.head_dim)
    return dict(zip(KEY, (case.distribution, *sizes, dtype, peer), strict=True))


def measure(case: Case, peer: str, rate: float | None, milliseconds: int) -> dict[str, str] | None:
    """The figures of one row, or a note that says why there are none; None where the peer cannot express the case."""
    nothing = dict.fromkeys(FIGURES, "")
    try:
        made = PEERS[peer](case)
        if made is None:
            return None
        call, inputs = made
        if case.length <= CHECKED and (error := wrong(call, case)) > TOLERANCE:
            return nothing | {"note": f"wrong by {error:.0f} units"}
        forward, backward = forward_backward(call, inputs, case.qkv[3], milliseconds)
        build = median(MASK_BUILDERS[peer](case), case.device, milliseconds) if peer in MASK_BUILDERS else 0.0
    except Unavailable as missing:
        return nothing | {"note": f"{NOT_HERE}: {missing}"}
    except torch.OutOfMemoryError:
        return nothing | {"note": OUT_OF_MEMORY}
    except Exception as error:  # compilers and other libraries raise anything: the other rows still count
        return nothing | {"note": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    done = case.forward_flops / 1e9
    share = 3.5 * done / (forward + backward) / rate if rate else float("nan")
    values = (forward, backward, build, done / forward, 2.5 * done / backward, share)
    return {name: f"{value:.4g}" for name, value in zip(FIGURES, values, strict=True)} | {"note": ""}


if __name__ == "__main__":
    main()

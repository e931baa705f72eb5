"""`python -m mm_kernels.vocab_loss.benchmark --out DIR`: time and memory of the head with its loss, beside other ways.

One row of DIR/vocab_loss.csv for each size and implementation, appended as soon as it is measured: the median time of
forward and backward, and the peak of memory above the inputs (both gradients included). Each runs in a process of its
own; started again, the command goes on. Peaks are

    cuda   torch's allocator, after a warm-up
    cpu    the process's resident set (Linux), in its first call of the size
    meta   counted by `memory.LiveBytes`, without times, for sizes that no device here holds (torch 2.13 or later)

The others compute the mean cross-entropy alone; ours computes log Z and its gradient too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from mm_kernels.rows import AROUND, Rows, around
from mm_kernels.vocab_loss import linear_cross_entropy
from mm_kernels.vocab_loss.memory import LiveBytes

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [N, D], weight [V, D], labels [N]) -> scalar."""

# Tokens, vocabulary, hidden size, dtype. The largest is DeepSeek's vocabulary in a long context.
SIZES = {
    "cuda": [(8192, 129280, 4096, "bfloat16"), (131072, 129280, 4096, "bfloat16")],
    "cpu": [(512, 16384, 256, "float32"), (1024, 32768, 256, "float32")],
    "meta": [(131072, 129280, 4096, "bfloat16")],
}
Z_LOSS = 1e-5


@dataclass(frozen=True)
class Case:
    implementation: str
    on: str
    """The kind of device: one of `SIZES`."""
    tokens: int
    vocab: int
    hidden: int
    dtype: str
    repeats: int


@dataclass(frozen=True)
class Row(Case):
    forward_ms: float | None = None
    backward_ms: float | None = None
    peak_mib: float | None = None
    note: str = ""


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    cross_entropy, log_z = linear_cross_entropy(hidden, weight, labels)
    return cross_entropy.mean() + Z_LOSS * log_z.square().mean()


def eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def compiled() -> Loss:
    return torch.compile(eager)


def torch_chunked() -> Loss:
    """torch's own function of chunks, since 2.13."""
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


MAKERS: dict[str, Callable[[], Loss]] = {
    "ours": lambda: ours,
    "eager": lambda: eager,
    "compiled": compiled,
    "torch_chunked": torch_chunked,
    "liger": liger,
}
CUDA_ONLY = ("compiled", "liger")


def measure(case: Case) -> Row:
    """Runs one case; what is missing or does not fit is a row that says so."""
    row = partial(Row, **asdict(case))
    try:
        loss = MAKERS[case.implementation]()
    except (ImportError, AttributeError) as error:
        return row(note=f"not installed: {error}")
    try:
        # On a CPU the warm-up is of another size: freed memory of this one would not count as new.
        _run(loss, _inputs(replace(case, tokens=8, vocab=64) if case.on == "cpu" else case), case.on)
        inputs = _inputs(case)
        peak = _peak_bytes(partial(_run, loss, inputs, case.on), case.on)
        if case.on == "meta":
            return row(peak_mib=peak / 2**20)
        times = [_run(loss, inputs, case.on) for _ in range(case.repeats)]
    except torch.OutOfMemoryError:
        return row(note="out of memory")
    except Exception as error:  # compilers and other libraries raise anything: the other rows still count
        return row(note=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
    return row(forward_ms=forward, backward_ms=backward, peak_mib=peak / 2**20)


def _inputs(case: Case) -> list[torch.Tensor]:
    """hidden, weight, labels: logits of unit variance, one label in eight left out."""
    torch.manual_seed(0)
    options = {"device": case.on, "dtype": getattr(torch, case.dtype)}
    hidden = torch.randn(case.tokens, case.hidden, **options).requires_grad_()
    weight = torch.randn(case.vocab, case.hidden, **options).mul_(case.hidden**-0.5).requires_grad_()
    labels = torch.randint(case.vocab, (case.tokens,), device=case.on)
    labels[::8] = -100
    return [hidden, weight, labels]


def _run(loss: Loss, inputs: list[torch.Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of a forward and a backward pass; leaves no gradients behind."""
    marks = [_now(device)]
    value = loss(*inputs)
    marks.append(_now(device))
    value.backward()
    marks.append(_now(device))
    for tensor in inputs:
        tensor.grad = None
    return marks[1] - marks[0], marks[2] - marks[1]


def _now(device: str) -> float:
    """Milliseconds, when all work so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * time.perf_counter()


def _peak_bytes(work: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if device == "meta":
        with LiveBytes() as live:
            work()
        return live.peak
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    sizes = SIZES[args.device]
    if args.tokens or args.vocab or args.hidden or args.dtype:
        _, vocab, hidden, dtype = sizes[-1]
        sizes = [
            (tokens, args.vocab or vocab, args.hidden or hidden, args.dtype or dtype)
            for tokens in args.tokens or [size[0] for size in sizes]
        ]
    names = [name for name in MAKERS if args.device == "cuda" or name not in CUDA_ONLY]
    for size in sizes:
        yield from (Case(name, args.device, *size, args.repeats) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of vocab_loss.csv")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median counts")
    args = parser.parse_args()

    columns = [[*AROUND, *(field.name for field in fields(kind))] for kind in (Row, Case)]
    rows = Rows(args.out / "vocab_loss.csv", *columns)
    here = around(torch.device(args.device))
    for case in cases(args):
        if here | asdict(case) in rows:
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                row = process.submit(measure, case).result()
            except BrokenProcessPool:
                row = Row(**asdict(case), note="its process was killed")
        rows.append(here | asdict(row))
        print(_line(row), flush=True)


def _line(row: Row) -> str:
    size = f"{row.implementation:>13}  {row.tokens} x {row.vocab} x {row.hidden} {row.dtype}"
    if row.note:
        return f"{size}  {row.note}"
    times = "" if row.forward_ms is None else f"  forward {row.forward_ms:.1f} ms  backward {row.backward_ms:.1f} ms"
    return f"{size}{times}  peak {row.peak_mib:.0f} MiB"


if __name__ == "__main__":
    main()

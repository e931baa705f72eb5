"""Simulated, not measured: the efficiency of one layer's context-parallel attention over several nodes.

Efficiency is the time of the layer's products in perfect balance at the kernel's full speed, over the predicted time of
the slowest rank, forward and backward. Pairs are counted exactly for every rank and owner; lengths grow with ranks, so
that a GPU has the same tokens. Nodes have 8 GPUs and the links of `predict.Hardware`.

What it leaves out:
- kernels that are slower on short pieces, beside a transfer, or merging their results; one speed holds for all;
- links that several messages share at once, stragglers, and time lost between ranks that wait for each other;
- gathering rows into messages, and adding gradients that came home;
- everything but attention: its projections, feed-forward layers, and what these could hide.

Peers get our kernel, which skips what a mask forbids, and get it at its full speed. So `zigzag ring` is what
ring-flash-attention would do if it had these masks, and `all-gather` what torchtitan would, its gather as fast as all
links of a node together; the gathered keys stay in memory for the backward pass, which only reduces their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import inf

import numpy as np

from megatron_mm.benchmark.context.arguments import Study
from megatron_mm.benchmark.context.counting import pairs
from megatron_mm.benchmark.context.masks import Masks
from megatron_mm.benchmark.context.rates import KernelSpeeds, Rates
from megatron_mm.config.validate import heads_divide
from megatron_mm.parallel.context.assignment import Assignment, assign, contiguous, zigzag
from megatron_mm.parallel.context.predict import BACKWARD, Hardware, Work, predict
from megatron_mm.parallel.context.schedule import Needs, needs
from megatron_mm.parallel.context.ways import Meeting, Ways

HEAD_DIM, ELEMENT_BYTES = 128, 2
NODE = Hardware()
NO_DELAY = replace(NODE, latency_microseconds=0.0, launch_microseconds=0.0)
FAST_LINKS = replace(NODE, node_gigabytes=inf, network_gigabytes=inf)
PRODUCTS_ONLY = replace(NO_DELAY, node_gigabytes=inf, network_gigabytes=inf)


@dataclass(frozen=True)
class Line:
    """A line of simulation.csv. Times are one layer's, forward and backward."""

    gpu: str
    tokens: int
    """Of a GPU."""
    ranks: int
    heads: str
    distribution: str
    way: str
    efficiency: float
    imbalance: float
    """Share of the time that the slowest rank multiplies more than the mean."""
    latency: float
    """Share that is added by starting messages and kernels."""
    network: float
    """Share that is added by waiting for bytes. These four add up to 1."""
    bound: str
    """compute, network or latency: which takes longest by itself, with the other two for nothing."""
    forward_ms: float
    backward_ms: float
    chosen: bool
    """Whether `context_parallel_comm=auto` takes this way of ours."""
    forward_tflops: float
    """The kernel's, `backward_tflops` too: `rates` says whether `measured` or `assumed`."""
    backward_tflops: float
    rates: str


@dataclass(frozen=True)
class Spread:
    """One way of spreading a row. `gathers`: everything to everyone before anything is multiplied."""

    way: str
    ours: bool
    meeting: Meeting
    pairs: np.ndarray
    gathers: bool = False


def simulate(study: Study, masks: Masks) -> Iterator[Line]:
    speeds = KernelSpeeds(study.config.kernel_csv)
    sizes = [ranks for ranks in study.ranks if ranks % NODE.node_size == 0]
    for name, tokens, ranks in product(study.names, study.tokens, sizes):
        mask = masks.draw(name, tokens * ranks)
        inners = {heads: [n for n in (1, NODE.node_size) if heads_divide(*heads, 1, n)] for heads in study.heads}
        spreads = list(spread(mask, ranks, sorted({inner for some in inners.values() for inner in some})))
        for heads, allowed in inners.items():
            entries = [entry for entry in spreads if entry.meeting.inner in allowed]
            work = Work(len(mask), *heads, HEAD_DIM, ELEMENT_BYTES)
            chosen = _chosen(mask, ranks, entries, work)
            for gpu, entry in product(study.gpus, entries):
                figures = _figures(entry, work, speeds.rates(gpu, name, tokens, heads))
                yield Line(gpu, tokens, ranks, f"{heads[0]}:{heads[1]}", name, chosen=entry is chosen, **figures)


def spread(mask: np.ndarray, ranks: int, inners: list[int]) -> Iterator[Spread]:
    """Ours with each of these many heads-sharing neighbours, ours out of balance, and the peers."""
    for inner in inners:
        assignment = assign(mask, ranks // inner, max(NODE.node_size // inner, 1))
        needed, counted = needs(mask, assignment), pairs(mask, assignment)
        over = f" over ulysses {inner}" if inner > 1 else ""
        if inner == ranks:
            yield Spread("ulysses", True, Meeting(needed, False, inner), counted)
            continue
        yield Spread("exchange" + over, True, Meeting(needed, False, inner), counted)
        yield Spread("ring" + over, True, Meeting(needed, True, inner), counted)
    assignment = contiguous(mask.shape[2], ranks)
    yield Spread("exchange, contiguous", True, Meeting(needs(mask, assignment), False, 1), pairs(mask, assignment))
    assignment = zigzag(mask.shape[2], ranks)
    counted = pairs(mask, assignment)
    meeting = Meeting(everything(assignment), True, 1)
    yield Spread("zigzag ring", False, meeting, counted)
    yield Spread("all-gather", False, meeting, counted, gathers=True)


def everything(assignment: Assignment) -> Needs:
    """As if every rank needed every key."""
    ends = np.tile(np.arange(1, assignment.chunks.size + 1) * assignment.chunk_size, (assignment.ranks, 1))
    return Needs(assignment, head=ends, tail=ends)


def seconds(entry: Spread, work: Work, rates: Rates, hardware: Hardware) -> tuple[float, float]:
    """Predicted time of the slowest rank, forward and backward, each at its own rate."""
    forward, backward = (replace(hardware, tflops=rate) for rate in (rates.forward, rates.backward))
    if entry.gathers:
        moved = entry.meeting.needs.assignment.part * (len(entry.pairs) - 1) * work.bytes_per_key()
        transfer = moved / _gather_rate(hardware, len(entry.pairs)) + 1e-6 * hardware.latency_microseconds
        most = entry.pairs.sum(1).max() * work.flops_per_pair / 1e12
        launch = 1e-6 * hardware.launch_microseconds
        return (
            float(transfer + most / forward.tflops + launch),
            float(transfer + BACKWARD * (most / backward.tflops + launch)),
        )
    meeting = entry.meeting
    arguments = meeting.needs, entry.pairs, meeting.relays, work
    return predict(*arguments, forward, meeting.inner).forward, predict(*arguments, backward, meeting.inner).backward


def _figures(entry: Spread, work: Work, rates: Rates) -> dict:
    gpus = len(entry.pairs) * entry.meeting.inner
    ideal = float(entry.pairs.sum()) / gpus * work.flops_per_pair / 1e12 * (1 + BACKWARD) / rates.both
    forward, backward = seconds(entry, work, rates, NODE)
    total = forward + backward
    compute = sum(seconds(entry, work, rates, PRODUCTS_ONLY))
    started = sum(seconds(entry, work, rates, FAST_LINKS))
    no_products = Rates(inf, inf, "")
    alone = {
        "compute": compute,
        "network": sum(seconds(entry, work, no_products, NO_DELAY)),
        "latency": sum(seconds(entry, work, no_products, FAST_LINKS)),
    }
    return {
        "way": entry.way,
        "efficiency": ideal / total,
        "imbalance": (compute - ideal) / total,
        "latency": (started - compute) / total,
        "network": (total - started) / total,
        "bound": max(alone, key=lambda name: alone[name]),
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "forward_tflops": rates.forward,
        "backward_tflops": rates.backward,
        "rates": rates.source.partition(":")[0],
    }


def _chosen(mask: np.ndarray, ranks: int, entries: list[Spread], work: Work) -> Spread:
    """What `Ways.best` takes among ours, at the speeds that a run assumes."""
    ways = Ways(ranks, (), work, NODE)
    return min((entry for entry in entries if entry.ours), key=lambda entry: ways.predict(mask, entry.meeting).total)


def _gather_rate(hardware: Hardware, ranks: int) -> float:
    """Bytes a second that arrive at each rank; across nodes through all links of a node, every byte once a node."""
    if ranks <= hardware.node_size:
        return 1e9 * hardware.node_gigabytes
    return 1e9 * min(hardware.node_gigabytes, hardware.node_size * hardware.network_gigabytes)

"""A rank's time by roofline, from stated rates: kernels one after the other, communication beside or between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.rehearsal.costs import Cost
from megatron_mm.rehearsal.group import Collective


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links do, by default an H100's: assumed, from published speeds."""

    product_tflops: float = 600.0
    """Of matrix products in half precision."""
    attention_tflops: float = 400.0
    memory_gigabytes: float = 2800.0
    """A second, of a kernel that only moves data: five sixths of what the data sheet says."""
    node_gigabytes: float = 360.0
    """A second and direction, between GPUs of a node."""
    network_gigabytes: float = 40.0
    """A second and direction and GPU, to other nodes."""
    node_size: int = 8
    kernel_microseconds: float = 2.0
    """The least that a kernel takes."""
    launch_microseconds: float = 6.0
    """Of the host, to launch one kernel from Python."""
    latency_microseconds: float = 15.0
    """Of a collective."""


class Clock:
    """Seconds of one rank. Each group's collectives run in order, beside the kernels, from when they are issued; who
    waits for one, waits until it is done."""

    def __init__(self, rates: Rates):
        self._rates = rates
        self.restart()

    def restart(self) -> None:
        self.now = 0.0
        self._free: dict[tuple[str, str], float] = defaultdict(float)

    def compute(self, cost: Cost) -> float:
        """Runs a kernel; returns its seconds."""
        rates = self._rates
        tflops = rates.attention_tflops if cost.kind == "attention" else rates.product_tflops
        by_flops, by_bytes = cost.flops / (1e12 * tflops), cost.bytes / (1e9 * rates.memory_gigabytes)
        seconds = max(by_flops, by_bytes, 1e-6 * rates.kernel_microseconds * cost.launches)
        self.now += seconds
        return seconds

    def communicate(self, call: Collective) -> tuple[float, Callable[[], float]]:
        """Issues a collective: its seconds, and what waits for it and says how many seconds that took."""
        lane = call.group, call.kind if call.kind in ("send", "receive") else ""
        seconds = self._seconds(call)
        end = max(self._free[lane], self.now) + seconds
        self._free[lane] = end

        def wait() -> float:
            exposed = max(end - self.now, 0.0)
            self.now += exposed
            return exposed

        return seconds, wait

    def _seconds(self, call: Collective) -> float:
        """By the ring algorithms' bytes over the slowest link that they cross."""
        size = len(call.ranks)
        latency = 1e-6 * self._rates.latency_microseconds
        if call.kind in ("send", "receive"):
            return latency + call.bytes / self._link(call.ranks)
        if size == 1 or call.kind == "barrier":
            return 0.0
        sent = call.bytes * (size - 1) / size * (2 if call.kind == "all_reduce" else 1)
        return latency * max(1.0, math.log2(size) / 3) + sent / self._link(call.ranks)

    def _link(self, ranks: tuple[int, ...]) -> float:
        """Bytes a second. GPUs of a node in one group share the node's ports to the others."""
        rates = self._rates
        nodes = {rank // rates.node_size for rank in ranks}
        if len(nodes) == 1:
            return 1e9 * rates.node_gigabytes
        together = len(ranks) / len(nodes)
        return 1e9 * min(rates.node_gigabytes, rates.network_gigabytes * max(together, 1.0))

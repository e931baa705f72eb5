"""How long one layer's attention takes under a schedule: a model of compute, links and their overlap.

Each rank multiplies its own keys while the first stage's keys are under way, then each stage's while the next ones are:
forward = sum over stages of max(compute of this one, transfer of the next). The backward pass multiplies 2.5 times as
much, and moves keys in and their gradients home. What it leaves out: contention between links, and kernels that slow
down beside a transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mm.config.model import TrunkConfig
from megatron_mm.config.schema import TrainConfig
from megatron_mm.parallel.context.schedule import Needs, exchange_distances, relayed_counts

BACKWARD = 2.5
"""Products of the backward pass over those of the forward pass."""


@dataclass(frozen=True)
class Hardware:
    """One GPU and its links. The defaults are an H100's, assumed: attention at 400 TFLOP/s, NVLink 4 and one 400 Gbit/s
    port a GPU, both at four fifths of their rated speed."""

    tflops: float = 400.0
    """Of attention, forward and backward alike."""
    node_gigabytes: float = 360.0
    """A second and direction, to a GPU of the same node."""
    network_gigabytes: float = 40.0
    """A second and direction, to another node."""
    latency_microseconds: float = 15.0
    """Of a stage's messages."""
    launch_microseconds: float = 20.0
    """Of a stage's kernels, however small."""
    node_size: int = 8
    """Context-parallel ranks of a node."""


@dataclass(frozen=True)
class Work:
    """What a pair and a key cost in one layer on a tensor-parallel rank."""

    rows: int
    heads: int
    key_heads: int
    head_dim: int
    element_bytes: int

    @staticmethod
    def of(trunk: TrunkConfig, train: TrainConfig, tensor_ranks: int) -> Work:
        heads, key_heads = (max(count // tensor_ranks, 1) for count in (trunk.num_attention_heads, trunk.kv_heads))
        return Work(train.micro_batch_size, heads, key_heads, trunk.head_dim, train.dtype.itemsize)

    @property
    def flops_per_pair(self) -> int:
        """Forward; pairs are counted over all rows."""
        return 4 * self.heads * self.head_dim

    def bytes_per_key(self, inner: int = 1) -> float:
        """Keys and values of every row at one position, of one of `inner` ranks that share the heads; too few key heads
        are repeated."""
        return 2 * self.rows * max(self.key_heads / inner, 1) * self.head_dim * self.element_bytes

    @property
    def bytes_per_query(self) -> int:
        return self.rows * self.heads * self.head_dim * self.element_bytes


@dataclass(frozen=True)
class Prediction:
    """Seconds of one layer's attention; `ideal` is forward and backward by compute alone, in perfect balance."""

    forward: float
    backward: float
    ideal: float

    @property
    def total(self) -> float:
        return self.forward + self.backward

    @property
    def efficiency(self) -> float:
        return self.ideal / self.total


def predict(
    needs: Needs, pairs: np.ndarray, relays: bool, work: Work, hardware: Hardware, inner: int = 1
) -> Prediction:
    """The slowest rank's time.

    Args:
        pairs: [ranks, owners], allowed pairs of each rank's queries with each owner's keys, over all rows.
        relays: `ring` rather than `exchange`.
        inner: neighbours that share each rank of the schedule, and its heads (Ulysses).
    """
    ranks = needs.assignment.ranks
    number = np.arange(ranks)
    counts = needs.counts()
    relayed = relayed_counts(needs) if relays else counts
    rate = hardware.tflops * 1e12 / work.flops_per_pair * inner
    stages = [[distance] for distance in range(1, ranks)] if relays else exchange_distances(needs)
    launch, latency = 1e-6 * hardware.launch_microseconds, 1e-6 * hardware.latency_microseconds
    compute, transfer = [pairs[number, number] / rate + launch], []
    for distances in stages:
        owners = [(number - distance) % ranks for distance in distances]
        multiplied = sum(pairs[number, owner] for owner in owners)
        compute.append(np.where(multiplied > 0, multiplied / rate + launch, 0))
        sources = [(number - 1) % ranks] if relays else owners
        moved = [relayed[:, distances[0]]] if relays else [counts[number, owner] for owner in owners]
        seconds = sum(
            keys * work.bytes_per_key(inner) / _link(number, source, hardware, inner)
            for keys, source in zip(moved, sources, strict=True)
        )
        transfer.append(np.where(sum(moved) > 0, seconds + latency, 0))
    heads = _swap_seconds(needs, work, hardware, inner)
    backward = [BACKWARD * seconds for seconds in compute], [2 * seconds for seconds in transfer]
    return Prediction(
        forward=float(_overlapped(compute, transfer).max()) + heads,
        backward=float(_overlapped(*backward).max()) + 2 * heads,
        ideal=float((1 + BACKWARD) * pairs.sum() / ranks / rate),
    )


def estimated_pairs(needs: Needs, loads: np.ndarray) -> np.ndarray:
    """[ranks, owners]: each rank's pairs, spread over owners as the keys are that it needs."""
    counts = needs.counts()
    pairs: np.ndarray = counts * (loads / np.maximum(counts.sum(1), 1))[:, None]
    return pairs


def _link(rank: np.ndarray, source: np.ndarray, hardware: Hardware, inner: int) -> np.ndarray:
    """Bytes a second between two ranks of the schedule."""
    ranks_of_node = max(hardware.node_size // inner, 1)
    near = rank // ranks_of_node == source // ranks_of_node if hardware.node_size > inner else rank == source
    return 1e9 * np.where(near, hardware.node_gigabytes, hardware.network_gigabytes)


def _overlapped(compute: list[np.ndarray], transfer: list[np.ndarray]) -> np.ndarray:
    """Seconds of each rank: every transfer beside the compute before it."""
    beside = zip(compute[:-1], transfer, strict=True)
    return sum((np.maximum(*pair) for pair in beside), start=compute[-1])


def _swap_seconds(needs: Needs, work: Work, hardware: Hardware, inner: int) -> float:
    """Of Ulysses' exchanges in the forward pass: q, k, v there, and the output back."""
    if inner == 1:
        return 0.0
    positions = needs.assignment.part / inner
    moved = positions * (2 * work.bytes_per_query + inner * work.bytes_per_key(inner)) * (inner - 1) / inner
    rate = hardware.node_gigabytes if inner <= hardware.node_size else hardware.network_gigabytes
    return moved / (1e9 * rate) + 4e-6 * hardware.latency_microseconds

"""What an engine is: it turns micro-batches into optimizer steps, under one layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_mm.config.compose import Config
from megatron_mm.families.base import Family
from megatron_mm.parallel.context.runtime import HostPart
from megatron_mm.parallel.layout import Layout
from megatron_mm.parallel.model import StageModel
from megatron_mm.types import PackedBatch


@dataclass(frozen=True)
class MicroBatch:
    """What a step needs to know of a micro-batch, on the host.

    counts: labels of each loss term in the whole rows, as `tokens` (non-padding positions) and `pairs` (allowed by the
    mask; 0 on a CPU) are. part: what this rank computes of them.
    """

    part: HostPart
    counts: dict[str, int]
    tokens: int
    pairs: int


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step reports. `losses` are means over each term's own global count."""

    losses: dict[str, float]
    counts: dict[str, int]
    tokens: int
    """Non-padding positions of the step, over all ranks."""
    pairs: int | None
    """Query-key pairs that the masks of the step allow, over all ranks; None on a CPU, where no MFU is reported."""
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    stopping: bool = False
    """Whether any rank would end the run."""
    router: dict[str, float] = field(default_factory=dict)
    """<layer or mean>/<modality>/<expert> -> share of the modality's choices; empty without experts."""


@dataclass(frozen=True)
class Evaluation:
    """losses: of each term the mean over its own labels, whose number `counts` holds, over all ranks. loss: their
    weighted sum."""

    losses: dict[str, float]
    counts: dict[str, int]
    loss: float


class Engine(Protocol):
    """One rank of a run. models: its chunks. trained_of: (numbers that train, all numbers) in the parameters of the
    whole model."""

    config: Config
    family: Family
    layout: Layout
    device: torch.device
    models: list[StageModel]
    trained_of: tuple[int, int]

    def prepare(self, batch: PackedBatch) -> MicroBatch:
        """What the host has to do for a micro-batch before its step; may run in a thread."""
        ...

    def step(self, batches: list[MicroBatch], stop: Callable[[], bool] = bool) -> StepMetrics:
        """One optimizer step over this rank's micro-batches of the global batch.

        The host waits for the device once, between the backward pass and the optimizer. `stop` is asked just before
        that, whether this rank would end the run.
        """
        ...

    def evaluate(self, steps: Iterable[list[MicroBatch]]) -> Evaluation:
        """The losses of this rank's micro-batches of several global batches, without dropout; no weight changes."""
        ...

    def take_weights(self) -> None:
        """The models' weights have been replaced: what the optimizer keeps of them follows."""
        ...

    def state(self, is_loading: bool, saved: Collection[str] | None = None) -> dict[str, Any]:
        """Weights, optimizer and schedule as a checkpoint holds them, by layout-free names; collective. `saved`: the
        names in the checkpoint that is to fill it."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """What `state` gave, filled from a checkpoint."""
        ...

    def obstacle(self, common: Mapping[str, Any]) -> str | None:
        """Why a checkpoint with these plain values cannot be resumed, as the end of a sentence; None where it can."""
        ...

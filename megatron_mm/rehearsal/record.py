"""What a rehearsed step did, as sums."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

FORWARD, BACKWARD, AGAIN = "forward", "backward", "recomputed"
ENGINE, GRADIENTS, OPTIMIZER = "engine", "gradients", "optimizer"
ONCE = (ENGINE, GRADIENTS, OPTIMIZER)
"""Parts that come once a step; all others are inside micro-batches."""
SCHEDULE = "schedule"
"""Between a micro-batch's parts: the batch's upload, the pipeline's messages."""


@dataclass
class Sums:
    """Over the operations of one part of the model in one pass, or of one kind."""

    launches: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """Of kernels, by roofline."""
    waited: float = 0.0
    """Seconds that kernels waited for communication."""
    passes: int = 0
    kept: int = 0
    """Bytes that are there when the part is done and were not before."""
    peak: int = 0
    """The most bytes above those that were there before, in any pass."""


@dataclass
class Traffic:
    """Calls of one collective in one group, their bytes, and their seconds by themselves."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Record:
    """parts: (part, pass) -> sums. kinds: kind of operation -> sums. operations: (part, pass, name) -> launches.
    collectives: (group, kind) -> traffic. syncs: (part, what, where) -> times."""

    parts: dict[tuple[str, str], Sums] = field(default_factory=lambda: defaultdict(Sums))
    kinds: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    operations: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    collectives: dict[tuple[str, str], Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    syncs: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def total(self, once: bool) -> Sums:
        """Sums of the parts that come once a step, or of those inside micro-batches."""
        chosen = [sums for (part, _), sums in self.parts.items() if (part in ONCE) == once]
        return Sums(
            *(
                sum(getattr(each, name) for each in chosen)
                for name in ("launches", "flops", "bytes", "seconds", "waited")
            )
        )

    def syncs_of(self, once: bool) -> Counter[tuple[str, str]]:
        """(what, where) -> host synchronisations in the parts that come once a step, or inside micro-batches."""
        found: Counter[tuple[str, str]] = Counter()
        for (part, what, where), times in self.syncs.items():
            if (part in ONCE) == once:
                found[what, where] += times
        return found

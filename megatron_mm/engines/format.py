"""Where checkpoints lie, and what one says of itself.

checkpoints/iter_0000100/                 the sharded weights, optimizer state and common.pt
checkpoints/latest_checkpointed_iteration.txt   written last, atomically
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mm.engines.reading import CheckpointError, read_common

FORMAT = 2
"""Of checkpoints. 1, which has no number, is the same but for the order in which a document's choices are drawn: its
weights and place in the data are read, a resumed run draws anew."""

EMA = "ema."
"""What the name of a weight's moving average begins with; the weight's own follows."""

TRACKER = "latest_checkpointed_iteration.txt"
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # on the first rank of a group and in host memory only
    "non_homogeneous_layers": True,
}
"""How megatron-core is to write them."""


def latest_iteration(folder: str | Path) -> int | None:
    """The iteration that the tracker file in `folder` names; None where there is no checkpoint."""
    tracker = Path(folder, TRACKER)
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker} should hold an iteration number but holds {text!r}; write the number there.")
    return int(text)


def resolve(folder: str | Path) -> Path:
    """The iter_* folder meant by `folder`: itself, or the one its tracker names.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    folder = Path(folder)
    path = folder
    if not folder.name.startswith("iter_"):
        iteration = latest_iteration(folder)
        if iteration is None:
            raise CheckpointError(f"{folder} holds no checkpoint ({TRACKER} is missing): check the path.")
        path = folder / f"iter_{iteration:07d}"
    if not (path / "metadata.json").exists():
        others = sorted(p.parent.name for p in path.parent.glob("iter_*/metadata.json"))
        hint = f"complete ones there: {', '.join(others)}" if others else "there is no complete one beside it"
        raise CheckpointError(f"{path} is not a complete checkpoint (metadata.json is missing); {hint}.")
    return path


def common_state(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself without its tensors: `iteration`, `config` (YAML), `data_state`, ...

    Raises:
        CheckpointError: it is missing or corrupt, or of a later format.
    """
    path = resolve(folder)
    common = read_common(path)
    if (version := common.get("format_version", 1)) > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, of a later megatron_mm; this one reads up to {FORMAT}: update it."
        )
    return common

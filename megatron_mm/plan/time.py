"""How long a step takes, by a model: products at a measured or assumed rate, attention by `parallel.context.predict`.

Left out: norms, RoPE and other elementwise work, tensor-parallel and data-parallel traffic, the optimizer. So it is a
lower bound, which real steps exceed by a third to a half.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_mm.config.compose import Config
from megatron_mm.mask import area
from megatron_mm.parallel.context.assignment import chunk_areas, contiguous
from megatron_mm.parallel.context.predict import Hardware, Prediction, Work, estimated_pairs, predict
from megatron_mm.parallel.context.schedule import Needs, needs
from megatron_mm.parallel.context.ways import Ways


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what leads to them."""

    way: str
    imbalance: float
    received_bytes: float
    """Of keys and values, by the rank that gets most, in one layer's forward pass."""
    attention: float
    """Seconds of all layers, with transfers that are not hidden, and what recomputation repeats."""
    efficiency: float
    """Of attention: by compute alone in perfect balance, over what is predicted."""
    products: float
    """Seconds of all matrix products beside attention."""
    pairs: float
    """Allowed pairs of one row."""

    @property
    def total(self) -> float:
        return self.attention + self.products


def step_time(
    config: Config, vocab_size: int, world_size: int, mask: np.ndarray, hardware: Hardware, product_tflops: float
) -> StepTime:
    """The step of a run on `world_size` GPUs.

    Args:
        mask: int32 [1, 2, S], of a typical row.
        product_tflops: of matrix products on one GPU.
    """
    trunk, parallel, train = config.model.trunk, config.parallel, config.train
    rows = train.global_batch_size / (world_size / parallel.model_parallel_size)
    work = replace(Work.of(trunk, train, parallel.tensor_model_parallel_size), rows=1)
    repeated = 1 if parallel.recompute_granularity is None else 2
    prediction, way, needed = _attention(config, mask, work, hardware)
    assignment = needed.assignment
    layer = repeated * prediction.forward + prediction.backward
    passes = 4 if parallel.recompute_granularity == "full" else 3
    flops = 2 * passes * trunk.active_weights + 2 * 4 * trunk.hidden_size * vocab_size
    loads = chunk_areas(mask, assignment.chunk_size)[assignment.chunks].sum(1)
    counts = needed.counts()
    foreign = counts.sum(1) - np.diagonal(counts)
    return StepTime(
        way=way,
        imbalance=float(loads.max() / loads.mean()),
        received_bytes=float(foreign.max() * work.bytes_per_key()),
        attention=rows * trunk.num_layers / parallel.pipeline_model_parallel_size * layer,
        efficiency=prediction.efficiency,
        products=rows * config.data.seq_length * flops / (1e12 * product_tflops * parallel.model_parallel_size),
        pairs=float(area(np.concatenate([mask[0], np.full_like(mask[0][:1], mask.shape[2])]))),
    )


def _attention(config: Config, mask: np.ndarray, work: Work, hardware: Hardware) -> tuple[Prediction, str, Needs]:
    if config.parallel.context_parallel_size == 1:
        needed = needs(mask, contiguous(mask.shape[2], 1))
        pairs = estimated_pairs(needed, chunk_areas(mask, mask.shape[2]))
        return predict(needed, pairs, False, work, hardware), "one part", needed
    ways = Ways.of(config.parallel, [work], hardware)
    best = ways.best(mask)
    return ways.predict(mask, best), ways.name(best.inner, best.relays), best.needs

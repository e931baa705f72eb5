"""Losses on held-out data while a run trains."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice

from megatron_mm.config.compose import Config
from megatron_mm.data.dataset import open_data
from megatron_mm.data.loader import StepLoader
from megatron_mm.data.plan import Plan
from megatron_mm.data.sample import SampleReader
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.documents.builder import Builder
from megatron_mm.engines.base import Engine, Evaluation
from megatron_mm.families.base import Family


class Validation:
    """`data.validation` of a run, its first train.eval_iters global batches.

    An evaluation reads them anew from their start, so it takes the same documents with the same noise each time, under
    any layout, and a resumed run goes on with the same numbers.

    Raises:
        ValueError: see `open_data`.
    """

    def __init__(self, config: Config, family: Family):
        held_out = config.data.validation
        self._config = config
        self._data = replace(config.data, path=held_out.path, sources=held_out.sources)
        self._layout = Builder(family)
        self._plan: Plan
        self._reader: SampleReader
        self._plan, self._reader, left_out = open_data(
            self._data, config.model, self._layout, load_tokenizer(config.data.tokenizer), config.train.seed,
            "data.validation",
        )  # fmt: skip
        self.description = f"{len(self._plan.lengths)} documents held out, {len(left_out)} of them too long as they are"

    def due(self, iteration: int, last: bool) -> bool:
        """Whether an evaluation follows this iteration, which may be the run's last."""
        interval = self._config.train.eval_interval
        return interval is not None and (last or iteration % interval == 0)

    def run(self, engine: Engine) -> Evaluation:
        """Evaluates the engine's model as it is; collective."""
        train, layout = self._config.train, engine.layout
        loader = StepLoader(
            self._plan, self._reader, self._layout, self._data, train.seed, train.global_batch_size,
            train.micro_batch_size, layout.dp_rank, layout.dp_size, prepare=engine.prepare,
        )  # fmt: skip
        with closing(loader):
            return engine.evaluate(step.batches for step in islice(loader, train.eval_iters))

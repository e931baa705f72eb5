"""From the plan to the micro-batches of one rank, read ahead by threads, in an order that threads cannot change.

Each step is known from the plan alone: `global_batch_size` packs in a row. Every rank walks the whole plan, which is
cheap, and reads only its own packs. The state after a step is all that a resume needs, under any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Generic, TypeVar

from megatron_mm.config.schema import DataConfig
from megatron_mm.data.balance import deal
from megatron_mm.data.corrupt import Streams
from megatron_mm.data.measure import Layout
from megatron_mm.data.pack import pack
from megatron_mm.data.plan import Pack, Plan, Position
from megatron_mm.data.sample import SampleReader
from megatron_mm.types import Document, PackedBatch


@dataclass(frozen=True)
class DataState:
    """Place in the data: (epoch, window, pack) is the next pack to train on.

    consumed_samples, consumed_tokens: documents and non-padding positions so far, over all ranks.
    plan: the fingerprint of the plan that was walked; empty before the first step.
    """

    epoch: int = 0
    window: int = 0
    pack: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    plan: str = ""

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict) -> DataState:
        return cls(**state)


Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Step(Generic[Batch]):
    """One optimizer step of one rank.

    batches: its micro-batches in order. state: after this step. documents, tokens: of the step over all ranks, by the
    plan (a family that drops a condition may lay out fewer positions than planned).
    """

    batches: list[Batch]
    state: DataState
    documents: int
    tokens: int


class StepLoader(Generic[Batch]):
    """Iterates steps for ever, `data.prefetch` of them read ahead by `data.num_workers` threads.

    Pack k of a step is row i of micro-batch j on rank r, where k = (j * dp_size + r) * micro_batch_size + i, as in
    Megatron-LM; where an encoder reads images, packs are dealt out by them instead (`megatron_mm.data.balance`). An
    error in a sample surfaces at its step, names the sample and closes the loader.

    Every micro-batch goes through `prepare` in its thread.

    Raises:
        ValueError: the batch sizes do not divide, or `state` comes from other data or another seed or seq_length.
    """

    def __init__(
        self,
        plan: Plan,
        reader: SampleReader,
        layout: Layout,
        data: DataConfig,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        state: DataState = DataState(),  # noqa: B008 (immutable)
        prepare: Callable[[PackedBatch], Batch] = lambda batch: batch,  # type: ignore[assignment,return-value]
    ):
        if global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is no multiple of train.micro_batch_size="
                f"{micro_batch_size} times the data-parallel size {dp_size}."
            )
        if data.num_workers < 1 or data.prefetch < 0:
            raise ValueError(f"data.num_workers={data.num_workers} must be 1 or more, data.prefetch={data.prefetch} 0.")
        fingerprint = plan.fingerprint
        if state.plan not in ("", fingerprint):
            raise ValueError(
                "The checkpoint's place in the data belongs to another plan: the shards, the sources and their shares, "
                "the tokenizer, data.seq_length, data.window, the seed or the model's layout changed. Restore them or "
                "start anew."
            )
        self._plan, self._reader, self._layout, self._seed = plan, reader, layout, seed
        self._prepare = prepare
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch = data.prefetch
        self._submitted = replace(state, plan=fingerprint)
        self._walk = plan.walk(Position(state.epoch, state.window, state.pack))
        self._threads = ThreadPoolExecutor(data.num_workers, thread_name_prefix="data")
        self._ahead: deque[tuple[list[Future[Batch]], DataState, int, int]] = deque()

    def __iter__(self) -> StepLoader[Batch]:
        return self

    def __next__(self) -> Step[Batch]:
        try:
            while len(self._ahead) <= self._prefetch:
                self._submit()
            futures, state, documents, tokens = self._ahead.popleft()
            return Step([future.result() for future in futures], state, documents, tokens)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop reading ahead; waits for the samples being read."""
        self._threads.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _submit(self) -> None:
        """Hand the next step's packs of this rank to the threads."""
        packs = list(islice(self._walk, self._global_batch_size))
        size, mine = self._micro_batch_size, self._mine([uids for uids, _, _ in packs])
        futures = [
            self._threads.submit(self._read, [packs[k][:2] for k in mine[first : first + size]])
            for first in range(0, len(mine), size)
        ]
        documents = sum(len(uids) for uids, _, _ in packs)
        tokens = int(sum(self._plan.lengths[list(uids)].sum() for uids, _, _ in packs))
        self._submitted = replace(
            self._submitted,
            **asdict(packs[-1][2]),
            consumed_samples=self._submitted.consumed_samples + documents,
            consumed_tokens=self._submitted.consumed_tokens + tokens,
        )
        self._ahead.append((futures, self._submitted, documents, tokens))

    def _mine(self, packs: list[Pack]) -> list[int]:
        """Which packs of a step this rank reads."""
        images, size, ranks = self._plan.images, self._micro_batch_size, self._dp_size
        if images is not None and ranks > 1:
            return deal([float(images[list(uids)].sum()) for uids in packs], ranks)[self._dp_rank]
        return [k for k in range(len(packs)) if k // size % ranks == self._dp_rank]

    def _read(self, rows: list[tuple[Pack, Pack]]) -> Batch:
        """One micro-batch, in a thread."""
        streams = [[Streams(self._seed, *each) for each in zip(*row, strict=True)] for row in rows]
        documents = [[self._lay_out(stream) for stream in row] for row in streams]
        keys = [[stream.dropout_key for stream in row] for row in streams]
        packed = pack(documents, self._plan.seq_length, self._layout.fields, self._layout.vocab.pad, keys)
        return self._prepare(packed)

    def _lay_out(self, streams: Streams) -> Document:
        sample = self._reader.read(streams.uid)
        try:
            document = self._layout.lay_out(sample, streams)
            planned = self._plan.lengths[streams.uid]
            if len(document.tokens) > planned:
                raise ValueError(f"it takes {len(document.tokens)} positions where {planned} were planned.")
        except Exception as error:
            raise ValueError(f"Sample {sample.key!r} cannot be laid out: {error}") from error
        return document

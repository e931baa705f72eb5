"""What the samplers of all families share: the batch's set-up, the grammar of text, and when a row has ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_mm.config.generate import MODES, SamplingConfig
from megatron_mm.parallel.ops import padded_vocab_size
from megatron_mm.sampling.decoder import Decoder, piece
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.sampling.row import Request, Row
from megatron_mm.sampling.text import Next, choose, grammar, penalise
from megatron_mm.types import Document, PackedBatch, Sample, Segment

Report = Callable[[str], None]
"""Told what the sampler is doing, for a progress display."""


class Sampler(ABC):
    """Continues the documents of one batch; how images are made is the family's.

    With guidance, row i of b has a twin in row b + i of the cache, which sees `without_prompt`.
    """

    modes: tuple[str, ...] = MODES
    """What the family can write."""
    guidance = 3.0
    """Scale of classifier-free guidance where none is given."""
    before_image = 0
    """Positions between BOI and an image's own."""
    beside_image = 0
    """Positions that an image takes beside its own when it is drawn."""

    def __init__(
        self,
        model: SamplingModel,
        requests: Sequence[Request],
        mode: str,
        settings: SamplingConfig,
        report: Report,
    ):
        self.model, self.mode, self.settings, self.report = model, mode, settings, report
        self.rows = [Row(index, request) for index, request in enumerate(requests)]
        self.vocab = model.family.vocab
        self.allowed = grammar(self.vocab, padded_vocab_size(self.vocab.size), model.device)
        self.seq_length = model.config.data.seq_length
        self.image_length = model.family.grid[0] * model.family.grid[1]
        self.draws_at_once = mode == "text_to_image"
        default = self.guidance if model.config.model.condition_dropout > 0 else 1.0
        self.scale = default if settings.cfg_scale is None else settings.cfg_scale
        self.guided = self.scale != 1.0 and mode != "image_to_text"

    def run(self) -> list[list[Segment]]:
        """The continuation of each request, without its prompt.

        Raises:
            ValueError: a prompt leaves no room for what is to follow, or its images do not fit the model.
        """
        lay_out = self.model.family.lay_out_prompt
        prompts = [lay_out(row.request.prompt, self.draws_at_once) for row in self.rows]
        capacity = self._capacity([len(prompt.tokens) for prompt in prompts])
        with Decoder.open(self.model, len(self.rows) * (1 + self.guided), capacity) as self.decoder:
            self.write(prompts)
        return [row.finish() for row in self.rows]

    def read(self, rows: Sequence[Row], prompts: Sequence[Document]) -> torch.Tensor:
        """Caches the rows' prompts (and the twins'); hidden states [b or 2b, D] at their last positions."""
        hidden = self.decoder.prefill(self.indices(rows), prompts)
        if not self.guided:
            return hidden
        twins = self.decoder.prefill(self.twins(rows), [self.without_prompt(prompt) for prompt in prompts])
        return torch.cat([hidden, twins])

    def without_prompt(self, prompt: Document) -> Document:
        """What a twin reads in place of its row's prompt: one without content."""
        return self.model.family.lay_out_prompt(Sample(0, "no prompt", ()), open_image=True)

    @abstractmethod
    def write(self, prompts: Sequence[Document]) -> None:
        """Reads each row's prompt and writes the row to its end."""

    def write_text(self, rows: Sequence[Row], hidden: torch.Tensor) -> list[Row]:
        """Writes until every row has ended or is to draw; returns those that draw, whose BOI is not read yet.

        Args:
            hidden: [b, D] at the last position of each row.
        """
        drawing: list[Row] = []
        while rows:
            chosen = self.choose(rows, self.decoder.logits(hidden), [self.after_text(row) for row in rows])
            drawing += [row for row, token in zip(rows, chosen, strict=True) if token == self.vocab.boi]
            writing = [pair for pair in zip(rows, chosen, strict=True) if pair[1] != self.vocab.boi]
            going = [(row, token) for row, token in writing if self.take_text(row, token)]
            if not going:
                break
            rows, tokens = (list(side) for side in zip(*going, strict=True))
            self.report(f"writing, {max(row.new_tokens for row in rows)} tokens")
            hidden = self.decoder.forward(self.indices(rows), self.batch(column(tokens)), keep=1)[:, 0]
        return sorted(drawing, key=lambda row: row.index)

    def batch(self, tokens: np.ndarray) -> PackedBatch:
        """Text tokens [b, n] to come."""
        return piece(tokens)

    @property
    def least_text(self) -> int:
        """Positions that a prompt must leave for text."""
        return 1

    @property
    def most_text(self) -> int:
        """Positions that new text takes."""
        return self.settings.max_new_tokens

    def indices(self, rows: Sequence[Row]) -> list[int]:
        return [row.index for row in rows]

    def twins(self, rows: Sequence[Row]) -> list[int]:
        return [row.index + len(self.rows) for row in rows]

    def room(self, row: Row) -> int:
        """Positions left."""
        return self.seq_length - int(self.decoder.lengths[row.index])

    def after_text(self, row: Row) -> Next:
        """What may follow a text token: an image only where it fits with BOI and EOI."""
        image = self.mode == "interleaved" and self.room(row) >= self.before_image + self.image_length + 2
        return Next.TEXT_OR_IMAGE if image else Next.TEXT

    def choose(self, rows: Sequence[Row], logits: torch.Tensor, following: Sequence[Next]) -> list[int]:
        """The next id of each row, from its logits [V] and what may follow."""
        seen = [row.seen if kind <= Next.TEXT_OR_IMAGE else () for row, kind in zip(rows, following, strict=True)]
        logits = penalise(logits, seen, self.settings.repetition_penalty)
        return self.pick(rows, logits, self.allowed[torch.tensor(following, device=logits.device)])

    def pick(self, rows: Sequence[Row], logits: torch.Tensor, allowed: torch.Tensor) -> list[int]:
        """Draws an id for each row from logits [b, V], among those that are allowed, bool [b, V]."""
        uniforms = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=logits.device)
        return choose(logits, allowed, uniforms, self.settings.temperature, self.settings.top_p).tolist()

    def take_text(self, row: Row, token: int) -> bool:
        """Notes a text token; False when the row ends with it (or with EOS) and need not be read further."""
        if token == self.vocab.eos:
            return False
        row.add_text(token)
        return row.new_tokens < self.settings.max_new_tokens and self.room(row) > 1

    def _capacity(self, lengths: list[int]) -> int:
        """Positions that the longest row may come to hold."""
        image = self.image_length + self.beside_image
        needed = image if self.draws_at_once else self.least_text
        for row, length in zip(self.rows, lengths, strict=True):
            if length + needed > self.seq_length:
                raise ValueError(
                    f"{row.request.prompt.key} takes {length} positions and leaves no room for "
                    f"{'an image' if self.draws_at_once else 'text'} within the model's "
                    f"data.seq_length={self.seq_length}: shorten it."
                )
        if self.mode == "interleaved":
            return self.seq_length
        new = image if self.draws_at_once else self.most_text
        return min(max(lengths) + new, self.seq_length)


def column(ids: Sequence[int]) -> np.ndarray:
    """One token for each row: int64 [b, 1]."""
    return np.array(ids, dtype=np.int64)[:, None]

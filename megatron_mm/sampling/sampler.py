"""What the samplers of all families share: whose turn it is to write or to draw, the grammar of text, guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from megatron_mm.documents.builder import Builder, Opening
from megatron_mm.documents.traits import chooses_images
from megatron_mm.nn.diffusion import guide
from megatron_mm.parallel.ops import padded_vocab_size
from megatron_mm.sampling.decoder import Decoder, piece
from megatron_mm.sampling.decoding import Decoding
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.sampling.row import AUTO, IMAGE, TEXT, Request, Row
from megatron_mm.sampling.text import Next, choose, grammar, penalise
from megatron_mm.types import Document, ImageSegment, PackedBatch, Sample, Segment

Report = Callable[[str], None]
"""Told what the sampler is doing, for a progress display."""
NOTHING = Sample(0, "no prompt", ())


class Sampler(ABC):
    """Continues the documents of one batch; how images are made is the family's.

    With guidance, row i of b has twins in rows b + i, 2 b + i, ... of the cache, which see `contexts` in place of its
    document.
    """

    def __init__(self, model: SamplingModel, requests: Sequence[Request], decoding: Decoding, report: Report):
        self.model, self.decoding, self.report = model, decoding, report
        self.builder, self.vocab = Builder(model.family), model.family.vocab
        self.rows = [Row(index, request) for index, request in enumerate(requests)]
        self.allowed = grammar(self.vocab, padded_vocab_size(self.vocab.size), model.device)
        self.seq_length = model.config.data.seq_length
        self.chooses = chooses_images(model.family)
        self.draws = any(IMAGE in row.plan or row.auto for row in self.rows)
        self.twins = self.guides if decoding.guided and self.draws else 0

    guides = 1
    """Contexts that guidance compares with."""

    def run(self) -> list[list[Segment]]:
        """The continuation of each request, without its prompt.

        Raises:
            ValueError: a prompt leaves no room for what is to follow, or its images do not fit the model.
        """
        capacity = self._capacity()
        with Decoder.open(self.model, len(self.rows) * (1 + self.twins), capacity, self.draws) as self.decoder:
            while any(row.plan for row in self.rows):
                writing = [row for row in self.rows if row.plan and row.plan[0] != IMAGE]
                if writing:
                    self._write(writing)
                else:
                    self._draw([row for row in self.rows if row.plan])
        return [row.written for row in self.rows]

    @abstractmethod
    def draw(self, rows: Sequence[Row], openings: Sequence[Opening]) -> Sequence[np.ndarray]:
        """Makes the image of each row behind its prompt, in the form that `ImageSegment.data` has."""

    def write(self, rows: Sequence[Row], openings: Sequence[Opening]) -> None:
        """Writes each row's text to its end, token by token; `take` says where that is."""
        hidden = self.decoder.read([row.index for row in rows], [opening.prompt for opening in openings])
        while rows:
            chosen = self.choose(rows, self.decoder.logits(hidden), [self._following(row) for row in rows])
            going = [(row, token) for row, token in zip(rows, chosen, strict=True) if self.take(row, token)]
            if not going:
                return
            rows, tokens = zip(*going, strict=True)
            self.report(f"writing, {max(row.new_tokens for row in rows)} tokens")
            hidden = self.decoder.forward([row.index for row in rows], self.next(column(tokens)), keep=1)[:, 0]

    @property
    def least_text(self) -> int:
        """Positions that a prompt must leave for text."""
        return 1

    @property
    def most_text(self) -> int:
        """Positions that new text takes."""
        return self.decoding.max_new_tokens

    def opening(self, row: Row, following: str) -> Opening:
        """The row's document, open for the text or image that comes next."""
        return self.builder.open(row.document, row.shape(following))

    def contexts(self, row: Row, opening: Opening) -> list[Document]:
        """What the row's twins see: no condition at all."""
        image = row.shape(IMAGE).images[-1]
        return [self.builder.open(NOTHING, self.builder.unconditional(image, len(opening.prompt.tokens) - 2)).prompt]

    def read_all(self, rows: Sequence[Row], openings: Sequence[Opening]) -> tuple[list[int], torch.Tensor]:
        """Reads the rows' prompts and their twins' contexts: (rows of the cache, hidden states at the ends), those of
        the twins behind those of the rows, one context after the other."""
        documents = [opening.prompt for opening in openings]
        indices = [row.index for row in rows]
        if self.twins:
            contexts = [self.contexts(row, opening) for row, opening in zip(rows, openings, strict=True)]
            for number, each in enumerate(zip(*contexts, strict=True), 1):
                documents += each
                indices += [number * len(self.rows) + row.index for row in rows]
        return indices, self.decoder.read(indices, documents)

    def guide(self, predicted: torch.Tensor) -> torch.Tensor:
        """What is predicted [b, ...] from predictions [b (1 + twins), ...] of rows and twins."""
        if not self.twins:
            return predicted
        conditional, unconditional = predicted.chunk(2)
        return guide(conditional, unconditional, self.decoding.cfg_scale)

    def next(self, tokens: np.ndarray) -> PackedBatch:
        """The next tokens [b, n], which are of no image."""
        return piece(tokens, fields=self.blank_fields(tokens.shape))

    def blank_fields(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The fields that the front reads, [b, n, ...], of positions that are of no image."""
        specs = {name: self.model.family.fields[name] for name in self.builder.front_fields}
        return {
            name: torch.full((*shape, *spec.shape), spec.fill, dtype=getattr(torch, spec.dtype))
            for name, spec in specs.items()
        }

    def choose(self, rows: Sequence[Row], logits: torch.Tensor, following: Sequence[Next]) -> list[int]:
        """The next text token of each row, or BOI or EOS, from its logits [V] and what may follow."""
        logits = penalise(logits, [row.seen for row in rows], self.decoding.repetition_penalty)
        allowed = self.allowed[torch.tensor(following, device=logits.device)]
        return self.pick(rows, logits, allowed, self.decoding.temperature, self.decoding.top_p)

    def pick(
        self, rows: Sequence[Row], logits: torch.Tensor, allowed: torch.Tensor, temperature: float, top_p: float
    ) -> list[int]:
        """Draws an id for each row from logits [b, V], among those that are allowed, bool [b, V]."""
        uniforms = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=logits.device)
        return choose(logits, allowed, uniforms, temperature, top_p).tolist()

    def take(self, row: Row, token: int) -> bool:
        """Notes a text token, BOI or EOS; False where the row's text ends with it and it need not be read further."""
        if token == self.vocab.boi:
            if row.auto:
                row.plan = [IMAGE, AUTO]
            return False
        if token == self.vocab.eos:
            return self.end_text(row)
        row.add_text(token)
        return row.new_tokens < self.decoding.max_new_tokens and self.room(row) > 1 or self.end_text(row)

    def end_text(self, row: Row) -> bool:
        """The row's text is over, and in `auto` its document; always False."""
        if row.auto:
            row.plan = []
        return False

    def room(self, row: Row) -> int:
        """Positions left behind what has been read."""
        return self.seq_length - len(self.decoder.held[row.index])

    def _write(self, rows: Sequence[Row]) -> None:
        fitting, openings = self._open(rows, TEXT)
        if not fitting:
            return
        self.write(fitting, openings)
        for row in fitting:
            row.finish_text()

    def _draw(self, rows: Sequence[Row]) -> None:
        fitting, openings = self._open(rows, IMAGE)
        if not fitting:
            return
        for row, data in zip(fitting, self.draw(fitting, openings), strict=True):
            drawn = ImageSegment(data)
            row.add_image(self.model.reread(drawn) if len(row.plan) > 1 else drawn)

    def _open(self, rows: Sequence[Row], following: str) -> tuple[list[Row], list[Opening]]:
        """The rows that have room for what follows, and their documents, open for it; others end."""
        openings = [self.opening(row, following) for row in rows]
        fitting = []
        for row, opening in zip(rows, openings, strict=True):
            if len(opening) + (0 if following == IMAGE else self.least_text) <= self.seq_length:
                fitting.append((row, opening))
            else:
                row.plan = []
        return [row for row, _ in fitting], [opening for _, opening in fitting]

    def _following(self, row: Row) -> Next:
        """What may follow a text token: an image only where it is wanted, and fits with BOI and EOI."""
        wanted = self.chooses and (row.auto or row.plan[1:2] == [IMAGE])
        return Next.TEXT_OR_IMAGE if wanted and self.room(row) >= self._image_room else Next.TEXT

    @cached_property
    def _image_room(self) -> int:
        """Positions that an image takes with BOI and EOI, and what stands beside it."""
        empty = Row(0, replace(self.rows[0].request, prompt=NOTHING, write=(IMAGE,)))
        return len(self.opening(empty, IMAGE).block.tokens) + 2

    def _capacity(self) -> int:
        """Positions that the longest row may come to hold.

        Raises:
            ValueError: a prompt leaves no room for what is to be written first.
        """
        capacity = 0
        for row in self.rows:
            first = IMAGE if row.plan[0] == IMAGE else TEXT
            opening = self.opening(row, first)
            if len(opening) + (0 if first == IMAGE else self.least_text) > self.seq_length:
                raise ValueError(
                    f"{row.request.prompt.key} takes {len(opening.prompt.tokens)} positions and leaves no room for "
                    f"{'an image' if first == IMAGE else 'text'} within the model's data.seq_length={self.seq_length}: "
                    "shorten it."
                )
            needed = self.seq_length if row.plan != [first] else len(opening) + (first == TEXT) * self.most_text
            capacity = max(capacity, min(needed, self.seq_length))
        return capacity


def column(ids: Sequence[int]) -> np.ndarray:
    """One token for each row: int64 [b, 1]."""
    return np.array(ids, dtype=np.int64)[:, None]

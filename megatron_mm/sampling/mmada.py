"""Sampling from MMaDA: every step reads whole documents, since all of their positions see each other.

Images by masked decoding; text in blocks, left to right, each of which takes its most confident tokens first (LLaDA,
arXiv 2502.09992). Masks stand up to the end of the answer's `text_block`, as in training; another one is added where no
EOS came. In an interleaved document text and images take turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.data.pack import pack
from megatron_mm.mask import full
from megatron_mm.sampling.masked import MaskedSampler
from megatron_mm.sampling.remask import most_confident
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.text import Next, choose
from megatron_mm.sampling.turns import take_turns
from megatron_mm.types import Document


class MMaDASampler(MaskedSampler):
    """See `Sampler`. `documents`: the tokens so far of each row, and of its twin."""

    guidance = 4.5
    """The official w = 3.5 in (1 + w) c - w u."""

    @property
    def least_text(self) -> int:
        return self.model.config.model.text_block

    @property
    def most_text(self) -> int:
        return -(-self.settings.max_new_tokens // self.least_text) * self.least_text

    def room(self, row: Row) -> int:
        return self.seq_length - len(self.documents[row.index])

    def write(self, prompts: Sequence[Document]) -> None:
        twins = [self.without_prompt(prompt) for prompt in prompts]
        self.documents = [document.tokens for document in (*prompts, *twins)]
        if self.draws_at_once:
            self.draw(self.rows)
        elif self.mode == "image_to_text":
            self._answer(self.rows)
        else:
            fits = lambda row: self.room(row) >= self.image_length + self.beside_image  # noqa: E731
            take_turns(self.rows, fits, self._add_image, self._answer)

    def code_hidden(self, rows: Sequence[Row], indices: list[int], tokens: np.ndarray) -> torch.Tensor:
        return self._hidden(indices, list(self.wrapped(tokens)), 1, self.image_length)

    def _add_image(self, rows: list[Row]) -> None:
        for row, image in zip(rows, self.wrapped(self.draw(rows)), strict=True):
            self._extend(row, image)

    def _answer(self, rows: list[Row]) -> list[Row]:
        """Writes text behind each row that has room for a block; returns those that may go on."""
        unit = self.least_text
        answers = {row.index: np.zeros(0, dtype=np.int64) for row in rows}
        for end in range(unit, self.most_text + 1, unit):
            writing = [row for row in rows if self.room(row) >= end and self.vocab.eos not in answers[row.index]]
            for row in writing:
                answers[row.index] = np.append(answers[row.index], np.full(unit, self.model.family.mask_id))
            for first in range(end - unit, end, self.settings.block_length):
                writing = [row for row in writing if self.vocab.eos not in answers[row.index]]
                if writing:
                    last = min(first + self.settings.block_length, end)
                    self._fill(writing, [answers[row.index] for row in writing], first, last)
        return [row for row in rows if self._take(row, answers[row.index])]

    def _fill(self, rows: list[Row], answers: list[np.ndarray], first: int, end: int) -> None:
        """Unmasks positions first .. end - 1 of each answer; changes `answers`."""
        block, mask_id, device = end - first, self.model.family.mask_id, self.model.device
        allowed = self.allowed[Next.TEXT].expand(len(rows) * block, -1)
        for _ in range(-(-block // self.settings.tokens_per_step)):
            self.report(f"writing, {first} tokens and more")
            logits = self.decoder.logits(self._hidden(self.indices(rows), answers, first, block))
            uniforms = torch.from_numpy(np.stack([row.draws(block) for row in rows])).to(device)
            drawn = choose(
                logits.flatten(0, 1), allowed, uniforms.flatten(), self.settings.temperature, self.settings.top_p
            ).view(len(rows), block)
            permitted = logits.double().masked_fill(~allowed.view_as(logits), -torch.inf)
            confidence = permitted.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            unknown = torch.from_numpy(np.stack([a[first:end] == mask_id for a in answers])).to(device)
            taken = most_confident(confidence, unknown, self.settings.tokens_per_step).cpu().numpy()
            for answer, new, chosen in zip(answers, drawn.cpu().numpy(), taken, strict=True):
                answer[first:end][chosen] = new[chosen]

    def _take(self, row: Row, answer: np.ndarray) -> bool:
        """Notes an answer up to its EOS; False when the row ends with it."""
        ends = np.isin(answer, (self.vocab.eos, self.model.family.mask_id))  # masks stand behind the block of an EOS
        text = answer[: ends.argmax() if ends.any() else None][: self.settings.max_new_tokens - row.new_tokens]
        for token in text.tolist():
            row.add_text(token)
        self._extend(row, text)
        return len(text) > 0 and row.new_tokens < self.settings.max_new_tokens

    def _extend(self, row: Row, tokens: np.ndarray) -> None:
        self.documents[row.index] = np.concatenate([self.documents[row.index], tokens])

    def _hidden(self, indices: list[int], further: list[np.ndarray], first: int, count: int) -> torch.Tensor:
        """Hidden states [b, count, D] of `further` tokens behind the documents, from the `first` of them on."""
        documents = [self.documents[index] for index in indices]
        whole = [np.concatenate([document, tokens]) for document, tokens in zip(documents, further, strict=True)]
        no_images = np.zeros((0, 3), dtype=np.int32)
        rows = [[Document(0, tokens, full(len(tokens)), {}, no_images)] for tokens in whole]
        batch = pack(rows, max(map(len, whole)), {}, self.vocab.pad, [[0]] * len(rows))
        hidden = self.decoder.forward(indices, batch, keep=0)
        places = torch.tensor([len(document) + first for document in documents])[:, None] + torch.arange(count)
        return hidden[torch.arange(len(rows))[:, None], places]

"""Sampling from MMaDA: every step reads whole documents, since all of their positions see each other.

Images by masked decoding; text in blocks, left to right, each of which takes its most confident tokens first (LLaDA,
arXiv 2502.09992). Masks stand up to the end of the answer's `text_block`, as in training; another one is added where no
EOS came.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_mm.data.pack import pack
from megatron_mm.documents.builder import Opening
from megatron_mm.mask import full
from megatron_mm.sampling.masked import MaskedSampler
from megatron_mm.sampling.remask import most_confident
from megatron_mm.sampling.row import Row
from megatron_mm.sampling.text import Next, choose
from megatron_mm.types import Document


class MMaDASampler(MaskedSampler):
    """See `Sampler`. `prompts`: the tokens that stand before what is written in each row of the cache."""

    prompts: dict[int, np.ndarray]

    @property
    def least_text(self) -> int:
        return self.model.config.model.text_block

    @property
    def most_text(self) -> int:
        return -(-self.decoding.max_new_tokens // self.least_text) * self.least_text

    def open_images(self, rows: Sequence[Row], openings: Sequence[Opening]) -> list[int]:
        self._note(rows, openings)
        if self.twins:
            for row, opening in zip(rows, openings, strict=True):
                self.prompts[len(self.rows) + row.index] = self.contexts(row, opening)[0].tokens
        return list(self.prompts)

    def read_blocks(self, indices: Sequence[int], blocks: np.ndarray) -> torch.Tensor:
        return self._hidden(indices, list(blocks), 0, blocks.shape[1])

    def write(self, rows: Sequence[Row], openings: Sequence[Opening]) -> None:
        self._note(rows, openings)
        unit = self.least_text
        answers = {row.index: np.zeros(0, dtype=np.int64) for row in rows}
        for end in range(unit, self.most_text + 1, unit):
            going = [row for row in rows if self._fits(row, end) and self.vocab.eos not in answers[row.index]]
            for row in going:
                answers[row.index] = np.append(answers[row.index], np.full(unit, self.model.family.mask_id))
            for first in range(end - unit, end, self.decoding.block_length):
                going = [row for row in going if self.vocab.eos not in answers[row.index]]
                if going:
                    last = min(first + self.decoding.block_length, end)
                    self._fill(going, [answers[row.index] for row in going], first, last)
        for row in rows:
            self._take(row, answers[row.index])

    def _note(self, rows: Sequence[Row], openings: Sequence[Opening]) -> None:
        self.prompts = {row.index: opening.prompt.tokens for row, opening in zip(rows, openings, strict=True)}

    def _fits(self, row: Row, answer: int) -> bool:
        return len(self.prompts[row.index]) + answer <= self.seq_length

    def _fill(self, rows: list[Row], answers: list[np.ndarray], first: int, end: int) -> None:
        """Unmasks positions first .. end - 1 of each answer; changes `answers`."""
        block, mask_id, device, settings = end - first, self.model.family.mask_id, self.model.device, self.decoding
        allowed = self.allowed[Next.TEXT].expand(len(rows) * block, -1)
        indices = [row.index for row in rows]
        for _ in range(-(-block // settings.tokens_per_step)):
            self.report(f"writing, {first} tokens and more")
            logits = self.decoder.logits(self._hidden(indices, answers, first, block))
            uniforms = torch.from_numpy(np.stack([row.draws(block) for row in rows])).to(device)
            drawn = choose(logits.flatten(0, 1), allowed, uniforms.flatten(), settings.temperature, settings.top_p)
            drawn = drawn.view(len(rows), block)
            permitted = logits.double().masked_fill(~allowed.view_as(logits), -torch.inf)
            confidence = permitted.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            unknown = torch.from_numpy(np.stack([a[first:end] == mask_id for a in answers])).to(device)
            taken = most_confident(confidence, unknown, settings.tokens_per_step).cpu().numpy()
            for answer, new, chosen in zip(answers, drawn.cpu().numpy(), taken, strict=True):
                answer[first:end][chosen] = new[chosen]

    def _take(self, row: Row, answer: np.ndarray) -> None:
        """Notes an answer up to its EOS."""
        ends = np.isin(answer, (self.vocab.eos, self.model.family.mask_id))  # masks stand behind the block of an EOS
        text = answer[: ends.argmax() if ends.any() else None][: self.decoding.max_new_tokens - row.new_tokens]
        for token in text.tolist():
            row.add_text(token)

    def _hidden(self, indices: Sequence[int], further: list[np.ndarray], first: int, count: int) -> torch.Tensor:
        """Hidden states [b, count, D] of `further` tokens behind the documents, from the `first` of them on."""
        documents = [self.prompts[index] for index in indices]
        whole = [np.concatenate([document, tokens]) for document, tokens in zip(documents, further, strict=True)]
        no_images = np.zeros((0, 3), dtype=np.int32)
        rows = [[Document(0, tokens, full(len(tokens)), {}, no_images)] for tokens in whole]
        batch = pack(rows, max(map(len, whole)), {}, self.vocab.pad, [[0]] * len(rows))
        hidden = self.decoder.forward(indices, batch, keep=0)
        places = torch.tensor([len(document) + first for document in documents])[:, None] + torch.arange(count)
        return hidden[torch.arange(len(rows))[:, None], places]

"""The next token of each row: what may follow, and which of it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from megatron_mm.documents.vocabulary import Vocabulary


class Next(IntEnum):
    """What may follow in a document."""

    TEXT = 0
    """Text or EOS."""
    TEXT_OR_IMAGE = 1
    """Text, EOS or BOI."""


def grammar(vocab: Vocabulary, width: int, device: torch.device) -> torch.Tensor:
    """The ids that each `Next` allows: bool [2, width], for logits of `width` entries (vocabulary and padding)."""
    codes = slice(vocab.image_start, vocab.image_start + vocab.image_codes)
    allowed = torch.zeros(len(Next), width, dtype=torch.bool)
    text = allowed[Next.TEXT]
    text[: vocab.text_size] = True
    text[codes] = False
    text[[vocab.pad, vocab.bos, vocab.boi, vocab.eoi, *vocab.special.values()]] = False
    text[vocab.eos] = True
    allowed[Next.TEXT_OR_IMAGE] = text
    allowed[Next.TEXT_OR_IMAGE, vocab.boi] = True
    return allowed.to(device)


def choose(
    logits: torch.Tensor, allowed: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """Draws an id for each row, int64 [b].

    Args:
        logits: [b, V]; allowed: bool [b, V].
        uniforms: float64 [b] in [0, 1), the row's own draw, so that no row depends on another.
        temperature: 0 takes the likeliest id.
        top_p: only the likeliest ids that together reach this probability (arXiv 1904.09751), at least one.
    """
    logits = logits.float().masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = (logits / temperature).double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    before[:, 0] = -1
    kept = probabilities.masked_fill(before >= top_p, 0).cumsum(-1)
    chosen = torch.searchsorted(kept, uniforms[:, None] * kept[:, -1:], right=True)
    return ids.gather(-1, chosen)[:, 0]


def penalise(logits: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """`logits` [b, V] with those of the ids that each row has `seen` made less likely (arXiv 1909.05858)."""
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, seen, strict=True):
        index = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=logits.device)
        old = row[index]
        row[index] = torch.where(old > 0, old / penalty, old * penalty)
    return logits

"""A document as a shard or a file holds it, as segments: texts tokenised, roles resolved, pictures still to be read.

    {"segments": [{"type": "text", "text": ...} | {"type": "image", "file": ...}, ...], "meta": {...}}

A segment with `"loss": false` is given, and not learnt; `"prompt_segments": n` in the meta data says so of the first n.
Where segments have a `role`, the document is a conversation, of which the assistant's turns are learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_mm.data.chat import Chat
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.types import TextSegment


@dataclass(frozen=True)
class Picture:
    """An image by the name of its file."""

    file: str
    loss: bool = True


Parsed = TextSegment | Picture


def parse_document(
    document: Mapping[str, Any], tokenizer: Tokenizer, chat: Chat, prompt: bool = False
) -> tuple[Parsed, ...]:
    """The segments of a document.

    Args:
        prompt: whether it is to be continued: nothing need be learnt, and a conversation goes on with an answer.

    Raises:
        ValueError, KeyError: the document is not as described.
    """
    entries = document["segments"]
    roles = [entry.get("role") for entry in entries]
    if any(roles):
        if not all(roles):
            raise ValueError("some of its segments have a role and some have not: give one to all, or to none.")
        return _conversation(entries, roles, tokenizer, chat, prompt)
    given = _prompt_segments(document.get("meta") or {}, len(entries))
    segments = tuple(_segment(entry, tokenizer, number >= given) for number, entry in enumerate(entries))
    if not prompt and not any(segment.loss for segment in segments):
        raise ValueError("none of its segments is learnt: leave out a `loss`: false.")
    return segments


def _segment(entry: Mapping[str, Any], tokenizer: Tokenizer, loss: bool) -> Parsed:
    own = entry.get("loss", True)
    if type(own) is not bool:
        raise ValueError(f"its json has a segment with loss={own!r}: it must be true or false.")
    if entry["type"] == "text":
        return TextSegment(tokenizer.encode(entry["text"]), own and loss)
    if entry["type"] == "image":
        return Picture(entry["file"], own and loss)
    raise ValueError("its json has a segment whose type is neither 'text' nor 'image'.")


def _prompt_segments(meta: Mapping[str, Any], segments: int) -> int:
    count = meta.get("prompt_segments", 0)
    if type(count) is not int or not 0 <= count < max(segments, 1):
        raise ValueError(
            f"it has prompt_segments={count!r} in its meta data: it must be a whole number that leaves at least one of "
            f"its {segments} segments to learn."
        )
    return count


def _conversation(
    entries: Sequence[Mapping[str, Any]], roles: Sequence[str], tokenizer: Tokenizer, chat: Chat, prompt: bool
) -> tuple[Parsed, ...]:
    """Texts of the template and of the segments run together where nothing parts them, and are tokenised as one."""
    found: list[Parsed] = []
    text, learnt = "", False

    def finish(ends: bool = False) -> None:
        nonlocal text
        if text:
            found.append(TextSegment(tokenizer.encode(text), learnt, ends))
        elif ends and found and isinstance(found[-1], TextSegment):
            found[-1] = replace(found[-1], ends=True)
        elif ends:
            found.append(TextSegment(np.zeros(0, dtype=np.int64), learnt, True))
        text = ""

    for piece in chat.render(roles, answer=prompt and roles[-1] != "assistant"):
        if piece.content is None:
            finish(ends=True)
            continue
        entry = entries[piece.content] if isinstance(piece.content, int) else {"type": "text", "text": piece.content}
        loss = bool(piece.loss and entry.get("loss", True))
        if entry["type"] == "image" or loss != learnt:
            finish()
        learnt = loss
        if entry["type"] == "image":
            found.append(Picture(entry["file"], loss))
        else:
            text += entry["text"]
    finish()
    if not prompt and not any(segment.loss for segment in found):
        raise ValueError("it is a conversation without an answer of the assistant: there is nothing to learn.")
    return tuple(found)

"""Conversations: turns of user and assistant as the pieces of text that a chat template makes of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
PLAIN = """\
{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content }}{{ eos_token if message.role == "assistant" }}{{ "\\n\\n" }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "Assistant: " }}{% endif -%}"""
"""`User: ...`, `Assistant: ...`, EOS behind each of the assistant's turns."""
EOS = "\x02EOS\x03"
MARK = re.compile("\x02(EOS|[0-9]+)\x03")
"""What stands for a segment's content, and for EOS, while a template is filled in."""


@dataclass(frozen=True)
class Piece:
    """What stands in a rendered conversation: the template's own text, a segment (its number), or EOS."""

    content: str | int | None
    loss: bool


@dataclass(frozen=True)
class Chat:
    """A chat template (jinja; `PLAIN` by default), the text that it writes for EOS, and which turns are learnt."""

    template: str = PLAIN
    eos: str = ""
    learn_turns: str = "all"

    @classmethod
    def load(cls, path: str | None, learn_turns: str) -> Chat:
        """The template of `data.chat_template`: null, a Hugging Face tokenizer_config.json, or a jinja file.

        Raises:
            ValueError: there is no such file, or no template in it.
        """
        if path is None:
            return cls(learn_turns=learn_turns)
        try:
            content = Path(path).read_text(encoding="utf-8")
            if not path.endswith(".json"):
                return cls(content, learn_turns=learn_turns)
            config = json.loads(content)
            template, eos = config["chat_template"], config.get("eos_token") or ""
            if isinstance(template, list):  # several, by name
                template = {each["name"]: each["template"] for each in template}["default"]
            if not isinstance(template, str):
                raise TypeError("its chat_template is no text")
            return cls(template, eos if isinstance(eos, str) else eos["content"], learn_turns)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"data.chat_template={path} holds no chat template ({type(error).__name__}: {error}): name a "
                "tokenizer_config.json that has one, a jinja file, or set it to null."
            ) from error

    @property
    def fingerprint(self) -> str:
        """Equal for two only if they render and learn alike; empty for the default."""
        if self == Chat():
            return ""
        return hashlib.blake2b(repr(self).encode(), digest_size=4).hexdigest()

    def render(self, roles: Sequence[str], answer: bool = False) -> list[Piece]:
        """The pieces of a conversation whose segment i is said by roles[i]; `answer` opens the assistant's next turn.

        Raises:
            ValueError: an unknown role, or a template that does not write turn after turn.
        """
        turns: list[tuple[str, list[int]]] = []
        for number, role in enumerate(roles):
            if role not in ROLES:
                raise ValueError(f"its segment {number} has role={role!r}: use one of {', '.join(ROLES)}.")
            if not turns or turns[-1][0] != role:
                turns.append((role, []))
            turns[-1][1].append(number)
        messages = [{"role": role, "content": "".join(f"\x02{n}\x03" for n in said)} for role, said in turns]
        answers = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
        learnt = answers[-1:] if self.learn_turns == "last" else answers
        text = self._fill_in(messages, answer)
        spans = []
        for number in learnt:
            before = self._fill_in(messages[:number], True)
            after = self._fill_in(messages[: number + 1], False)
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise ValueError("the chat template does not write turn after turn, so no turn can be learnt alone.")
            spans.append((len(before), len(after.rstrip())))
        return _pieces(text if answer else text.rstrip(), spans)

    def _fill_in(self, messages: Sequence[dict[str, str]], answer: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        own: dict[str, Any] = {"eos_token": EOS, "bos_token": ""}
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)], chat_template=self.template, add_generation_prompt=answer, **own
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of data.chat_template refuses it: {error}.") from error
        text: str = rendered[0][0]
        return text.replace(self.eos, EOS) if self.eos else text


PLAIN_CHAT = Chat()


def _pieces(text: str, learnt: Sequence[tuple[int, int]]) -> list[Piece]:
    """`text` cut at marks, and where what is learnt begins and ends."""
    cuts = {
        0,
        len(text),
        *(at for span in learnt for at in span),
        *(at for mark in MARK.finditer(text) for at in mark.span()),
    }
    places = sorted(at for at in cuts if at <= len(text))
    pieces = []
    for first, end in zip(places, places[1:], strict=False):
        mark = MARK.fullmatch(text[first:end])
        content = text[first:end] if mark is None else None if mark[1] == "EOS" else int(mark[1])
        pieces.append(Piece(content, any(a <= first and end <= b for a, b in learnt)))
    return pieces

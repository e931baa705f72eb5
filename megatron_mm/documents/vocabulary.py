"""Where everything stands in one id space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

from megatron_mm.config.model import SpecialsConfig


@dataclass(frozen=True)
class Vocabulary:
    """Where everything stands in one id space. Ours: text first, then the specials, then the image codes (if any)."""

    text_size: int
    pad: int
    bos: int
    eos: int
    boi: int
    eoi: int
    image_start: int
    image_codes: int
    size: int
    special: Mapping[str, int] = field(default_factory=dict)
    """Ids that only some families have: of the mask, of tasks."""

    @staticmethod
    def of(
        ids: SpecialsConfig, text_size: int, image_codes: int, size: int | None, special: Sequence[str] = ()
    ) -> Vocabulary:
        """`at` the ids that are given, or `after_text` where none is."""
        if any(value is not None for value in asdict(ids).values()):
            return Vocabulary.at(ids, text_size, image_codes, size)
        return Vocabulary.after_text(text_size, image_codes, size, special)

    @staticmethod
    def after_text(
        text_size: int, image_codes: int = 0, size: int | None = None, special: Sequence[str] = ()
    ) -> Vocabulary:
        """The default arrangement for a text tokenizer of `text_size` entries; `size` adds unused entries at the end.

        Raises:
            ValueError: `size` is smaller than what is needed.
        """
        common = [text_size + i for i in range(5)]
        start = text_size + 5 + len(special)
        needed = start + image_codes
        if size is not None and size < needed:
            raise ValueError(
                f"model.vocab_size={size} is too small: {text_size} text tokens, {5 + len(special)} specials and "
                f"{image_codes} image codes need {needed}. Raise model.vocab_size or leave it null."
            )
        own = {name: text_size + 5 + i for i, name in enumerate(special)}
        return Vocabulary(
            text_size, *common, image_start=start, image_codes=image_codes, size=size or needed, special=own
        )

    def adding(self, name: str, token: int | None) -> Vocabulary:
        """With one more id that only some families have; behind all others if it is None."""
        token = self.size if token is None else token
        return replace(self, size=max(self.size, token + 1), special={**self.special, name: token})

    @staticmethod
    def at(ids: SpecialsConfig, text_size: int, image_codes: int, size: int | None) -> Vocabulary:
        """A converted model's vocabulary, whose ids are given; text has every entry that nothing else takes. BOS and
        EOS may be one and the same. Ids that are no field of ours are `special`.

        Args:
            ids: a `VocabularyConfig` where there are image codes.

        Raises:
            ValueError: an id or the size is not given, or they contradict each other.
        """
        named = asdict(ids)
        unset = [f"model.vocabulary.{name}" for name, value in named.items() if value is None]
        if unset:
            raise ValueError(f"model.vocabulary is set but for {', '.join(unset)}: set all of its ids, or none.")
        if size is None:
            raise ValueError(
                "model.vocabulary is set, so model.vocab_size must be too: give the number of all entries."
            )
        start = named.setdefault("image_start", size)
        codes = range(start, start + image_codes)
        specials = [value for name, value in named.items() if name != "image_start"]
        needed = max(text_size, codes.stop, *(special + 1 for special in specials))
        if needed > size:
            raise ValueError(f"model.vocab_size={size} is too small for its tokenizer and ids: raise it to {needed}.")
        if len({*specials, *codes}) < len(specials) - (ids.bos == ids.eos) + image_codes:
            raise ValueError(
                f"model.vocabulary={named} has an id twice or among its {image_codes} image codes: make them differ."
            )
        own = {name: named.pop(name) for name in named.keys() - {field.name for field in fields(Vocabulary)}}
        return Vocabulary(text_size, **named, image_codes=image_codes, size=size, special=own)

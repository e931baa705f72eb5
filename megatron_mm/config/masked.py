"""The model groups of families that predict masked tokens: Show-o and MMaDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config.fields import Problem
from megatron_mm.config.model import ImageConfig, TrunkConfig, VocabularyConfig


@dataclass(frozen=True)
class MaskedVocabularyConfig(VocabularyConfig):
    """Its ids, and those that only these families have."""

    t2i: int | None = None
    """Of the task text to image."""
    mmu: int | None = None
    """Of the task image to text."""
    mask: int | None = None
    """Of what stands for any other token."""


@dataclass(frozen=True)
class MaskedConfig:
    """What both have; the defaults are Show-o's."""

    family: str = ""
    trunk: TrunkConfig = TrunkConfig()
    image: ImageConfig = ImageConfig(channels=3, height=16, width=16)
    """height and width are the code grid's: an image is height * width codes."""
    image_codes: int = 8192
    vocab_size: int | None = None
    """Entries of the whole vocabulary; null means just what tokenizer, specials and image codes need."""
    vocabulary: MaskedVocabularyConfig = MaskedVocabularyConfig()
    t2i_weight: float = 1.0
    """Of masked image codes."""
    lm_weight: float = 0.1
    """Of documents of text alone."""
    mmu_weight: float = 1.0
    """Of text that has images to go by."""
    generation_share: float = 0.5
    """Share of caption-image pairs that teach text to image; the others teach image to text."""
    condition_dropout: float = 0.1
    """Share of text to image trained without its caption, for classifier-free guidance."""


@dataclass(frozen=True)
class ShowoConfig(MaskedConfig):
    """Show-o (arXiv 2408.12528)."""

    family: str = "showo"
    trunk: TrunkConfig = TrunkConfig(qk_layernorm=True)


@dataclass(frozen=True)
class MMaDAConfig(MaskedConfig):
    """MMaDA (arXiv 2505.15809)."""

    family: str = "mmada"
    image: ImageConfig = ImageConfig(channels=3, height=32, width=32)
    r2i_share: float = 0.0
    """Share of documents in which a text and an image answer a text that teach both at once, masked together (the
    official code's r2i); the others teach one of the two."""
    r2i_weight: float = 1.0
    """Of such answers."""
    r2i_id: int | None = None
    """Id of that task in a converted model; null: behind all others."""
    text_block: int = 64
    """Answers end in EOS up to a multiple of this, so that the number of masks does not give their length away;
    sampling adds as many masks at a time."""

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            self.r2i_share > 0 and self.vocab_size is not None and self.r2i_id is None,
            f"model.r2i_share={self.r2i_share} needs an id for its task among the model.vocab_size="
            f"{self.vocab_size} entries: set model.r2i_id.",
        )

"""The model group of Janus, with its vision encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config.fields import Problem, choice
from megatron_mm.config.model import ImageConfig, SpecialsConfig, TrunkConfig


@dataclass(frozen=True)
class EncoderConfig:
    """A vision transformer as SigLIP has it (arXiv 2303.15343), without its pooling head."""

    hidden_size: int = 128
    num_layers: int = 4
    num_attention_heads: int = 4
    ffn_hidden_size: int | None = None
    """null: 4 * hidden_size."""
    image_size: int = 32
    """Pixels of a side: images are padded to a square."""
    patch_size: int = 4
    activation: str = choice("gelu", "gelu_pytorch_tanh")
    """Of the feed-forward: Janus has the first, SigLIP the second."""

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def side(self) -> int:
        """Patches of a side."""
        return self.image_size // self.patch_size

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            self.image_size % self.patch_size > 0,
            f"model.encoder.patch_size={self.patch_size} must divide model.encoder.image_size={self.image_size}; "
            "change one of them.",
        )
        yield (
            self.hidden_size % self.num_attention_heads > 0,
            f"model.encoder.hidden_size={self.hidden_size} must be a multiple of model.encoder.num_attention_heads="
            f"{self.num_attention_heads}; change one of the two.",
        )


@dataclass(frozen=True)
class JanusConfig:
    """Janus and Janus-Pro (arXiv 2410.13848, 2501.17811)."""

    family: str = "janus"
    trunk: TrunkConfig = TrunkConfig(layernorm_epsilon=1e-6)
    image: ImageConfig = ImageConfig(channels=3, height=8, width=8)
    """height and width are the code grid's: a generated image is height * width codes."""
    image_codes: int = 16384
    code_dim: int = 8
    """Width of the generated codes' own embedding, before its adaptor."""
    encoder: EncoderConfig = EncoderConfig()
    encoder_path: str | None = None
    """Local folder of a pretrained SigLIP (config.json, *.safetensors) that training starts from; null: new weights."""
    freeze_encoder: bool = False
    vocab_size: int | None = None
    """Entries of the text vocabulary; null means just what tokenizer and specials need."""
    vocabulary: SpecialsConfig = SpecialsConfig()
    generation_share: float = 0.5
    """Share of caption-image pairs that teach generation, where the data leaves it open."""
    condition_dropout: float = 0.1
    """Share of generation documents whose caption is padding, for classifier-free guidance."""
    text_weight: float = 1.0
    image_weight: float = 1.0

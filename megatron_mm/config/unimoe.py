"""The model group of Uni-MoE."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config.janus import EncoderConfig
from megatron_mm.config.model import ImageConfig, TrunkConfig


@dataclass(frozen=True)
class UniMoEConfig:
    """Uni-MoE (arXiv 2405.11273)."""

    family: str = "unimoe"
    trunk: TrunkConfig = TrunkConfig(num_experts=4)
    """Before experts are assembled, num_experts=null."""
    encoder: EncoderConfig = EncoderConfig(activation="gelu_pytorch_tanh")
    encoder_path: str | None = None
    """Local folder of a pretrained SigLIP (config.json, *.safetensors) that training starts from; null: new weights."""
    freeze_encoder: bool = False
    vocab_size: int | None = None
    """Entries of the text vocabulary; null means just what tokenizer and specials need."""

    @property
    def image(self) -> ImageConfig:
        """An image as the encoder reads it."""
        return ImageConfig(3, self.encoder.image_size, self.encoder.image_size)

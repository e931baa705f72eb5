"""The model group of Show-o's flow variant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config.fields import Problem
from megatron_mm.config.model import ImageConfig, TrunkConfig


@dataclass(frozen=True)
class ShowoFlowConfig:
    """Show-o2 (arXiv 2506.15564)."""

    family: str = "showo_flow"
    trunk: TrunkConfig = TrunkConfig()
    image: ImageConfig = ImageConfig(channels=16, height=32, width=32)
    """Latents of a VAE."""
    patch_size: int = 2
    semantic_hidden_size: int = 1152
    """Of the SigLIP layers that read an image's latents for their meaning."""
    semantic_layers: int = 27
    semantic_heads: int = 16
    semantic_ffn_size: int = 4304
    flow_layers: int = 10
    """Layers of the flow head, which attend over the document."""
    flow_hidden_size: int = 2048
    flow_heads: int = 32
    """Attention heads of the flow head."""
    flow_query_groups: int = 8
    """Its key/value heads."""
    flow_ffn_size: int = 8192
    ntp_weight: float = 1.0
    """Of next-token prediction."""
    flow_weight: float = 1.0
    """Of flow matching."""
    generation_share: float = 0.5
    """Share of caption-image pairs that teach text to image; the others teach image to text."""
    condition_dropout: float = 0.1
    """Share of text to image trained without its caption, for classifier-free guidance."""
    clean_context: bool = False
    """An interleaved document teaches to draw every image: what follows one sees a clean copy of it, as in sampling;
    costs an image's positions once more."""
    time_shift: bool = True
    """Shift times towards noise, the more the more positions an image has."""

    @property
    def flow_head(self) -> TrunkConfig:
        """The flow head's layers, as those of a trunk."""
        return TrunkConfig(
            num_layers=self.flow_layers,
            hidden_size=self.flow_hidden_size,
            num_attention_heads=self.flow_heads,
            num_query_groups=self.flow_query_groups,
            ffn_hidden_size=self.flow_ffn_size,
            rotary_base=500000.0,
        )

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        flow = self.flow_head
        for width, heads, size, count in (
            ("semantic_hidden_size", "semantic_heads", self.semantic_hidden_size, self.semantic_heads),
            ("flow_hidden_size", "flow_heads", flow.hidden_size, 2 * flow.num_attention_heads),
            ("flow_heads", "flow_query_groups", flow.num_attention_heads, flow.kv_heads),
        ):
            twice = "twice " if heads == "flow_heads" else ""
            yield (
                size % count > 0,
                f"model.{width}={size} must be a multiple of {twice}model.{heads}={getattr(self, heads)}; change one "
                "of the two.",
            )

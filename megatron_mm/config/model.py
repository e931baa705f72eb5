"""The model groups: the transformer trunk, and one dataclass for each family around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_mm.config.fields import Problem, choice


@dataclass(frozen=True)
class TrunkConfig:
    """A transformer with RoPE and an untied head: by default Llama's blocks (RMSNorm, SwiGLU, no biases). Phi-1.5's are
    LayerNorm, GELU, biases, both sublayers side by side, RoPE over half of each head, and a bias on the head. Qwen2's
    are Llama's with biases on queries, keys and values."""

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    """Key/value heads (GQA); null means one per attention head."""
    ffn_hidden_size: int | None = None
    """Feed-forward width; null means 4 * hidden_size for gelu, and Llama's for swiglu: 2/3 of that, rounded up to a
    multiple of 256 (of 32 below a hidden_size of 1024)."""
    qk_layernorm: bool = False
    """LayerNorm with weight and bias on each head's queries and keys, before RoPE (Chameleon)."""
    norm_placement: str = choice("pre", "swin")
    """`pre`: h + f(norm(h)). `swin`: h + norm(f(h))."""
    hidden_dropout: float = 0.0
    """After the attention and the feed-forward outputs."""
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02
    normalization: str = choice("RMSNorm", "LayerNorm")
    """LayerNorm has a weight and a bias."""
    activation: str = choice("swiglu", "gelu")
    """`swiglu`: fc2(silu(gate) * up). `gelu`: fc2(gelu(fc1)), by the tanh approximation (gelu_new)."""
    add_bias_linear: bool = False
    """Biases on the layers' linear parts: queries, keys and values, attention's output, both of the feed-forward."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values alone (Qwen2); `add_bias_linear` has them too."""
    parallel_block: bool = False
    """Attention and feed-forward side by side, behind one norm: h + attention(norm(h)) + mlp(norm(h)) (GPT-J, Phi)."""
    rotary_percent: float = 1.0
    """Share of a head's channels that RoPE turns, the first ones; the others pass through."""
    head_bias: bool = False
    """A bias on the output head."""
    num_experts: int | None = None
    """Feed-forwards of a layer with experts, of which each token uses some; null: no layer has experts."""
    moe_router_topk: int = 2
    """Experts that a token uses; their outputs are weighted by the softmax over their logits."""
    moe_layer_freq: int = 1
    """Every so many layers has experts, from the first on; the others are dense."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the loss that balances experts; 0 leaves it out."""
    moe_token_dispatcher_type: str = choice("alltoall", "allgather")
    """How tokens reach experts on other ranks: each to where it is wanted, or all to all of them."""
    moe_grouped_gemm: bool = False
    """A rank's experts in one product (torch's grouped_mm) in place of one after the other, where they have no
    adapters."""

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.activation == "gelu":
            return 4 * self.hidden_size
        multiple = 256 if self.hidden_size >= 1024 else 32
        return -(-(8 * self.hidden_size // 3) // multiple) * multiple

    @property
    def ffn_matrices(self) -> int:
        """Matrices of the feed-forward, hidden_size x ffn_size each: gate, up and down, or fc1 and fc2."""
        return 3 if self.activation == "swiglu" else 2

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return -(-self.num_layers // self.moe_layer_freq) if self.num_experts else 0

    @property
    def expert_weights(self) -> int:
        """Numbers in the matrices of one feed-forward."""
        return self.hidden_size * self.ffn_matrices * self.ffn_size

    @property
    def shared_weights(self) -> int:
        """Numbers in all layers' matrices that every token meets: queries, keys, values, output, dense feed-forwards
        and routers."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.kv_heads)
        dense = (self.num_layers - self.moe_layers) * self.expert_weights
        return self.num_layers * attention + dense + self.moe_layers * self.hidden_size * (self.num_experts or 0)

    @property
    def trunk_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        return self.shared_weights + self.moe_layers * (self.num_experts or 0) * self.expert_weights

    @property
    def active_weights(self) -> int:
        """Numbers in all layers' matrices that one token meets."""
        return self.shared_weights + self.moe_layers * self.moe_router_topk * self.expert_weights

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that RoPE turns."""
        return int(self.head_dim * self.rotary_percent)

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        heads, kv = self.num_attention_heads, self.kv_heads
        yield (
            self.hidden_size % (2 * heads) > 0,
            f"model.trunk.hidden_size={self.hidden_size} must be an even multiple of model.trunk.num_attention_heads="
            f"{heads}, since RoPE turns pairs of channels; change one of the two.",
        )
        yield (
            self.rotary_dim < 2 or self.rotary_dim % 2 > 0,
            f"model.trunk.rotary_percent={self.rotary_percent} turns {self.rotary_dim} of a head's {self.head_dim} "
            "channels, but RoPE turns pairs; choose a share that is an even number of them, 2 or more.",
        )
        yield (
            self.parallel_block and self.norm_placement == "swin",
            "model.trunk.parallel_block=true has one norm, before both sublayers, and model.trunk.norm_placement=swin "
            "one behind each; use pre, or set model.trunk.parallel_block=false.",
        )
        yield (
            heads % kv > 0,
            f"model.trunk.num_attention_heads={heads} must be a multiple of model.trunk.num_query_groups={kv}; change "
            "one.",
        )
        experts = self.num_experts
        yield (
            experts is not None and not 2 <= self.moe_router_topk <= experts,
            f"model.trunk.moe_router_topk={self.moe_router_topk} must be 2 (one would teach the router nothing) "
            f"to model.trunk.num_experts={experts}; change one of the two.",
        )


@dataclass(frozen=True)
class ImageConfig:
    """The image as the model sees it: a grid of latents or pixels (continuous), or of codes (discrete)."""

    channels: int = 3
    height: int = 32
    """Rows of the grid before patchification (pixels, or the latents of a VAE); for codes, rows of codes."""
    width: int = 32
    transform: str = choice("crop", "native")
    """`crop`: a picture is scaled until it just covers that size, and its middle cut out. `native`: it keeps its
    proportions, and its size up to max_pixels; its sides become multiples of a patch."""
    max_pixels: int | None = None
    """Of a picture, with `native`; null means those of height x width."""
    resample: str = choice("bicubic", "lanczos")
    """The filter of scaling."""


@runtime_checkable
class PatchedConfig(Protocol):
    """Of a family that cuts images into patches of `patch_size` x `patch_size`, so that they may have any size."""

    @property
    def image(self) -> ImageConfig: ...
    @property
    def patch_size(self) -> int: ...


@dataclass(frozen=True)
class TransfusionConfig:
    """Transfusion (arXiv 2408.11039)."""

    family: str = "transfusion"
    trunk: TrunkConfig = TrunkConfig()
    image: ImageConfig = ImageConfig()
    patch_size: int = 2
    patch_codec: str = choice("linear", "unet")
    """`unet` has down and up blocks."""
    unet_channels: int = 64
    """Channels of the first U-Net block; doubled at every halving."""
    ddpm_weight: float = 5.0
    num_train_timesteps: int = 1000
    caption_first: float = 0.8
    """Share of caption-image pairs in which the caption comes first."""
    image_first_max_timestep: int = 500
    """Bound on the timestep of an image that a later caption describes."""
    condition_dropout: float = 0.0
    """Share of caption-first pairs trained without their caption, for classifier-free guidance."""
    clean_context: bool = False
    """What follows an image that is learnt sees a clean copy of it, as in sampling, in place of the noised one; costs
    an image's positions once more."""

    @property
    def tells_places(self) -> bool:
        """Whether patches carry their row and column: linear ones, where the width of an image is not known."""
        return self.patch_codec == "linear" and self.image.transform == "native"

    def contradictions(self) -> Iterator[Problem]:
        """See `validate`."""
        yield (
            self.tells_places and self.trunk.hidden_size % 4 > 0,
            f"model.trunk.hidden_size={self.trunk.hidden_size} must be a multiple of 4 with "
            "model.image.transform=native, for the sines and cosines of rows and columns; change it.",
        )
        yield (
            self.image_first_max_timestep > self.num_train_timesteps,
            f"model.image_first_max_timestep={self.image_first_max_timestep} is above model.num_train_timesteps="
            f"{self.num_train_timesteps}; lower it.",
        )
        yield (
            self.patch_codec == "unet" and self.patch_size & (self.patch_size - 1) > 0,
            f"model.patch_size={self.patch_size} must be a power of two for model.patch_codec=unet; change one of the "
            "two.",
        )


@dataclass(frozen=True)
class SpecialsConfig:
    """Where a converted model has its ids. All null: our own arrangement, behind the text tokenizer's entries."""

    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    boi: int | None = None
    eoi: int | None = None


@dataclass(frozen=True)
class VocabularyConfig(SpecialsConfig):
    """The same for a vocabulary that holds the image codes as well."""

    image_start: int | None = None
    """Id of image code 0; the other codes follow it."""


@dataclass(frozen=True)
class ChameleonConfig:
    """Chameleon (arXiv 2405.09818)."""

    family: str = "chameleon"
    trunk: TrunkConfig = TrunkConfig(qk_layernorm=True)
    image: ImageConfig = ImageConfig(channels=3, height=32, width=32, resample="lanczos")
    """height and width are the code grid's: an image is height * width codes."""
    image_codes: int = 8192
    vocab_size: int | None = None
    """Entries of the whole vocabulary; null means just what tokenizer, specials and image codes need."""
    vocabulary: VocabularyConfig = VocabularyConfig()
    z_loss_weight: float = 1e-5
    image_first: float = 0.5
    """Share of caption-image pairs in which the image comes first."""
    condition_dropout: float = 0.0

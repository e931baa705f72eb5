"""Show-o's configuration and ids between the official config.json (diffusers') and ours.

The official file names Phi-1.5 as the transformer and leaves out its sizes; models of other sizes carry them under the
names that transformers' Phi has for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.config.masked import ShowoConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.interop.rules import check_square, check_trunk, square_overrides, trunk_overrides
from megatron_mm.interop.special_ids import id_entry, id_overrides

TRUNK = {
    "qk_layernorm": True,
    "norm_placement": "pre",
    "normalization": "LayerNorm",
    "activation": "gelu",
    "add_bias_linear": True,
    "parallel_block": True,
    "head_bias": True,
    "num_experts": None,
}
"""What Show-o has of a trunk, without a choice."""

_PHI = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
"""Phi-1.5."""

_DEFAULTS = {"vocab_size": 58498, "llm_vocab_size": 50295, "codebook_size": 8192, "num_vq_tokens": 256}
_END_OF_TEXT = 50256
"""Phi's <|endoftext|>, which begins a text and ends it."""


def overrides_from_hf(hf: Mapping[str, Any]) -> list[str]:
    """The `model.*` overrides that describe the model of an official config.json.

    Raises:
        ValueError: it is of a variant that we do not have.
    """
    if hf.get("w_clip_vit"):
        raise ValueError(
            "config.json has w_clip_vit=True, but our Show-o reads images as codes alone; this variant cannot be "
            "converted."
        )
    hf = _PHI | _DEFAULTS | dict(hf)
    sizes = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf["num_key_value_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "rotary_base": float(hf["rope_theta"]),
        "rotary_percent": hf["partial_rotary_factor"],
        "layernorm_epsilon": hf["layer_norm_eps"],
        "init_method_std": hf["initializer_range"],
    }
    return [
        *trunk_overrides(TRUNK | sizes),
        *square_overrides(hf),
        f"model.vocab_size={hf['vocab_size']}",
        *id_overrides(hf, _official_ids(hf["llm_vocab_size"], hf["vocab_size"])),
    ]


def config_to_hf(model: ShowoConfig, vocab: Vocabulary, original: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model; what we do not know is taken from `original`, if any.

    Raises:
        ValueError: the model is none that the official code can hold.
    """
    trunk, image = model.trunk, model.image
    check_trunk(trunk, TRUNK, "Show-o")
    check_square(image, "Show-o")
    sizes = {
        "hidden_size": trunk.hidden_size,
        "intermediate_size": trunk.ffn_size,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_attention_heads,
        "num_key_value_heads": trunk.num_query_groups,
        "partial_rotary_factor": trunk.rotary_percent,
        "rope_theta": trunk.rotary_base,
        "layer_norm_eps": trunk.layernorm_epsilon,
        "initializer_range": trunk.init_method_std,
    }
    ours = {
        "_class_name": "Showo",
        "vocab_size": vocab.size,
        "codebook_size": vocab.image_codes,
        "num_vq_tokens": image.height * image.width,
        "mask_token_id": vocab.special["mask"],
        **{name: size for name, size in sizes.items() if size != _PHI[name] or name in original},
    }
    basic = {"w_clip_vit": False, "llm_vocab_size": vocab.pad, "load_from_showo": True, "llm_model_path": ""}
    whole = {**basic, **original, **ours}
    return whole | id_entry(vocab, _official_ids(whole["llm_vocab_size"], vocab.size))


def _official_ids(text: int, size: int) -> dict[str, int]:
    """Behind the text's entries: [PAD], soi, eoi, sov, eov, t2i, mmu, t2v, v2v, lvg, the image codes, the mask."""
    return {
        "pad": text,
        "bos": _END_OF_TEXT,
        "eos": _END_OF_TEXT,
        "boi": text + 1,
        "eoi": text + 2,
        "image_start": text + 10,
        "t2i": text + 5,
        "mmu": text + 6,
        "mask": size - 1,
    }

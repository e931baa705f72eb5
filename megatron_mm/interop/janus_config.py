"""Janus's configuration and special ids between Hugging Face's files and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.config.janus import JanusConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.interop.rules import LLAMA, check_trunk

NORM_EPSILON = 1e-6
"""Of the vision encoder's norms, which is no key of ours."""

TRUNK = LLAMA | {"qk_layernorm": False, "norm_placement": "pre"}
"""What Hugging Face's Janus has of a trunk, without a choice."""

_TEXT = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": NORM_EPSILON,
    "mlp_ratio": 4.0,
    "attention_bias": True,
    "projection_dim": 2048,
    "depth": 2,
}
_VQ = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "hidden_act": "gelu",
    "projection_dim": 2048,
    "num_hidden_layers": 2,
    "image_token_embed_dim": 2048,
}
"""transformers' own defaults of the three parts, which it leaves out of config.json."""

_NAMES = {
    "pad": "<｜▁pad▁｜>",
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "boi": "<begin_of_image>",
    "eoi": "<end_of_image>",
}
"""Janus's names of the specials in tokenizer.json."""


def overrides_from_hf(hf: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> list[str]:
    """The `model.*` overrides that describe the model of a Hugging Face config.json.

    tokenizer: tokenizer.json, empty if there is none; config.json has not all specials.

    Raises:
        ValueError: the config is of a variant that we do not have.
    """
    text, vision, vq = (
        defaults | dict(hf.get(f"{part}_config") or {})
        for part, defaults in (("text", _TEXT), ("vision", _VISION), ("vq", _VQ))
    )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    width = text["hidden_size"]
    needed = {
        "text": {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        "vision": {"hidden_act": "gelu", "layer_norm_eps": NORM_EPSILON, "attention_bias": True, "use_qk_norm": False},
        "vq": {"hidden_act": "gelu", "num_hidden_layers": 2, "image_token_embed_dim": width, "projection_dim": width},
    }
    needed["text"] |= {"attention_dropout": 0}
    needed["vision"] |= {"projection_dim": width, "depth": 2}
    needed["vision"] |= {name: 0 for name in ("attention_dropout", "hidden_dropout_rate", "projection_dropout")}
    wrong = [
        f"{part}_config.{key}={given[key]}"
        for (part, wanted), given in zip(needed.items(), (text, vision, vq), strict=True)
        for key, value in wanted.items()
        if given.get(key, value) != value
    ]
    wrong += [f"text_config.rope_type={rope['rope_type']}"] if rope.get("rope_type", "default") != "default" else []
    if text.get("head_dim") not in (None, width // text["num_attention_heads"]):
        wrong.append(f"text_config.head_dim={text['head_dim']}")
    if wrong:
        raise ValueError(
            f"config.json has {', '.join(wrong)}, which our Janus does not do; this variant cannot be converted."
        )
    side = vision["image_size"] // vision["patch_size"]
    model = {
        "trunk.num_layers": text["num_hidden_layers"],
        "trunk.hidden_size": width,
        "trunk.num_attention_heads": text["num_attention_heads"],
        "trunk.num_query_groups": text.get("num_key_value_heads") or text["num_attention_heads"],
        "trunk.ffn_hidden_size": text["intermediate_size"],
        "trunk.rotary_base": float(rope.get("rope_theta") or text.get("rope_theta") or 10000.0),
        "trunk.layernorm_epsilon": text["rms_norm_eps"],
        "trunk.init_method_std": text["initializer_range"],
        "image.height": side,
        "image.width": side,
        "image_codes": vq["num_embeddings"],
        "code_dim": vq["embed_dim"],
        "encoder.hidden_size": vision["hidden_size"],
        "encoder.num_layers": vision["num_hidden_layers"],
        "encoder.num_attention_heads": vision["num_attention_heads"],
        "encoder.ffn_hidden_size": int(vision["hidden_size"] * vision["mlp_ratio"]),
        "encoder.image_size": vision["image_size"],
        "encoder.patch_size": vision["patch_size"],
        "encoder.activation": vision["hidden_act"],
        "vocab_size": text["vocab_size"],
    }
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    for name, token in _NAMES.items():
        value = added.get(token, text.get(f"{name}_token_id"))
        if value is not None:
            model[f"vocabulary.{name}"] = value
    return [f"model.{key}={value}" for key, value in model.items()]


def config_to_hf(model: JanusConfig, vocab: Vocabulary, original: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model; what we do not know (the image tokenizer) is taken from `original`, if any.

    Raises:
        ValueError: the model is none that Hugging Face's Janus can be.
    """
    trunk, encoder, image = model.trunk, model.encoder, model.image
    check_trunk(trunk, TRUNK, "Hugging Face's Janus")
    ratio = encoder.ffn_size / encoder.hidden_size
    wrong = {
        f"model.encoder.activation={encoder.activation}": encoder.activation != "gelu",
        f"model.encoder.ffn_hidden_size={encoder.ffn_size}": int(ratio * encoder.hidden_size) != encoder.ffn_size,
    }
    if any(wrong.values()):
        shown = ", ".join(key for key, is_wrong in wrong.items() if is_wrong)
        raise ValueError(f"This model has {shown}, which Hugging Face's Janus cannot have, so it cannot be converted.")
    if (image.height, image.width) != (encoder.side, encoder.side):
        raise ValueError(
            f"Hugging Face's Janus has as many codes as patches in an image; model.image is {image.height} x "
            f"{image.width} codes and model.encoder {encoder.side} x {encoder.side} patches, so it cannot be converted."
        )
    specials = {f"{name}_token_id": getattr(vocab, name) for name in ("pad", "bos", "eos")}
    parts = {
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocab.size,
            "hidden_size": trunk.hidden_size,
            "intermediate_size": trunk.ffn_size,
            "num_hidden_layers": trunk.num_layers,
            "num_attention_heads": trunk.num_attention_heads,
            "num_key_value_heads": trunk.kv_heads,
            "head_dim": trunk.head_dim,
            "rms_norm_eps": trunk.layernorm_epsilon,
            "initializer_range": trunk.init_method_std,
            "rope_parameters": {"rope_theta": trunk.rotary_base, "rope_type": "default"},
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": encoder.hidden_size,
            "num_hidden_layers": encoder.num_layers,
            "num_attention_heads": encoder.num_attention_heads,
            "mlp_ratio": ratio,
            "image_size": encoder.image_size,
            "patch_size": encoder.patch_size,
            "num_image_tokens": encoder.side**2,
            "hidden_act": encoder.activation,
            "projection_dim": trunk.hidden_size,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "num_embeddings": model.image_codes,
            "embed_dim": model.code_dim,
            "projection_dim": trunk.hidden_size,
            "image_token_embed_dim": trunk.hidden_size,
        },
    }
    if not original:
        parts["text_config"] |= specials
    whole = {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus", "tie_word_embeddings": False}
    return {**original, **whole} | {name: (original.get(name) or {}) | part for name, part in parts.items()}

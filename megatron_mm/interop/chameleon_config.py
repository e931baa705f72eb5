"""Chameleon's configuration and vocabulary between Hugging Face's config.json and ours."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_mm.config.model import ChameleonConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.interop.rules import LLAMA, check_trunk

logger = logging.getLogger(__name__)

QK_NORM_EPSILON = 1e-5
"""Hugging Face's QK-norm has this one whatever `rms_norm_eps` says."""

TRUNK = LLAMA | {"qk_layernorm": True, "layernorm_epsilon": QK_NORM_EPSILON}
"""What Hugging Face's Chameleon has of a trunk, without a choice."""

_DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""transformers' own defaults of ChameleonConfig, which it leaves out of config.json."""

_UNSUPPORTED = ("attention_bias", "mlp_bias", "attention_dropout", "rope_scaling")
_NAMES = {"pad": "<pad>", "bos": "<s>", "eos": "</s>", "boi": "<racm3:break>", "eoi": "<eoss>"}
"""Chameleon's names of the specials in `vocabulary_map`."""


def overrides_from_hf(hf: Mapping[str, Any]) -> list[str]:
    """The `model.*` overrides that describe the model of a Hugging Face config.json.

    Raises:
        ValueError: the config is of another model, or of a variant that we do not have.
    """
    if hf.get("model_type") != "chameleon":
        raise ValueError(f"config.json has model_type={hf.get('model_type')}, but only chameleon can be converted.")
    hf = _DEFAULTS | dict(hf)
    rope = hf.get("rope_parameters") or {}
    wrong = {key: hf[key] for key in _UNSUPPORTED if hf.get(key)}
    wrong |= {"hidden_act": hf["hidden_act"]} if hf["hidden_act"] != "silu" else {}
    wrong |= {"rope_type": rope["rope_type"]} if rope.get("rope_type", "default") != "default" else {}
    wrong |= {"rms_norm_eps": hf["rms_norm_eps"]} if hf["rms_norm_eps"] != QK_NORM_EPSILON else {}
    if wrong:
        shown = ", ".join(f"{key}={value}" for key, value in wrong.items())
        raise ValueError(f"config.json has {shown}, which our Chameleon does not do; this variant cannot be converted.")
    trunk = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "qk_layernorm": "true",
        "norm_placement": "swin" if hf.get("swin_norm") else "pre",
        "rotary_base": float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        "layernorm_epsilon": hf["rms_norm_eps"],
        "init_method_std": hf["initializer_range"],
    }
    return [
        *(f"model.trunk.{key}={value}" for key, value in trunk.items()),
        f"model.vocab_size={hf['vocab_size']}",
        *_vocabulary_overrides(hf),
    ]


def config_to_hf(model: ChameleonConfig, vocab: Vocabulary, original: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model; what we do not know (image tokenizer, vocabulary map) is taken from `original`, if any.

    Raises:
        ValueError: the model's trunk is not one that Hugging Face's can be.
    """
    trunk = model.trunk
    check_trunk(trunk, TRUNK, "Hugging Face's Chameleon")
    ours = {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "vocab_size": vocab.size,
        "hidden_size": trunk.hidden_size,
        "intermediate_size": trunk.ffn_size,
        "num_hidden_layers": trunk.num_layers,
        "num_attention_heads": trunk.num_attention_heads,
        "num_key_value_heads": trunk.kv_heads,
        "rms_norm_eps": trunk.layernorm_epsilon,
        "initializer_range": trunk.init_method_std,
        "rope_parameters": {"rope_theta": trunk.rotary_base, "rope_type": "default"},
        "swin_norm": trunk.norm_placement == "swin",
        "tie_word_embeddings": False,
    }
    if original:
        return {**original, **ours}
    image_names = {f"IMGIMG{_letters(code)}Z": vocab.image_start + code for code in range(vocab.image_codes)}
    special_names = {_NAMES[name]: getattr(vocab, name) for name in _NAMES}
    return ours | {
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "pad_token_id": vocab.pad,
        "vocabulary_map": special_names | image_names,
    }


def _vocabulary_overrides(hf: Mapping[str, Any]) -> list[str]:
    """Ids of the specials and of the image codes, as far as the config tells."""
    names = hf.get("vocabulary_map") or {}
    ids = {}
    for name, text in _NAMES.items():
        value = names.get(text, hf.get(f"{name}_token_id"))
        ids[name] = value[0] if isinstance(value, list) else value
    found = [f"model.vocabulary.{name}={value}" for name, value in ids.items() if value is not None]
    code_of_id = {i: _code(text) for text, i in names.items() if text.startswith("IMGIMG")}
    if code_of_id:
        first, count = min(code_of_id), len(code_of_id)
        if max(code_of_id) != first + count - 1:
            raise ValueError(
                f"config.json puts its {count} image tokens at ids {first} to {max(code_of_id)} with gaps, but "
                "model.vocabulary needs one range; this vocabulary cannot be converted."
            )
        if any(code != i - first for i, code in code_of_id.items()):
            logger.warning(
                "The image tokens are not in the order of the image tokenizer's codes: write images to the shards as "
                "(token id - %d), by the vocabulary_map of config.json.",
                first,
            )
        found += [f"model.vocabulary.image_start={first}", f"model.image_codes={count}"]
    vq = hf.get("vq_config") or {}
    side = vq.get("resolution", 512) // 2 ** (len(vq.get("channel_multiplier") or [1] * 5) - 1)
    return [*found, f"model.image.height={side}", f"model.image.width={side}"]


def _code(name: str) -> int:
    """The image code of a token's name: IMGIMG, its decimal digits as letters from A, Z."""
    return int("".join(str(ord(letter) - ord("A")) for letter in name.removeprefix("IMGIMG").removesuffix("Z")))


def _letters(code: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(code))

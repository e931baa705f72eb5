"""MMaDA's configuration and ids between the official config.json (LLaDA's keys) and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_mm.config.masked import MMaDAConfig
from megatron_mm.documents.vocabulary import Vocabulary
from megatron_mm.interop.rules import LLAMA, check_square, check_trunk, square_overrides, trunk_overrides
from megatron_mm.interop.special_ids import id_entry, id_overrides

TRUNK = LLAMA | {"qk_layernorm": False, "norm_placement": "pre"}
"""What MMaDA has of a trunk, without a choice."""

_FIXED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "weight_tying": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}
"""The variant of LLaDA's code that MMaDA is."""

_DEFAULTS = {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "mlp_hidden_size": 12288,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "init_std": 0.02,
    "vocab_size": 134656,
    "codebook_size": 8192,
    "num_vq_tokens": 1024,
    "mask_token_id": 126336,
}
"""MMaDA-8B's."""

_IDS = {
    "pad": 126093,
    "bos": 126080,
    "eos": 126081,
    "boi": 126084,
    "eoi": 126085,
    "image_start": 126349,
    "t2i": 126088,
    "mmu": 126089,
}
"""Entries of LLaDA's vocabulary, most of them reserved ones; image codes stand behind its last."""
R2I_ID = 126094
"""Likewise, of a task that only `model.r2i_share` trains."""


def overrides_from_hf(hf: Mapping[str, Any]) -> list[str]:
    """The `model.*` overrides that describe the model of an official config.json.

    Raises:
        ValueError: it is of a variant that we do not have.
    """
    wrong = [f"{key}={hf[key]}" for key, value in _FIXED.items() if hf.get(key, value) != value]
    if wrong:
        raise ValueError(
            f"config.json has {', '.join(wrong)}, which our MMaDA does not do; this variant cannot be converted."
        )
    hf = _DEFAULTS | dict(hf)
    sizes = {
        "num_layers": hf["n_layers"],
        "hidden_size": hf["d_model"],
        "num_attention_heads": hf["n_heads"],
        "num_query_groups": hf["n_kv_heads"],
        "ffn_hidden_size": hf["mlp_hidden_size"],
        "rotary_base": float(hf["rope_theta"]),
        "layernorm_epsilon": hf["rms_norm_eps"],
        "init_method_std": hf["init_std"],
    }
    return [
        *trunk_overrides(TRUNK | sizes),
        *square_overrides(hf),
        f"model.vocab_size={hf.get('embedding_size') or hf['vocab_size']}",
        *id_overrides(hf, _IDS | {"mask": hf["mask_token_id"]}),
        f"model.r2i_id={R2I_ID}",
    ]


def config_to_hf(model: MMaDAConfig, vocab: Vocabulary, original: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model; what we do not know is taken from `original`, if any.

    Raises:
        ValueError: the model is none that the official code can hold.
    """
    trunk, image = model.trunk, model.image
    check_trunk(trunk, TRUNK, "MMaDA")
    check_square(image, "MMaDA")
    ours = {
        "model_type": "mmada",
        **_FIXED,
        "d_model": trunk.hidden_size,
        "n_layers": trunk.num_layers,
        "n_heads": trunk.num_attention_heads,
        "n_kv_heads": trunk.kv_heads,
        "mlp_hidden_size": trunk.ffn_size,
        "rope_theta": trunk.rotary_base,
        "rms_norm_eps": trunk.layernorm_epsilon,
        "init_std": trunk.init_method_std,
        "vocab_size": vocab.size,
        "embedding_size": vocab.size,
        "codebook_size": vocab.image_codes,
        "num_vq_tokens": image.height * image.width,
        "mask_token_id": vocab.special["mask"],
    }
    basic = {"architectures": ["MMadaModelLM"], "eos_token_id": vocab.eos, "pad_token_id": vocab.eos}
    return {**basic, **original, **ours} | id_entry(vocab, _IDS | {"mask": vocab.special["mask"]})

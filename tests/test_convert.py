"""The converter's command line, and weights in half precision."""

import json

import pytest
import torch
from distributed import run_ranks
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from megatron_mm.config.compose import from_dict_config
from megatron_mm.convert import main
from megatron_mm.engines.format import TRACKER, common_state
from megatron_mm.engines.reading import CheckpointError
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.registry import build_family
from megatron_mm.interop.chameleon_weights import rules, weights_from_hf
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.distributed import process_groups

CONFIG = {
    "model_type": "chameleon",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
IDS = {"pad": 0, "bos": 1, "eos": 2, "boi": 3, "eoi": 4, "image_start": 5}
OVERRIDES = [
    "data.tokenizer=bytes",
    "model.image_codes=7",
    *(f"model.vocabulary.{name}={value}" for name, value in IDS.items()),
]


def half_precision_round_trip(init, folder):
    main(["from_hf", f"src={folder}/hf", f"out={folder}/checkpoint", *OVERRIDES, "model.trunk.hidden_dropout=0.25"])
    config = from_dict_config(OmegaConf.create(common_state(folder / "checkpoint")["config"]))
    assert config.model.trunk.hidden_dropout == 0.25
    with process_groups(config.parallel, 0, torch.device("cpu"), **init) as layout:
        chunks = build_chunks(config, build_family(config.model, 256), layout, torch.device("cpu"))
        load_weights(chunks, folder / "checkpoint")
        loaded = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
    main(["to_hf", f"checkpoint={folder}/checkpoint", f"out={folder}/back"])
    return config, loaded


def test_bf16_weights_load_into_fp32_and_come_back_as_they_were(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG))
    shapes = {
        "model.embed_tokens.weight": (300, 32),
        "lm_head.weight": (300, 32),
        "model.norm.weight": (32,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"},
        **{f"model.layers.0.self_attn.{name}_norm.{kind}": (4, 8) for name in "qk" for kind in ("weight", "bias")},
        **{f"model.layers.0.mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (32, 48),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
    }
    weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    half = len(weights) // 2
    for number, names in enumerate((list(weights)[:half], list(weights)[half:])):
        save_file({name: weights[name] for name in names}, tmp_path / "hf" / f"model-{number}.safetensors")
    config, loaded = run_ranks(half_precision_round_trip, 1, tmp_path)[0]
    assert {source for rule in rules(config.model, 300) for source in rule.sources} == weights.keys()
    for name, weight in weights_from_hf(weights, config.model, 300):
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], weight.float()), name
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], weights[name]) for name in weights)
    assert not (tmp_path / "checkpoint" / "vqmodel.safetensors").exists()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG))
    for name, content in (("list", b"[]"), ("binary", b"\xff\xfe\xff")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none of from_hf, to_hf"),
        (["sideways"], "sideways is none of from_hf, to_hf, to_peft, merge_lora, assemble_experts: write from_hf"),
        (["from_hf", "src={}/hf"], "out= is not given: write from_hf src=DIR out=DIR"),
        (["to_hf", "checkpoint={}", "out={}/x", "model=chameleon"], r"weights=model\|ema: leave out model=chameleon"),
        (["to_hf", "checkpoint={}", "out={}/x"], "holds no checkpoint"),
        (["from_hf", "src={}/none", "out={}/x"], r"none/config\.json cannot be read: No such file"),
        (
            ["from_hf", "src={}/hf", "out={}/x"],
            r"hf/tokenizer\.json is missing: put it there, or give data\.tokenizer=",
        ),
        (["from_hf", "src={}/list", "out={}/x"], r"list/config\.json holds no JSON object but a list"),
        (["from_hf", "src={}/binary", "out={}/x"], r"binary/config\.json is not JSON"),
        (
            ["from_hf", "src={}/hf", "out={}/x", "data.tokenizer=bytes"],
            r"set but for .*model\.vocabulary\.image_start: set all",
        ),
        (["from_hf", "src={}/hf", "out={}/x", *OVERRIDES], r"hf holds no \*\.safetensors files"),
        (
            ["from_hf", "src={}/hf", "out={}/x", *OVERRIDES, "model.image_codes=999"],
            "too small for its tokenizer and ids: raise it to 1004",
        ),
        (["from_hf", "src={}/hf", "out={}/x", *OVERRIDES, "model.trunk.layers=1"], "layers is not a known key"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        main([argument.format(folder) for argument in arguments])
    assert "\n" not in str(error.value)


def test_damaged_weights_and_taken_folders_are_named(folder):
    (folder / "hf" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*download it again"):
        main(["from_hf", f"src={folder}/hf", f"out={folder}/x", *OVERRIDES])
    (folder / TRACKER).write_text("1")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        main(["from_hf", f"src={folder}/hf", f"out={folder}", *OVERRIDES])

"""A small real dataset of pictures and text, and runs of tiny models of every family on it."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from distributed import run_ranks
from PIL import Image

from megatron_mm.config.compose import compose
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.config.validate import validate
from megatron_mm.data.codebook import fit_patch_codebook
from megatron_mm.data.shards import Record, write_shards
from megatron_mm.engines.whole_weights import load_whole_weights
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.train import StopSignal, train

FAMILIES = ("transfusion", "chameleon", "janus", "showo", "mmada", "showo_flow")
SIDE = 8
SIZES = ((8, 8), (4, 13), (12, 5), (3, 3), (40, 16))
"""Of pictures that keep their proportions."""
COMMON = [
    "run.name=test",
    "data.seq_length=96",
    "data.window=32",
    "train.train_iters=20",
    "train.global_batch_size=4",
    "optim.lr=1e-3",
    "optim.lr_warmup_iters=2",
    "model.trunk.num_layers=4",
    "model.trunk.hidden_size=32",
    "model.trunk.num_attention_heads=4",
    "model.trunk.num_query_groups=2",
    "model.trunk.ffn_hidden_size=64",
    "model.trunk.hidden_dropout=0.1",
    "model.trunk.qk_layernorm=true",
    "model.condition_dropout=0.1",
    "logging.log_interval=1000",
    "logging.wandb=disabled",
]
MODEL = {
    "transfusion": [
        "model=transfusion_tiny",
        f"model.image={{channels: 1, height: {SIDE}, width: {SIDE}}}",
        "model.patch_size=2",
    ],
    "chameleon": [
        "model=chameleon_tiny",
        "model.image={channels: 1, height: 4, width: 4}",
        "model.image_codes=16",
        "model.trunk.norm_placement=swin",
        "data.image_tokenizer={folder}/codebook.npz",
    ],
    "janus": [
        "model=janus_tiny",
        "model.trunk.init_method_std=0.1",  # or what the encoder sees hardly reaches the loss
        "model.image={channels: 1, height: 4, width: 4}",
        "model.image_codes=16",
        f"model.encoder.image_size={SIDE}",
        "model.encoder.patch_size=2",
        "data.image_tokenizer={folder}/codebook.npz",
    ],
}
MODEL |= {
    family: [
        f"model={family}_tiny",
        "model.image={channels: 1, height: 4, width: 4}",
        "model.image_codes=16",
        "data.image_tokenizer={folder}/codebook.npz",
    ]
    for family in ("showo", "mmada")
}
MODEL["mmada"].append("model.text_block=8")
MODEL["unimoe"] = [
    "model=unimoe_tiny",
    "model.encoder.image_size=8",
    "model.encoder.hidden_size=16",
    "model.encoder.num_layers=1",
    "model.trunk.moe_layer_freq=2",
]
MODEL["showo_flow"] = [
    "model=showo_flow_tiny",
    f"model.image={{channels: 1, height: {SIDE}, width: {SIDE}}}",
    "model.semantic_hidden_size=16",
    "model.semantic_ffn_size=32",
    "model.semantic_layers=1",
    "model.flow_layers=2",
]
MODEL["transfusion_unet"] = [*MODEL["transfusion"], "model.patch_codec=unet", "model.unet_channels=8"]
MODEL["transfusion_experts"] = [
    *MODEL["transfusion"],
    "model.trunk.num_experts=4",
    "model.trunk.moe_layer_freq=2",
    "model.trunk.moe_aux_loss_coeff=0.05",
]
PHI = [
    "model.trunk.normalization=LayerNorm",
    "model.trunk.activation=gelu",
    "model.trunk.add_bias_linear=true",
    "model.trunk.parallel_block=true",
    "model.trunk.rotary_percent=0.5",
    "model.trunk.head_bias=true",
    "model.trunk.norm_placement=pre",
]
MODEL |= {f"{family}_phi": [*MODEL[family], *PHI] for family in FAMILIES}


MODEL |= {
    f"{family}_native": [*MODEL[family], "model.image.transform=native"]
    for family in ("transfusion", "transfusion_unet", "showo_flow")
}


def picture(rng: np.random.Generator, height: int = SIDE, width: int = SIDE) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8), "L")


def make_shards(folder: Path, sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE),)) -> None:
    """Pairs, captions of many lengths, interleaved documents and plain text, in two shards, and a codebook; pictures
    take turns in `sizes`."""
    rng, turns = np.random.default_rng(0), cycle(sizes)
    records = []
    for i in range(60):
        caption = "a picture of " + "x" * int(rng.integers(0, 20))
        one, first, second = (picture(rng, *next(turns)) for _ in range(3))
        kinds = [(caption, one), (caption, first, "then", second), (caption * 2,)]
        records.append(Record(f"{i:06d}", kinds[i % 3 if i % 5 else 0]))
    write_shards(folder / "train", records, samples_per_shard=40)
    pictures = [picture(rng) for _ in range(20)]
    fit_patch_codebook(pictures, 16, 2, 1, SIDE, SIDE, 0).save(folder / "codebook.npz")


def overrides_for(family: str, shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    own = [line.replace("{folder}", str(shards)) for line in MODEL[family]]
    common = [line for line in COMMON if family != "unimoe" or not line.startswith("model.condition_dropout")]
    return [*own, *common, f"data.path={shards}/train", f"run.dir={run_dir}", "checkpoint.save=null", *overrides]


CPU = torch.device("cpu")


def run_training(overrides: list[str], world_size: int = 1, device: torch.device = CPU) -> list[dict]:
    """The steps of a run, as rank 0 reports them; every rank must report the same."""
    config = compose(overrides)
    validate(config, world_size)
    ranks = run_ranks(_train, world_size, config, device)
    assert all(rank == ranks[0] for rank in ranks), "the ranks disagree on the metrics"
    return ranks[0]


def _train(init_kwargs: dict, config, device: torch.device) -> list[dict]:
    with process_groups(config.parallel, config.train.seed, device, **init_kwargs) as layout:
        steps: list[dict] = []
        train(config, layout, device, StopSignal(), lambda step: steps.append(asdict(step)))
        return steps


def saved_weights(run_dir: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every whole weight of a run's checkpoint, by its name there."""
    (weights,) = run_ranks(_saved_weights, 1, run_dir / f"checkpoints/iter_{iteration:07d}")
    return weights


def _saved_weights(init_kwargs: dict, folder: Path) -> dict[str, torch.Tensor]:
    with process_groups(ParallelConfig(), 0, CPU, **init_kwargs):
        return {name: weight.clone() for name, weight in load_whole_weights(folder).items()}

"""Adapters in checkpoints: handed over between runs, merged, and exported as peft reads them."""

import logging
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from peft import PeftModel
from transformers import ChameleonForConditionalGeneration
from trunk_runs import documents

from megatron_mm.config.compose import Config, to_yaml
from megatron_mm.config.model import ChameleonConfig, TrunkConfig, VocabularyConfig
from megatron_mm.config.schema import DataConfig, LoraConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_mm.convert import main
from megatron_mm.data.pack import pack
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.derived import checkpoint_config
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.engines.reading import CheckpointError
from megatron_mm.engines.weights import load_weights
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.context.runtime import Part
from megatron_mm.parallel.distributed import process_groups

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MODEL = ChameleonConfig(
    trunk=TrunkConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, qk_layernorm=True),
    image_codes=7,
    vocab_size=300,
    vocabulary=VocabularyConfig(pad=0, bos=1, eos=2, boi=3, eoi=4, image_start=5),
)
BASE = Config(model=MODEL, run=RunConfig("test", "none"), data=DataConfig("none"), train=TrainConfig(seed=1))
LORA = replace(BASE, lora=LoraConfig(rank=3, alpha=5.0, targets=("decoder.layers.*",)))
TP2 = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def save(init, config: Config, folder, load=None):
    """A checkpoint of random adapters, as training would leave them."""
    with process_groups(config.parallel, 0, CPU, **init) as layout:
        engine = MegatronEngine(config, build_family(config.model, 256), layout, CPU)
        if load:
            load_weights(engine.models, load)
        for model in engine.models:
            state = model.sharded_state_dict()
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    # The same on every tensor rank where it is whole there; where it is cut, any numbers will do.
                    generator = torch.Generator().manual_seed(len(state[name].key) + layout.tp_rank * ("fc1" in name))
                    parameter.data.normal_(std=0.3, generator=generator)
        Checkpointer(engine, folder).save(1, {"config": to_yaml(config), "data_state": {}})


def logits(init, config: Config, folder) -> torch.Tensor:
    with process_groups(config.parallel, 0, CPU, **init) as layout, torch.no_grad():
        family = build_family(config.model, 256)
        (model,) = build_chunks(config, family, layout, CPU)
        load_weights([model], folder)
        batch = pack(documents(False), 24, family.fields, 0, ((5, 6), (7,)))
        hidden = model.eval().hidden(Part.of(batch.to(CPU, config.train.dtype)))
        return model.back.ops.gather_logits(model.back.logits(hidden.transpose(0, 1)))[..., :300]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run_ranks(save, 2, replace(LORA, parallel=TP2), folder / "adapted")
    return folder


def test_merged_weights_give_the_same_logits(checkpoint):
    adapted = run_ranks(logits, 1, LORA, checkpoint / "adapted")[0]
    run_ranks(lambda init: main(["merge_lora", f"checkpoint={checkpoint}/adapted", f"out={checkpoint}/merged"]), 1)
    assert checkpoint_config(checkpoint / "merged").lora.rank == 0
    merged = run_ranks(logits, 1, BASE, checkpoint / "merged")[0]
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-5)
    plain = run_ranks(logits, 1, LORA, checkpoint / "merged")[0]  # new adapters change nothing
    assert torch.equal(plain, merged)


def export(init, folder):
    merged = f"{folder}/base"
    main(["to_peft", f"checkpoint={folder}/adapted", f"out={folder}/peft"])
    main(["to_hf", f"checkpoint={merged}", f"out={folder}/hf"])
    model = ChameleonForConditionalGeneration.from_pretrained(folder / "hf", attn_implementation="eager")
    model = PeftModel.from_pretrained(model, folder / "peft").eval()
    with torch.no_grad():
        hidden = [[model.base_model.model.model(torch.from_numpy(d.tokens)[None])[0][0] for d in row]
                  for row in documents(False)]  # fmt: skip
        return [[model.base_model.model.lm_head(h) for h in row] for row in hidden]


def test_peft_reads_the_export(checkpoint):
    ours = run_ranks(logits, 1, LORA, checkpoint / "adapted")[0]
    run_ranks(save, 1, BASE, checkpoint / "base")
    theirs = run_ranks(export, 1, checkpoint)[0]
    for row, documents_of_row in zip(ours, theirs, strict=True):
        start = 0
        for computed in documents_of_row:
            torch.testing.assert_close(row[start : start + len(computed)], computed, rtol=0, atol=5e-5)
            start += len(computed)
    plain = run_ranks(logits, 1, BASE, checkpoint / "base")[0]
    assert (plain - ours).abs().max() > 0.01  # the adapters say something


def test_a_run_without_adapters_hands_over_to_one_with_them(checkpoint, tmp_path, caplog):
    run_ranks(save, 1, BASE, tmp_path / "base")
    plain = run_ranks(logits, 1, BASE, tmp_path / "base")[0]

    def adopt(init):
        with caplog.at_level(logging.INFO):
            adapted = logits(init, LORA, tmp_path / "base")
        assert any("no adapters for 8 weights, which start new" in record.message for record in caplog.records)
        return adapted

    assert torch.equal(run_ranks(adopt, 1)[0], plain)


def test_adapters_are_not_dropped_in_silence(checkpoint):
    def load(init):
        with pytest.raises(CheckpointError, match="holds adapters, but lora.rank=0"):
            logits(init, BASE, checkpoint / "adapted")
        for step in ("to_hf", "merge_lora", "to_peft"):
            folder = "adapted" if step == "to_hf" else "base"
            with pytest.raises(ValueError, match="merge_lora merges them first|has no (LoRA )?adapters"):
                main([step, f"checkpoint={checkpoint}/{folder}", f"out={checkpoint}/none"])

    run_ranks(save, 1, BASE, checkpoint / "base")
    run_ranks(load, 1)

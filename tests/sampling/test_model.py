"""A checkpoint of any layout becomes a model to sample from."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from tiny_models import config_for

from megatron_mm.config.compose import to_yaml
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.engines.reading import CheckpointError
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import process_groups, single_process
from megatron_mm.parallel.init import initialize
from megatron_mm.sampling.decoding import settings_for
from megatron_mm.sampling.generation import generate
from megatron_mm.sampling.model import SamplingModel

CPU = torch.device("cpu")
PLAIN = "parallel.use_distributed_optimizer=false"  # the other has nothing to save before its first step


def save(init_kwargs, config, folder):
    with process_groups(config.parallel, config.train.seed, CPU, **init_kwargs) as layout:
        family = build_family(config.model, load_tokenizer(config.data.tokenizer).size)
        engine = MegatronEngine(config, family, layout, CPU)
        Checkpointer(engine, folder).save(1, {"config": to_yaml(config)})


def load_twice(_init_kwargs, config, folder):
    """Names of weights that differ from those of the run's seed, and a continuation of nothing."""
    with SamplingModel.load(folder / "iter_0000001") as loaded:
        assert loaded.config == replace(config, parallel=ParallelConfig(use_distributed_optimizer=False))
        fresh = SamplingModel.build(loaded.config, CPU)
        initialize(fresh.stage, config.train.seed)
        wanted = dict(fresh.stage.named_parameters())
        differing = [n for n, p in loaded.stage.named_parameters() if not torch.equal(p, wanted[n])]
        assert len(wanted) > 20 and not loaded.stage.training
    with SamplingModel.load(folder) as again, single_process(CPU):  # leaves and joins, also where a group is there
        settings = settings_for(again.family.name, steps=2, num_samples=3)
        return differing, [len(d) for d in generate(again, [[]], "image", settings)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["transfusion_unet", "chameleon", "janus"])
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_loads_from_any_layout(family, layout, folder, tmp_path):
    config = config_for(family, folder, f"parallel.{layout}_model_parallel_size=2", PLAIN, "train.seed=5")
    run_ranks(save, 2, config, tmp_path)
    assert run_ranks(load_twice, 1, config, tmp_path)[0] == ([], [1, 1, 1])


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"), SamplingModel.load(tmp_path):
        pass

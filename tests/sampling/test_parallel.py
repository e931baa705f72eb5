"""Sampling with a model that is cut over ranks gives what one process gives."""

import numpy as np
import pytest
import torch
from distributed import run_ranks
from tiny_models import config_for
from tiny_runs import FAMILIES

from megatron_mm.config.compose import to_yaml
from megatron_mm.config.schema import ParallelConfig
from megatron_mm.data.tokenizer import load_tokenizer
from megatron_mm.engines.checkpoint import Checkpointer
from megatron_mm.engines.megatron import MegatronEngine
from megatron_mm.families.registry import build_family
from megatron_mm.parallel.distributed import process_groups
from megatron_mm.sampling.decoding import settings_for
from megatron_mm.sampling.generation import generate, refusal
from megatron_mm.sampling.model import SamplingModel
from megatron_mm.types import ImageSegment, TextSegment

CPU = torch.device("cpu")
FP64 = ["train.precision=fp64", "parallel.use_distributed_optimizer=false"]


def save(init_kwargs, config, folder):
    """A checkpoint of lively random weights."""
    with process_groups(config.parallel, 0, CPU, **init_kwargs) as layout:
        family = build_family(config.model, load_tokenizer(config.data.tokenizer).size)
        engine = MegatronEngine(config, family, layout, CPU)
        generator = torch.Generator().manual_seed(0)
        for parameter in engine.models[0].parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + 0.1 * noise)
        Checkpointer(engine, folder).save(1, {"config": to_yaml(config)})


def sample(init_kwargs, folder, parallel):
    """Segments of all that the family writes, as lists of numbers."""
    with process_groups(parallel, 0, CPU, **init_kwargs), SamplingModel.load(folder, CPU, parallel) as model:
        settings = settings_for(model.family.name, steps=3, max_new_tokens=8, num_samples=2, cfg_scale=2.0)
        codes, rng = model.codec.codes, np.random.default_rng(0)
        pixels = rng.uniform(-1, 1, (3, 8, 8)).astype(np.float32) if model.family.encoder_side else None
        image = ImageSegment(rng.integers(0, 16, (4, 4)) if codes else rng.random((1, 8, 8), np.float32), pixels)
        text = TextSegment(np.array([70, 80]))
        prompts = {"image": [[text], []], "text": [[image, text]], "text,image,text": [[text]], "auto": [[text]]}
        writes = [write for write in prompts if refusal(model, write.split(",")) is None]
        found = [segments for write in writes for segments in generate(model, prompts[write], write, settings)]
    return [
        [(s.ids if isinstance(s, TextSegment) else s.data).ravel().tolist() for s in segments] for segments in found
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "unimoe", "transfusion_experts"])
def test_ranks_change_nothing(family, folder, tmp_path):
    config = config_for(family, folder, *FP64)
    run_ranks(save, 1, config, tmp_path)
    (alone,) = run_ranks(sample, 1, tmp_path, ParallelConfig())
    assert all(alone), "a continuation is empty"
    for sizes in ({"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}):
        parallel = ParallelConfig(**{f"{name}_model_parallel_size": size for name, size in sizes.items()})
        for rank in run_ranks(sample, parallel.model_parallel_size, tmp_path, parallel):
            assert [[len(part) for part in parts] for parts in rank] == [[len(p) for p in parts] for parts in alone]
            for ours, theirs in zip(rank, alone, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def refuse(init_kwargs, folder, parallel):
    with (
        process_groups(ParallelConfig(), 0, CPU, **init_kwargs),
        pytest.raises(ValueError) as raised,
        SamplingModel.load(folder, CPU, parallel),
    ):
        pass
    return str(raised.value)


def test_what_cannot_be_cut_is_refused(folder, tmp_path):
    run_ranks(save, 1, config_for("chameleon", folder, *FP64), tmp_path)
    (said,) = run_ranks(refuse, 1, tmp_path, ParallelConfig(tensor_model_parallel_size=2))
    assert "takes 2 processes, but there are 1: start as many with torchrun" in said
    (said,) = run_ranks(refuse, 1, tmp_path, ParallelConfig(tensor_model_parallel_size=4))
    assert "num_query_groups=2 must be a multiple of parallel.tensor_model_parallel_size=4" in said

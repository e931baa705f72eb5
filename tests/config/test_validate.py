"""Each contradiction is refused before anything starts, by a sentence that names its keys."""

import pytest

from megatron_mm.config.compose import ConfigError, compose
from megatron_mm.config.validate import validate

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
GROUPED = "model.trunk.moe_grouped_gemm=true"
EP, EXPERTS = "parallel.expert_model_parallel_size", "model.trunk.num_experts"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP, COMM = "parallel.context_parallel_size", "parallel.context_parallel_comm"
BASE = ["model=transfusion_tiny", "run.name=test", "data.path=data/none"]  # 4 layers, 64 wide, 4 heads over 2 keys

SOURCES = ["data.path=null"]


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, []),
        (8, []),
        (4, [f"{TP}=2", f"{PP}=2", "parallel.sequence_parallel=true"]),
        (2, [f"{PP}=2", f"{VPP}=2"]),
        (2, ["parallel.overlap_grad_reduce=true", "parallel.use_distributed_optimizer=false"]),
        (1, ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=4"]),
        (1, ["model.trunk.rotary_percent=0.5", "model.trunk.parallel_block=true", "model.trunk.activation=gelu"]),
        (1, [*SOURCES, "data.sources=[{path: a, weight: 0.1, task: generation}, {path: a}]"]),
        (1, ["train.seed=0", "data.prefetch=0", "optim.min_lr=3e-4"]),
    ],
)
def test_accepts(world_size, overrides):
    validate(compose([*BASE, *overrides]), world_size)


@pytest.mark.parametrize(
    ("world_size", "overrides", "said"),
    [
        (1, ["train.precision=fp8"], r"train\.precision=fp8 must be one of fp32, bf16, fp64\."),
        (1, ["optim.lr_decay_style=wsd"], r"optim\.lr_decay_style=wsd must be one of cosine, "),
        (1, ["data.overlong=cut"], r"data\.overlong=cut must be one of error, skip"),
        (1, ["run.if_exists=merge"], r"run\.if_exists=merge must be one of error, resume, restart"),
        (1, ["logging.wandb=on"], r"logging\.wandb=.* must be one of offline, online, disabled"),
        (1, ["attention.backend=cudnn"], r"backend=cudnn must be one of auto, span, flash, fa4, sdpa, reference"),
        (1, ["parallel.recompute_granularity=all"], r"recompute_granularity=all must be one of null, full, selective"),
        (1, ["model.trunk.norm_placement=post"], r"model\.trunk\.norm_placement=post must be one of pre, swin"),
        (1, ["model.patch_codec=conv"], r"model\.patch_codec=conv must be one of linear, unet"),
        (1, ["train.train_iters=0"], r"train\.train_iters=0 must be 1 or more\."),
        (1, ["model.trunk.num_layers=-4"], r"model\.trunk\.num_layers=-4 must be 1 or more\."),
        (1, ["train.exit_interval=0"], r"train\.exit_interval=0 must be 1 or more\."),
        (1, ["train.seed=-1"], r"train\.seed=-1 must be 0 or more\."),
        (1, ["model.trunk.hidden_dropout=1.5"], r"model\.trunk\.hidden_dropout=1\.5 must be between 0 and 1\."),
        (1, ["model.caption_first=-0.1"], r"model\.caption_first=-0\.1 must be between 0 and 1\."),
        (1, ["optim.lr=nan"], r"optim\.lr=nan must be 0 or more, and finite\."),
        (1, ["optim.clip_grad=-1"], r"optim\.clip_grad=-1\.0 must be 0 or more"),
        (3, [f"{CP}=2"], r"x parallel\.context_parallel_size=2 needs a multiple of 2 processes"),
        (
            2,
            [f"{CP}=2", "data.seq_length=513"],
            r"data\.seq_length=513 must be a multiple of 2 = .*context_parallel_size=2",
        ),
        (2, [f"{CP}=2", "attention.backend=sdpa"], r"attention\.backend=sdpa gives no log-sum-exp"),
        (
            2,
            [f"{CP}=2", f"{COMM}=a2a"],
            r"context_parallel_comm=a2a must be one of auto, ring, exchange, ulysses, hybrid",
        ),
        (4, [f"{CP}=4", f"{COMM}=hybrid"], r"hybrid needs parallel\.ulysses_size=null to be a divisor"),
        (4, [f"{CP}=4", f"{COMM}=hybrid", "parallel.ulysses_size=3"], r"ulysses_size=3 to be a divisor of .*size=4"),
        (4, [f"{CP}=4", "parallel.ulysses_size=2"], r"ulysses_size=2 is only read with .*hybrid, not auto"),
        (8, [f"{CP}=8", f"{COMM}=ulysses"], r"ulysses spreads the heads .*\(4 and 2 over 1\) over 8 ranks"),
        (
            2,
            [f"{TP}=2", "parallel.sequence_parallel=true", "parallel.feed_forward_block=33"],
            r"feed_forward_block=33 must be a multiple of parallel\.tensor_model_parallel_size=2",
        ),
        (2, [f"{EP}=2"], r"parallel\.expert_model_parallel_size=2 has no experts to spread"),
        (4, [f"{EP}=4", f"{EXPERTS}=6"], r"num_experts=6 must be a multiple of parallel\.expert_model_parallel_size=4"),
        (6, [f"{EP}=4", f"{EXPERTS}=8"], r"expert_model_parallel_size=4 must divide the 6 ranks of a pipeline stage"),
        (
            1,
            [f"{EXPERTS}=4", "model.trunk.moe_router_topk=1"],
            r"moe_router_topk=1 must be 2 .* to model\.trunk\.num_exp",
        ),
        (1, [f"{EXPERTS}=4", "model.trunk.moe_router_topk=5"], r"moe_router_topk=5 must be 2 "),
        (2, [f"{EXPERTS}=4", f"{TP}=2"], r"tensor_model_parallel_size=2 needs parallel\.sequence_parallel=true"),
        (1, [f"{EXPERTS}=4", "parallel.feed_forward_block=32"], r"feed_forward_block=32 does not reach into experts"),
        (1, [f"{EXPERTS}=4", GROUPED, "model.trunk.add_bias_linear=true"], r"grouped_gemm=true cannot do with .*bias"),
        (1, ["lora.rank=2", "lora.targets=[]"], r"lora\.rank=2 has no layers to adapt"),
        (1, ["lora.rank=2", "lora.alpha=0"], r"lora\.alpha=0 switches the adapters off"),
        (1, ["lora.dropout=0.1", "parallel.feed_forward_block=8"], r"lora\.dropout=0\.1 does not know the blocks"),
        (1, ["lora.dropout=1.5"], r"lora\.dropout=1\.5 must be between 0 and 1"),
        (3, [f"{TP}=2"], r"tensor_model_parallel_size=2 x .* multiple of 2 processes, but the world size is 3"),
        (1, [f"{TP}=2", f"{PP}=2"], r"needs a multiple of 4 processes, but the world size is 1"),
        (3, [], r"train\.global_batch_size=8 must be a multiple of train\.micro_batch_size=1 x 3 data-parallel ranks"),
        (2, ["train.micro_batch_size=8"], r"train\.global_batch_size=8 must be .* 2 data-parallel ranks = 16"),
        (1, [f"{VPP}=2"], r"virtual_pipeline_model_parallel_size=2 interleaves only with 2 or more"),
        (2, [f"{PP}=2", f"{VPP}=1"], r"virtual_pipeline_model_parallel_size=1 interleaves only with 2 or more"),
        (2, [f"{PP}=2", f"{VPP}=2", "train.global_batch_size=3"], r"interleaved schedule .* but there are 3"),
        (3, [f"{PP}=3"], r"model\.trunk\.num_layers=4 must be a multiple of the 3 pipeline chunks"),
        (2, [f"{PP}=2", f"{VPP}=4"], r"num_layers=4 must be a multiple of the 8 pipeline chunks of .*=2 x .*=4;"),
        (1, ["model.trunk.hidden_size=66"], r"model\.trunk\.hidden_size=66 must be an even multiple of .*heads=4"),
        (1, ["model.trunk.hidden_size=60"], r"model\.trunk\.hidden_size=60 must be an even multiple of .*heads=4"),
        (1, ["model.trunk.activation=relu"], r"model\.trunk\.activation=relu must be one of swiglu, gelu"),
        (1, ["model.trunk.normalization=rms"], r"normalization=rms must be one of RMSNorm, LayerNorm"),
        (1, ["model.trunk.rotary_percent=1.5"], r"rotary_percent=1\.5 must be between 0 and 1"),
        (1, ["model.trunk.rotary_percent=0.2"], r"rotary_percent=0\.2 turns 3 of a head's 16 channels"),
        (1, ["model.trunk.rotary_percent=0"], r"rotary_percent=0\.0 turns 0 of a head's 16 channels"),
        (
            1,
            ["model.trunk.parallel_block=true", "model.trunk.norm_placement=swin"],
            r"parallel_block=true has one norm, .*norm_placement=swin one behind each",
        ),
        (
            1,
            ["model.trunk.normalization=LayerNorm", "fusion.rms_norm=liger"],
            r"fusion\.rms_norm=liger has no RMSNorm .*normalization=LayerNorm",
        ),
        (1, ["model.trunk.num_query_groups=3"], r"num_attention_heads=4 must be a multiple of .*num_query_groups=3"),
        (8, [f"{TP}=8"], r"num_attention_heads=4 must be a multiple of parallel\.tensor_model_parallel_size=8"),
        (4, [f"{TP}=4"], r"num_query_groups=2 must be a multiple of parallel\.tensor_model_parallel_size=4"),
        (2, [f"{TP}=2", "model.trunk.ffn_hidden_size=171"], r"ffn_hidden_size=171 must be a multiple of .*size=2"),
        (1, ["parallel.sequence_parallel=true"], r"parallel\.sequence_parallel=true .* needs more than .*size=1"),
        (
            2,
            [f"{TP}=2", "parallel.sequence_parallel=true", "data.seq_length=513"],
            r"data\.seq_length=513 must be a multiple of parallel\.tensor_model_parallel_size=2",
        ),
        (
            1,
            ["parallel.overlap_p2p_comm=true"],
            r"overlap_p2p_comm=true needs the interleaved .*model_parallel_size=null",
        ),
        (1, ["parallel.overlap_param_gather=true"], r"overlap_param_gather=true needs .*overlap_grad_reduce=true"),
        (
            1,
            ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=5"],
            r"parallel\.recompute_num_layers=5 is more than the 4 layers",
        ),
        (1, ["optim.lr_warmup_iters=1000"], r"lr_warmup_iters=1000 must be less than train\.train_iters=1000"),
        (
            1,
            ["optim.lr_warmup_iters=9", "optim.lr_decay_iters=9"],
            r"lr_warmup_iters=9 must be less than optim\.lr_decay_iters=9",
        ),
        (1, ["data.path=null"], r"data\.path is not set: add data\.path=\.\.\. or data\.sources"),
        (1, ["data.sources=[{path: a}]"], r"data\.path=data/none and data\.sources exclude each other"),
        (
            1,
            [*SOURCES, "data.sources=[{path: a}, {path: b, weight: 0}]"],
            r"data\.sources\[1\]\.weight=0\.0 must be above",
        ),
        (1, [*SOURCES, "data.sources=[{path: a, weight: -1}]"], r"data\.sources\[0\]\.weight=-1\.0 must be 0 or more"),
        (
            1,
            [*SOURCES, "data.sources=[{path: a, task: draw}]"],
            r"data\.sources\[0\]\.task=draw must be one of auto, u",
        ),
        (1, ["data.blend_by=rows"], r"data\.blend_by=rows must be one of tokens, samples"),
        (
            1,
            ["optim.lr_multipliers={front.*: 0}"],
            r"optim\.lr_multipliers\.front\.\*=0\.0 must be above 0, and finite",
        ),
        (1, ["optim.min_lr=1"], r"optim\.min_lr=1\.0 is above optim\.lr=0\.0003"),
        (1, ["checkpoint.async_save=true", "checkpoint.save=null"], r"checkpoint\.async_save=true has nothing to"),
        (1, ["model.patch_codec=unet", "model.patch_size=7"], r"patch_size=7 must be a power of two for .*codec=unet"),
        (1, ["model.patch_size=3"], r"model\.patch_size=3 must divide model\.image\.height=28 and .*width=28"),
        (1, ["model=showo_flow", "model.patch_size=3"], r"model\.patch_size=3 must divide model\.image\.height=32"),
        (
            1,
            ["model=showo_flow", "model.flow_heads=3"],
            r"model\.flow_hidden_size=2048 must be a multiple of twice model\.flow_heads=3",
        ),
        (
            1,
            ["model=showo_flow", "model.flow_query_groups=5"],
            r"flow_heads=32 must be a multiple of model\.flow_query",
        ),
        (
            8,
            ["model=showo_flow", "model.trunk.num_attention_heads=8", f"{TP}=8", "model.flow_query_groups=4"],
            r"model\.flow_query_groups=4 must be a multiple of parallel\.tensor_model_parallel_size=8",
        ),
        (
            8,
            [
                "model=showo_flow",
                "model.trunk.num_attention_heads=8",
                f"{CP}=8",
                f"{COMM}=ulysses",
                "model.flow_heads=4",
                "model.flow_query_groups=4",
            ],
            r"context_parallel_comm=ulysses spreads the heads of a tensor-parallel rank \(4 and ",
        ),
        (1, ["model=showo_flow", "model.semantic_heads=7"], r"size=1152 must be a multiple of model\.semantic_heads=7"),
        (1, ["model=janus", "model.encoder.patch_size=5"], r"encoder\.patch_size=5 must divide .*image_size=32"),
        (1, ["model=janus", "model.encoder.num_attention_heads=3"], r"encoder\.hidden_size=128 must be a multiple of"),
        (1, ["model=janus", "model.generation_share=1.5"], r"model\.generation_share=1\.5 must be between 0 and 1"),
        (
            1,
            ["model=janus", "model.encoder.activation=relu"],
            r"activation=relu must be one of gelu, gelu_py",
        ),
        (1, ["model.image_first_max_timestep=2000"], r"image_first_max_timestep=2000 is above .*timesteps=1000"),
    ],
)
def test_refuses(world_size, overrides, said):
    with pytest.raises(ConfigError, match=said) as error:
        validate(compose([*BASE, *overrides]), world_size)
    assert "\n" not in str(error.value)

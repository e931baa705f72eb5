"""`python -m megatron_mm.plan experiment=longcontext_1m [world_size=N] [masks=NAME,...] [key=value ...]`

Prints what a run will need, from its configuration alone: parameters and memory of a GPU part by part, and for each
named mask of packed rows how balanced the context-parallel parts are, what they send, and how long a step takes by
prediction. Further keys are those of the run. Rates and links are keys too; the defaults are an H100's, assumed.

`rehearse=true` runs the step itself on the meta device, as a rank of the first, a middle and the last pipeline stage
(`rank=N`: as that one), and counts: memory, kernels, bytes, messages, host synchronisations, and a time by roofline.
`search=true` rehearses the most promising layouts (`trials=N` of them) and ranks those that fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from mm_kernels.span_attention.benchmark.distributions import DISTRIBUTIONS
from mm_kernels.span_attention.benchmark.distributions import mask as named_mask
from rich.console import Console
from rich.table import Table

from megatron_mm.config.arguments import parse_own
from megatron_mm.config.cli import user_errors
from megatron_mm.config.compose import Config, ConfigError, compose
from megatron_mm.config.validate import validate
from megatron_mm.families.base import Family
from megatron_mm.families.registry import build_family
from megatron_mm.nn.attention import TRITON
from megatron_mm.parallel.context.predict import Hardware
from megatron_mm.parallel.sizes import ParameterCounts, count_parameters
from megatron_mm.plan.memory import Memory, estimate, usable
from megatron_mm.plan.time import StepTime, step_time
from megatron_mm.rehearsal.clock import Rates
from megatron_mm.report.mfu import DENSE_BF16_PEAKS, trunk_flops

PEAK = DENSE_BF16_PEAKS["H100"]


@dataclass(frozen=True)
class PlanConfig(Rates):
    world_size: int = 256
    """GPUs of the run."""
    masks: str = "interleaved,docs,causal"
    """Named masks (`mm_kernels.span_attention.benchmark.distributions`), with commas."""
    text_vocab_size: int = 32000
    gpu_gigabytes: float = 80.0
    rehearse: bool = False
    rank: int | None = None
    """The rank to rehearse; null: the first of some pipeline stages."""
    search: bool = False
    trials: int = 8
    """Layouts that `search` looks for, of those that fit."""
    out: str | None = None
    """CSV file that `search` adds its rows to; null writes none."""


def main(arguments: Sequence[str]) -> None:
    plan, overrides = parse_own(PlanConfig(), arguments)
    config = compose(overrides)
    validate(config, plan.world_size)
    names = plan.masks.split(",")
    if unknown := next((name for name in names if name not in DISTRIBUTIONS), None):
        raise ConfigError(f"masks={unknown} is unknown; masks: {', '.join(DISTRIBUTIONS)}.")
    _check_rehearsal(plan)
    family = build_family(config.model, plan.text_vocab_size)
    if plan.rehearse or plan.search:
        rehearsed(plan, config, family)
        return
    vocab_size, counts = family.vocab.size, count_parameters(config, family)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{config.run.name}: {counts.total / 1e9:.2f}B weights, {_layout(config, plan.world_size)}")
    console.print(_parameter_table(counts))
    console.print(_memory_table(estimate(config, vocab_size, plan.world_size, counts.beside), plan))
    tp = config.parallel.tensor_model_parallel_size
    hardware = Hardware(
        plan.attention_tflops, plan.node_gigabytes, plan.network_gigabytes, node_size=max(plan.node_size // tp, 1)
    )
    steps = {}
    for name in names:
        rows = named_mask(name, config.data.seq_length)[None]
        steps[name] = step_time(config, vocab_size, plan.world_size, rows, hardware, plan.product_tflops)
    console.print(_time_table(steps, config, vocab_size, plan))
    console.print(
        "Times are predicted from assumed rates, and leave out elementwise work, tensor- and data-parallel traffic and "
        "the optimizer.",
        markup=False,
    )


def _check_rehearsal(plan: PlanConfig) -> None:
    if plan.rank is not None and not 0 <= plan.rank < plan.world_size:
        raise ConfigError(
            f"rank={plan.rank} is not one of the {plan.world_size} ranks: give 0 to {plan.world_size - 1}."
        )
    if plan.rank is not None and not plan.rehearse:
        raise ConfigError(f"rank={plan.rank} is the rank to rehearse: give rehearse=true with it.")
    if plan.rehearse and plan.search:
        raise ConfigError("rehearse=true shows one layout, search=true compares many: give one of them.")
    if plan.out is not None and not plan.search:
        raise ConfigError(f"out={plan.out} is the table of a search: give search=true with it.")


def rehearsed(plan: PlanConfig, config: Config, family: Family) -> None:
    """Prints what rehearsals say.

    Raises:
        ConfigError: the kernels cannot be read, since Triton is not installed.
    """
    if not TRITON:
        raise ConfigError("rehearse=true and search=true read our Triton kernels: pip install triton.")
    from megatron_mm.rehearsal import report, search, stages, step  # only where Triton is installed

    console = Console(soft_wrap=True, highlight=False)
    if plan.search:
        rows = search.rows(Path(plan.out)) if plan.out else None
        found = search.search(
            config, family, plan.world_size, plan, plan.gpu_gigabytes, plan.trials, plan.text_vocab_size
        )
        console.print(report.search_table(found, plan.gpu_gigabytes))
        for row in (search.row(config.run.name, plan.world_size, each) for each in found):
            if rows is not None and row not in rows:
                rows.append(row)
        return
    ranks = stages.stage_ranks(config, plan.world_size)
    if plan.rank is not None:
        ranks = {f"rank {plan.rank}": plan.rank}
    rehearsals = stages.rehearse_ranks(config, plan.world_size, ranks, plan, plan.text_vocab_size)
    console.print(f"{config.run.name}: {_layout(config, plan.world_size)}")
    times = step.step_time(config, family, list(rehearsals.values()), plan)
    for table in report.tables(rehearsals, times, plan.gpu_gigabytes):
        console.print(table)


def _layout(config: Config, world_size: int) -> str:
    parallel, length = config.parallel, config.data.seq_length
    return (
        f"{length:,} tokens a row, {length // parallel.context_parallel_size:,} on each context-parallel rank; "
        f"{world_size} GPUs = tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x data "
        f"{world_size // parallel.model_parallel_size}"
    )


def _parameter_table(counts: ParameterCounts) -> Table:
    table = Table("parameters")
    table.add_column("millions", justify="right")
    for field in fields(counts):
        table.add_row(field.name, f"{getattr(counts, field.name) / 1e6:,.1f}")
    return table


def _memory_table(memory: Memory, plan: PlanConfig) -> Table:
    table = Table("memory of a GPU")
    table.add_column("GB", justify="right")
    for field in fields(memory):
        table.add_row(field.name, f"{getattr(memory, field.name) / 1e9:.2f}")
    verdict = "fits" if memory.total < usable(plan.gpu_gigabytes) else "does not fit"
    table.add_row(f"total ({verdict} {plan.gpu_gigabytes:g} GB)", f"{memory.total / 1e9:.2f}", style="bold")
    return table


def _time_table(steps: dict[str, StepTime], config: Config, vocab_size: int, plan: PlanConfig) -> Table:
    table = Table("a step, by mask", *steps)
    tokens = config.train.global_batch_size * config.data.seq_length

    def mfu(step: StepTime) -> float:
        flops = trunk_flops(config.model.trunk, vocab_size, tokens, int(config.train.global_batch_size * step.pairs))
        return flops / step.total / plan.world_size / PEAK

    lines: dict[str, Callable[[StepTime], str]] = {
        "keys and values travel by": lambda step: step.way,
        "largest area / mean": lambda step: f"{step.imbalance:.3f}",
        "MB received a layer": lambda step: f"{step.received_bytes / 1e6:,.0f}",
        "attention, s": lambda step: f"{step.attention:.2f}",
        "of it, compute in balance": lambda step: f"{step.efficiency:.0%}",
        "products, s": lambda step: f"{step.products:.2f}",
        "step, s": lambda step: f"{step.total:.2f}",
        "tokens/s/GPU": lambda step: f"{tokens / step.total / plan.world_size:,.0f}",
        "MFU": lambda step: f"{mfu(step):.0%}",
    }
    for name, text in lines.items():
        table.add_row(name, *map(text, steps.values()))
    return table


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])

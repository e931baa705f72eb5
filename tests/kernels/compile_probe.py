"""Run by test_span_attention_compiled in a process of its own, where kernels are compiled instead of interpreted: what
the compilers for Hopper and Blackwell make of the default tile sizes and of the small kernels, and whether other
lengths compile anything anew. Prints JSON.
"""

import json

import torch
from mm_kernels.offline import compiling
from mm_kernels.span_attention import launch, merge_fused
from mm_kernels.span_attention.configs import KERNELS, candidates
from mm_kernels.span_attention.resources import compile_kernel, launch_kernel, problem
from mm_kernels.vocab_loss import fused

BF16, FP16 = torch.bfloat16, torch.float16
HOPPER = [(head_dim, BF16, until, 2) for head_dim in (64, 128, 256) for until in (False, True)]
# What differs from capability to capability is the compiler's way to the tensor cores: fewer variants do.
BLACKWELL = [(64, BF16, True, 1), (128, BF16, False, 2), (256, BF16, False, 2)]
GROUPED = [(128, FP16, True, 1)]
CASES = {90: HOPPER + GROUPED, 100: BLACKWELL + GROUPED}


def resources() -> list[dict]:
    rows = []
    for capability, kernel in ((c, k) for c in CASES for k in KERNELS):
        for head_dim, dtype, until, kv_heads in CASES[capability]:
            call = problem(head_dim, dtype, until, kv_heads=kv_heads)
            made = compile_kernel(kernel, call, candidates(kernel, head_dim, 2)[0], capability)
            rows.append(
                {
                    "capability": made.capability,
                    "kernel": f"{kernel}-{head_dim}-{dtype}-{'until' if until else 'plain'}-{2 // kv_heads}",
                    "registers": made.registers,
                    "spill_bytes": made.spill_bytes,
                    "shared_bytes": made.shared_bytes,
                    "fast_products": made.fast_products,
                    "tma_loads": made.count("UTMALDG"),
                }
            )
    return rows


def small_kernels(capability: int) -> list[dict]:
    """What runs beside attention's loops: their preparation, a ring's merge, the vocabulary's loss."""
    call = problem(128, BF16, until=True)
    lse, hidden = torch.zeros(1, 2, 256), torch.zeros(4, 129280, dtype=BF16)
    labels, row = torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    with compiling(capability) as compiled:
        for dlse in (None, lse):
            launch.prepare(call, call.q, lse, call.q, dlse)
        for dtype in (BF16, torch.float32):
            merge_fused.merge_(torch.zeros(call.q.shape), lse, call.q.to(dtype), lse)
            fused.row_statistics(hidden.to(dtype), labels, 0, 129280)
            fused.logit_gradient_(hidden.to(dtype), labels, row, row, row, 0, 129280)
    return [{"capability": made.capability, "kernel": made.name, "spill_bytes": made.spill_bytes} for made in compiled]


def kernels_compiled_for(shapes) -> int:
    """How many different kernels all (batch, length, heads, groups) together compile."""
    with compiling() as compiled:
        for batch, length, heads, groups in shapes:
            q = torch.zeros(batch, length, heads, 64, dtype=torch.bfloat16)
            kv = torch.zeros(batch, length, groups, 64, dtype=torch.bfloat16)
            mask = torch.zeros(batch, 3, length, dtype=torch.int32)
            call = launch.Problem(q, kv, kv, mask[:, :2], mask[:, 2], 0.125)
            launch.prepare(call, q, torch.zeros(batch, heads, length), q, None)
            for kernel in KERNELS:
                launch_kernel(kernel, call, candidates(kernel, 64, 2)[0])
    return len({id(made.kernel) for made in compiled})


if __name__ == "__main__":
    lengths = [(batch, length, 4, 4) for batch in (1, 2) for length in (1, 16, 17, 128, 1000, 4096)]
    print(
        json.dumps(
            {
                "resources": resources(),
                "small": [row for capability in CASES for row in small_kernels(capability)],
                "lengths": kernels_compiled_for(lengths),
                "heads": kernels_compiled_for([(1, 128, 4, 4), (1, 128, 16, 16), (1, 128, 1, 1)]),
                "groups": kernels_compiled_for([(1, 128, 4, 4), (1, 128, 4, 2)]),
            }
        )
    )

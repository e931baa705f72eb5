"""Run by test_span_attention_compiled in a process of its own, where kernels are compiled instead of interpreted: what
the compiler for Hopper makes of the default tile sizes, and whether other lengths compile anything anew. Prints JSON.
"""

import json

import torch
from mm_kernels.offline import compiling
from mm_kernels.span_attention import launch
from mm_kernels.span_attention.configs import KERNELS, candidates
from mm_kernels.span_attention.resources import compile_kernel, launch_kernel, problem


def resources() -> list[dict]:
    rows = []
    for kernel in KERNELS:
        for head_dim in (64, 128, 256):
            for until in (False, True):
                call = problem(head_dim, torch.bfloat16, until)
                made = compile_kernel(kernel, call, candidates(kernel, head_dim, 2)[0])
                rows.append(
                    {
                        "kernel": f"{kernel}-{head_dim}-{'until' if until else 'plain'}",
                        "spill_bytes": made.spill_bytes,
                        "shared_bytes": made.shared_bytes,
                        "hgmma": made.count("HGMMA"),
                        "tma_loads": made.count("UTMALDG"),
                    }
                )
    return rows


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
                "lengths": kernels_compiled_for(lengths),
                "heads": kernels_compiled_for([(1, 128, 4, 4), (1, 128, 16, 16), (1, 128, 1, 1)]),
                "groups": kernels_compiled_for([(1, 128, 4, 4), (1, 128, 4, 2)]),
            }
        )
    )

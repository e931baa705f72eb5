"""Which group an operation belongs to, by the names around it, innermost first; CUDA's are written down here."""

import pytest

from megatron_mm.benchmark.profiling import ATTENTION, BACKWARD, FORWARD, LOSS, group_of


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["mm_kernels::span_attention", ATTENTION, FORWARD], "attention"),
        (["mm_kernels::span_attention_backward", f"{BACKWARD}: mm_kernels_span_attentionBackward"], "attention"),
        (["aten::bmm", ATTENTION, FORWARD], "attention"),
        (["aten::_scaled_dot_product_flash_attention_backward", f"{BACKWARD}: X"], "attention"),
        (["triton_tem_fused_flex_attention_backward_1", "CompiledFunctionBackward", f"{BACKWARD}: Y"], "attention"),
        (["aten::mm", "aten::matmul", "aten::linear", FORWARD], "matmul"),
        (["aten::mm", "LinearWithGradAccumulationAndAsyncCommunicationBackward", f"{BACKWARD}: Z"], "matmul"),
        (["aten::mm", "LinearCrossEntropy", LOSS, FORWARD], "loss"),
        (["aten::mm", "LinearCrossEntropyBackward", f"{BACKWARD}: LinearCrossEntropyBackward"], "loss"),
        (["aten::_fused_rms_norm", "aten::rms_norm", FORWARD], "norm + elementwise"),
        (["triton_poi_fused_add_mul_0", "CompiledFunction", FORWARD], "norm + elementwise"),
        (
            ["aten::add_", "torch::autograd::AccumulateGrad", f"{BACKWARD}: torch::autograd::AccumulateGrad"],
            "optimizer",
        ),
        (["aten::_fused_adamw_"], "optimizer"),
    ],
)
def test_groups(names, group):
    assert group_of(names) == group

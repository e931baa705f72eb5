"""What starting a run loads, and that functions are compiled all the same where they are called."""

import subprocess
import sys

import pytest
import torch

from megatron_mm.parallel.compile_later import compiling_later

SLOW = ("torch._dynamo", "torch._inductor", "matplotlib", "transformers", "sklearn", "diffusers", "wandb")


@pytest.mark.parametrize("first", ["megatron_mm.train", "megatron_mm.sampling.model"])
def test_nothing_slow_is_imported_that_a_start_does_not_need(first):
    code = f"""
import sys, {first}
print([name for name in {SLOW} if name in sys.modules])
from megatron.core.fusions.fused_bias_swiglu import swiglu
print(swiglu.__code__.co_filename)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, compiles = done.stdout.split("\n")[:2]
    assert imported == "[]" and compiles.endswith("compile_later.py"), "compiled once it is called"


def test_functions_are_compiled_when_they_are_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append((function, options)) or function)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    outside = torch.compile
    with compiling_later():
        plain = torch.compile(abs)
        with_options = torch.compile(dynamic=False)(abs)
    assert torch.compile is outside and not compiled
    assert plain(-1) == plain(-2) - 1 == 1 and compiled == [(abs, {})], "once"
    assert with_options(-1) == 1 and compiled[1:] == [(abs, {"dynamic": False})]


def test_nothing_is_compiled_where_the_compiler_is_off(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with compiling_later():
        assert torch.compile(abs)(-1) == 1

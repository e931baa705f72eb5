"""Messages between the ranks of a group, several at once, none of them waited for by the host on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Messages:
    """Messages under way; what is sent lives as long as this does."""

    work: list
    sent: list[torch.Tensor]
    buffer: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The buffer, once all has arrived and left (on CUDA: the stream waits, the host does not)."""
        for work in self.work:
            work.wait()
        return self.buffer


def post(
    sends: Mapping[int, torch.Tensor], receives: Mapping[int, int], like: torch.Tensor, group: dist.ProcessGroup
) -> Messages:
    """Starts all messages of a step; the buffer holds what arrives, peer after peer, as rows of `like`."""
    buffer = like.new_empty((sum(receives.values()), *like.shape[1:]))
    messages = [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer, tensor in sends.items()]
    places = buffer.split(list(receives.values()))
    messages += [
        dist.P2POp(dist.irecv, place, group=group, group_peer=peer)
        for peer, place in zip(receives, places, strict=True)
    ]
    work = dist.batch_isend_irecv(messages) if messages else []
    return Messages(work, list(sends.values()), buffer)

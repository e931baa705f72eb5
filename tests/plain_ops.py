"""`ParallelOps` on one device in plain torch: what the families' fronts and backs are tested with."""

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.types import IGNORE


class PlainOps:
    def vocab_embedding(self, vocab_size, hidden_size):
        return nn.Embedding(vocab_size, hidden_size)

    def vocab_head(self, hidden_size, vocab_size, bias=False):
        return PlainHead(hidden_size, vocab_size, bias=bias)

    def gather_logits(self, logits):
        return logits


class PlainHead(nn.Linear):
    def cross_entropy(self, hidden, labels):
        logits = self(hidden)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORE)
        log_z = torch.where(labels != IGNORE, logits.logsumexp(-1), 0.0)
        return loss.view_as(labels), log_z

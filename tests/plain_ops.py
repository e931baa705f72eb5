"""`ParallelOps` on one device in plain torch and transformers: what the families' fronts and backs are tested with."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from megatron_mm.families.base import FurtherLayers
from megatron_mm.types import IGNORE


class PlainOps:
    def vocab_embedding(self, vocab_size, hidden_size):
        return nn.Embedding(vocab_size, hidden_size)

    def vocab_head(self, hidden_size, vocab_size, bias=False):
        return PlainHead(hidden_size, vocab_size, bias=bias)

    def modulated_layers(self, layers, frequencies):
        return PlainModulatedLayers(layers, frequencies)

    def gather_logits(self, logits):
        return logits


def with_further(back, hidden, batch):
    """Hidden states as a back reads them: with what layers of its own make of them, where it has some."""
    if not isinstance(back, FurtherLayers):
        return hidden
    return torch.cat([hidden, back.further(hidden, batch, SimpleNamespace(meta=batch.meta))], -1)


class PlainHead(nn.Linear):
    def cross_entropy(self, hidden, labels):
        logits = self(hidden)
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORE)
        log_z = torch.where(labels != IGNORE, logits.logsumexp(-1), 0.0)
        return loss.view_as(labels), log_z


class PlainModulatedLayers(nn.Module):
    """Qwen3's layers, whose blocks these are, between the modulations of the official code of Show-o2."""

    def __init__(self, layers, frequencies):
        super().__init__()
        config = Qwen3Config(
            hidden_size=layers.hidden_size,
            num_attention_heads=layers.num_attention_heads,
            num_key_value_heads=layers.kv_heads,
            head_dim=layers.head_dim,
            intermediate_size=layers.ffn_size,
            rms_norm_eps=layers.layernorm_epsilon,
            attn_implementation="sdpa",
        )
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, number) for number in range(layers.num_layers))
        self.modulations = nn.ModuleList(nn.Linear(layers.hidden_size, 6 * layers.hidden_size) for _ in self.layers)
        self.frequencies = frequencies
        for layer in self.layers:  # torch's norms, since transformers' round to fp32
            layer.input_layernorm = nn.RMSNorm(layers.hidden_size, layers.layernorm_epsilon)
            layer.post_attention_layernorm = nn.RMSNorm(layers.hidden_size, layers.layernorm_epsilon)
            layer.self_attn.q_norm, layer.self_attn.k_norm = (nn.RMSNorm(layers.head_dim, 1e-6) for _ in range(2))

    def forward(self, x, conditions, attended):
        lo, hi, until = attended.meta[:, :3, :, None].unbind(1)
        place = torch.arange(x.shape[1], device=x.device)
        allowed = ((lo <= place) & (place < hi) & (place[:, None] < until.mT))[:, None]
        mask = torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)
        angles = attended.meta[:, 3, :, None].double() * self.frequencies(x.device)
        places = tuple(torch.cat([turn, turn], -1).to(x.dtype) for turn in (angles.cos(), angles.sin()))
        padding = ~allowed.any(-1)[:, 0, :, None]
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            every = modulation(F.silu(conditions.vectors))[conditions.number]
            there = conditions.present[conditions.number][..., None]
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = every.chunk(6, -1)
            normed = torch.where(there, layer.input_layernorm(x) * (1 + scale) + shift, layer.input_layernorm(x))
            out, _ = layer.self_attn(normed, position_embeddings=places, attention_mask=mask)
            out = out.masked_fill(padding, 0.0)  # what sees nothing gets nothing
            x = x + torch.where(there, gate * out, out)
            normed = layer.post_attention_layernorm(x)
            out = layer.mlp(torch.where(there, normed * (1 + mlp_scale) + mlp_shift, normed))
            x = x + torch.where(there, mlp_gate * out, out)
        return x

"""A Transfusion in plain torch, of any size: what a step costs without an engine around it.

It has the engine's weights under the engine's own names and computes the same losses: attention is torch's with the
mask written out [B, 1, S, S], and nothing is sharded, packed by intervals or spread. Dropout, grouped keys, experts and
the U-Net codec are left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config.compose import Config, ConfigError
from megatron_mm.config.model import TransfusionConfig, TrunkConfig
from megatron_mm.nn.patch import LinearPatchIn, LinearPatchOut
from megatron_mm.parallel.ops import padded_vocab_size
from megatron_mm.types import IGNORE, PackedBatch


class PlainTransfusion(nn.Module):
    """A PackedBatch -> sums of both losses, (text, image)."""

    def __init__(self, config: TransfusionConfig, vocab_size: int) -> None:
        super().__init__()
        trunk = config.trunk
        patch_dim = config.image.channels * config.patch_size**2
        self.trunk, self.vocab_size = trunk, vocab_size
        self.embedding = nn.Embedding(padded_vocab_size(vocab_size), trunk.hidden_size)
        self.patch_in = LinearPatchIn(patch_dim, trunk.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(trunk) for _ in range(trunk.num_layers))
        self.norm = nn.RMSNorm(trunk.hidden_size, eps=trunk.layernorm_epsilon)
        self.head = nn.Linear(trunk.hidden_size, padded_vocab_size(vocab_size), bias=False)
        self.patch_out = LinearPatchOut(trunk.hidden_size, patch_dim)

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        patch = batch.fields["timestep"] >= 0
        x = self.patch_in(batch.fields["patches"], batch.fields["timestep"], batch.images)
        x = torch.where(patch[..., None], x, self.embedding(batch.tokens))
        allowed, angles = _dense_mask(batch), self._angles(batch.meta[:, 3])
        for layer in self.layers:
            x = layer(x, allowed, angles.cos(), angles.sin())
        x = self.norm(x)
        logits = self.head(x)[..., : self.vocab_size].flatten(0, 1)
        text = F.cross_entropy(logits, batch.fields["labels"].flatten(), ignore_index=IGNORE, reduction="sum")
        error = (self.patch_out(x, batch.images) - batch.fields["noise"]).square().mean(-1)
        return text, (error * patch).sum()

    def load_engine(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes the parameters of a `StageModel` that holds the whole model."""
        self.load_state_dict({_plain_name(name): weight for name, weight in weights.items()})

    def _angles(self, positions: torch.Tensor) -> torch.Tensor:
        """RoPE's, [B, 1, S, head_dim / 2]."""
        exponents = torch.arange(0, self.trunk.head_dim, 2, dtype=torch.float64) / self.trunk.head_dim
        return positions[:, None, :, None] * (self.trunk.rotary_base**-exponents).float()


class PlainLayer(nn.Module):
    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        hidden, ffn = trunk.hidden_size, trunk.ffn_size
        self.heads = trunk.num_attention_heads
        self.norm1, self.norm2 = (nn.RMSNorm(hidden, eps=trunk.layernorm_epsilon) for _ in range(2))
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.fc1, self.fc2 = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        out = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, attn_mask=allowed)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        gate, up = self.fc1(self.norm2(x)).chunk(2, -1)
        return x + self.fc2(F.silu(gate) * up)


class PlainTrainer:
    """AdamW with warm-up, cosine decay and clipping, as the run's configuration says, in fp32."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        if problem := _unlike(config):
            raise ConfigError(f"The plain model has no {problem}.")
        optim = config.optim
        self.model = PlainTransfusion(config.model, vocab_size)
        self._weights = (1.0, config.model.ddpm_weight)
        self._clip = optim.clip_grad
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        warmup, decay = optim.lr_warmup_iters, optim.lr_decay_iters or config.train.train_iters
        floor = optim.min_lr / optim.lr

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            done = min((step - warmup) / (decay - warmup), 1.0)
            return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, factor)

    def step(self, batches: list[PackedBatch]) -> tuple[float, float]:
        """(loss, norm of the gradients) of one optimizer step over micro-batches."""
        self._optimizer.zero_grad()
        counts = [
            max(sum(int((batch.fields[name] != fill).sum()) for batch in batches), 1)
            for name, fill in (("labels", IGNORE), ("timestep", -1))
        ]
        total = torch.zeros(())
        for batch in batches:
            sums = self.model(batch)
            loss = sum(w * s / c for w, s, c in zip(self._weights, sums, counts, strict=True))
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._schedule.step()
        return total.item(), norm.item()


def _dense_mask(batch: PackedBatch) -> torch.Tensor:
    """bool [B, 1, S, S]; a padding position sees itself, since a softmax over nothing is NaN."""
    lo, hi = batch.mask[:, :2, :, None].unbind(1)
    key = torch.arange(lo.shape[1])
    return ((lo <= key) & (key < hi) | ((lo >= hi) & (key == key[:, None])))[:, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _plain_name(name: str) -> str:
    """Of a parameter of the engine's model."""
    for ours, plain in _NAMES.items():
        name = name.replace(ours, plain)
    return name


_NAMES = {
    "front.": "",
    "back.": "",
    "decoder.final_layernorm": "norm",
    "decoder.": "",
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "proj",
    "mlp.linear_": "",
    "input_layernorm": "norm1",
    "pre_mlp_layernorm": "norm2",
}


def _unlike(config: Config) -> str | None:
    """What the configuration asks for that is not here."""
    model, trunk = config.model, config.model.trunk
    absent = {
        f"model.family={model.family}, only transfusion": not isinstance(model, TransfusionConfig),
        "model.patch_codec=unet": getattr(model, "patch_codec", "linear") != "linear",
        "model.trunk.num_query_groups": trunk.kv_heads != trunk.num_attention_heads,
        "model.trunk.qk_layernorm": trunk.qk_layernorm,
        "model.trunk.norm_placement=swin": trunk.norm_placement != "pre",
        "model.trunk.hidden_dropout": trunk.hidden_dropout > 0.0,
        "model.trunk.normalization=LayerNorm": trunk.normalization != "RMSNorm",
        "model.trunk.activation=gelu": trunk.activation != "swiglu",
        "model.trunk.parallel_block": trunk.parallel_block,
        "model.trunk.num_experts": trunk.num_experts is not None,
        "biases": trunk.add_bias_linear or trunk.add_qkv_bias or trunk.head_bias,
        "model.trunk.rotary_percent": trunk.rotary_percent != 1.0,
        "lora.rank": config.lora.rank > 0,
        "optim.trainable, frozen or lr_multipliers": bool(
            config.optim.trainable or config.optim.frozen or config.optim.lr_multipliers
        ),
        f"optim.lr_decay_style={config.optim.lr_decay_style}": config.optim.lr_decay_style != "cosine",
        f"train.precision={config.train.precision}": config.train.precision != "fp32",
    }
    return next((what for what, asked in absent.items() if asked), None)

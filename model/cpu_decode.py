"""A decoding step of a small model on a CPU, where calls cost more than arithmetic: the fast twin of decode.Step.

For one rollout the decoder layers are copied with their adapters merged, what shares an input fused into one product
(q, k and v; gate and up), and the norms' weights folded into the products behind them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu
from model.linear import adapter_of
from model.rope import mrope_tables

MOST_COPIES = 1 << 20  # numbers of a layer's keys; so few are copied to every row, for calls cost more than reading
MOST_WEIGHTS = 50_000_000  # 200 MB in float32: a larger model spends its time in its weights, and would not copy them


def pays(model) -> bool:
    weights = sum(p.numel() for p in model.model.layers.parameters())
    return cpu.handles(model.head_weight) and weights <= MOST_WEIGHTS


def fused(norm, *linears) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of linears on the same input, which is norm's output without its weight (None: no norm)."""
    weights = []
    for linear in linears:
        A, B, scale, _ = adapter_of(linear) or (None, None, 0.0, 0.0)
        weights.append(linear.weight if A is None else torch.addmm(linear.weight, B, A, alpha=scale))
    weight = torch.cat(weights)
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    return (weight if norm is None else weight * norm.weight), bias


class RowCache:
    """Of few rows whose prompts are of one length: the prompt's keys and values stand before each row's own, so that a
    step's attention is two products and a softmax. Its twin is GroupCache.step."""

    def __init__(self, cache, steps: int):
        self.group, self.P = cache, cache.lengths[0]
        self.layers = [[self.widen(x, steps) for x in pair] for pair in zip(cache.prompt_k, cache.prompt_v)]

    def widen(self, prompt: Tensor, steps: int) -> Tensor:
        """(N, K, P, D) -> (N*G*K, P + steps, D)"""
        rows = prompt.repeat_interleave(self.group.G, 0).flatten(0, 1)
        return F.pad(rows, (0, 0, 0, steps))

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (R, H, D); k, v: (R, K, D) -> (R, H, D)"""
        (R, H, D), K, now = q.shape, k.shape[1], self.P + self.group.used
        keys, values = self.layers[layer]
        keys[:, now] = k.reshape(R * K, D)
        values[:, now] = v.reshape(R * K, D)
        q = q.reshape(R * K, H // K, D)
        scores = torch.bmm(q.mul(D**-0.5), keys[:, : now + 1].transpose(1, 2))  # (R*K, H/K, now)
        return torch.bmm(scores.softmax(-1), values[:, : now + 1]).view(R, H, D)


class FusedStep:
    """ids (R,), their number t in the rollout -> logits (R, V). For one rollout, for the weights are copied."""

    def __init__(self, model, cache, position: Tensor, steps: int):
        """position: (R,) of each row's first token; steps: how many there will be at most."""
        self.config, self.position = model.config, position
        self.embedding, self.eps = model.model.embed_tokens.weight, model.config.rms_norm_eps
        self.layers = []
        for layer in model.model.layers:
            if model.partition:
                model.partition.fetch(layer)
            at, mlp = layer.self_attn, layer.mlp
            qkv = fused(layer.input_layernorm, at.q_proj, at.k_proj, at.v_proj)
            gate_up, _ = fused(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
            self.layers.append((*qkv, fused(None, at.o_proj)[0], gate_up, fused(None, mlp.down_proj)[0]))
        self.head = model.head_weight * model.model.norm.weight
        cells = len(position) * (max(cache.lengths) + steps) * cache.K * cache.D
        small = len(set(cache.lengths)) == 1 and cells <= MOST_COPIES
        self.attend = RowCache(cache, steps).step if small else cache.step
        every = torch.arange(int(position.max()) + steps)
        self.cos, self.sin = mrope_tables(every.expand(3, -1), model.config, self.head.dtype)

    def __call__(self, ids: Tensor, t: int) -> Tensor:
        H, K, D, R = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim, len(ids)
        x = F.embedding(ids, self.embedding)  # (R, C)
        tables = [table.index_select(0, self.position + t) for table in (self.cos, self.sin)]
        for number, (qkv, bias, o, gate_up, down) in enumerate(self.layers):
            heads = cpu.product(self.norm(x), qkv, bias).view(R, H + 2 * K, D)
            qk = cpu.turn(heads[:, : H + K], *tables, 1.0)
            out = self.attend(number, qk[:, :H], qk[:, H:], heads[:, H + K :])
            x = cpu.add_product(x, out.view(R, H * D), o)
            gate, up = cpu.product(self.norm(x), gate_up).chunk(2, dim=1)
            x = cpu.add_product(x, F.silu(gate).mul_(up), down)
        return cpu.product(self.norm(x), self.head)

    def norm(self, x: Tensor) -> Tensor:
        return x * cpu.inverse_rms(x, self.eps)

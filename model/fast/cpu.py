"""Decoding of a small model on a CPU, where calls cost more than arithmetic.

For one rollout the decoder layers are copied with their adapters merged, what shares an input fused into one product
(q, k and v; gate and up), and the norms' weights folded into the products behind them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import Weights, weights_of
from model.decode import Decoder, PlainDecoder
from model.fast.portable import CPU_FLOAT32, inverse_rms
from model.quantized import Quantized
from model.rope import mrope_tables

MOST_COPIES = 1 << 20  # numbers of a layer's keys; so few are copied to every row, for calls cost more than reading
MOST_WEIGHTS = 50_000_000  # 200 MB in float32: a larger model spends its time in its weights, and would not copy them


def make_decoder(model, prompts, sampling, G: int, generator) -> Decoder:
    """CpuDecoder for a small model, else the plain one; and for fp8, where each product rounds its own input."""
    weights = sum(w.weight.numel() for layer in model.model.layers for w in linears_of(layer))
    decoder = CpuDecoder if weights <= MOST_WEIGHTS and model.base_dtype != "fp8" else PlainDecoder
    return decoder(model, prompts, sampling, G, generator)


def linears_of(layer) -> list[Weights]:
    """q, k, v, o, gate, up and down of a decoder layer."""
    return weights_of(layer, *layer.self_attn.values(), *layer.mlp.values())


def fused(norm: Tensor | None, *layers: Weights) -> Tensor:
    """The weight of layers on the same input, which is the norm's output without its weight (None: no norm)."""
    merged = []
    for w in layers:
        weight = w.weight.dequantise(w.weight.dtype) if isinstance(w.weight, Quantized) else w.weight
        merged.append(weight if w.A is None else torch.addmm(weight, w.B, w.A, alpha=w.scale))
    return torch.cat(merged) if norm is None else torch.cat(merged) * norm


class RowCache:
    """Of few rows whose prompts are of one length: the prompt's keys and values stand before each row's own, so that a
    step's attention is two products and a softmax. GroupCache.step is the general case."""

    def __init__(self, cache, steps: int):
        self.group, self.P = cache, cache.lengths[0]
        rows = lambda prompt: prompt.repeat_interleave(cache.G, 0).flatten(0, 1)  # (N, K, P, D) -> (R*K, P, D)
        longer = lambda prompt: F.pad(rows(prompt), (0, 0, 0, steps))
        self.layers = [(longer(k), longer(v)) for k, v in zip(cache.prompt_k, cache.prompt_v)]

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (R, H, D); k, v: (R, K, D) -> (R, H, D)"""
        (R, H, D), K, now = q.shape, k.shape[1], self.P + self.group.used
        keys, values = self.layers[layer]
        keys[:, now] = k.reshape(R * K, D)
        values[:, now] = v.reshape(R * K, D)
        q = q.reshape(R * K, H // K, D)
        scores = torch.bmm(q.mul(D**-0.5), keys[:, : now + 1].transpose(1, 2))  # (R*K, H/K, now)
        return torch.bmm(scores.softmax(-1), values[:, : now + 1]).view(R, H, D)


class CpuDecoder(PlainDecoder):
    """PlainDecoder with fused weights, which are copied for this one rollout."""

    def __init__(self, model, prompts, sampling, G: int, generator):
        super().__init__(model, prompts, sampling, G, generator)
        self.config, self.eps = model.config, model.config.rms_norm_eps
        self.embedding, self.rotate = model.model.embed_tokens.weight, model.ops.rotate
        self.layers = [self.fuse_layer(layer) for layer in model.model.layers]
        self.head = model.head_weight * model.model.norm.weight
        steps, cache = sampling.max_new_tokens, self.cache
        cells = len(self.position) * (max(cache.lengths) + steps) * cache.K * cache.D
        is_small = len(set(cache.lengths)) == 1 and cells <= MOST_COPIES
        self.attend = RowCache(cache, steps).step if is_small else cache.step
        every = torch.arange(int(self.position.max()) + steps)
        self.cos, self.sin = mrope_tables(every.expand(3, -1), model.config, self.head.dtype)

    def fuse_layer(self, layer) -> tuple:
        """(qkv, its bias, o, gate_up, down)"""
        q, k, v, o, gate, up, down = linears_of(layer)
        qkv = fused(layer.input_layernorm.weight, q, k, v)
        gate_up = fused(layer.post_attention_layernorm.weight, gate, up)
        return qkv, torch.cat([q.bias, k.bias, v.bias]), fused(None, o), gate_up, fused(None, down)

    def step(self, ids: Tensor, t: int) -> Tensor:
        """ids (R,) -> logits (R, V)"""
        H, K, D, R = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim, len(ids)
        x = F.embedding(ids, self.embedding)  # (R, C)
        tables = [table.index_select(0, self.position + t) for table in (self.cos, self.sin)]
        for number, (qkv, bias, o, gate_up, down) in enumerate(self.layers):
            heads = F.linear(self.unit(x), qkv, bias).view(R, H + 2 * K, D)
            qk = self.rotate(heads[:, : H + K], tables)
            out = self.attend(number, qk[:, :H], qk[:, H:], heads[:, H + K :])
            x.addmm_(out.view(R, H * D), o.T)
            gate, up = F.linear(self.unit(x), gate_up).chunk(2, dim=1)
            x.addmm_(F.silu(gate).mul_(up), down.T)
        return F.linear(self.unit(x), self.head)

    def unit(self, x: Tensor) -> Tensor:
        """x / rms(x): the norm's weight is in the product behind it."""
        return x * inverse_rms(x, self.eps)


FORMS = dict(CPU_FLOAT32, decoder=make_decoder)

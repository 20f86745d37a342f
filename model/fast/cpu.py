"""What pays on a CPU, where calls and passes over memory cost more than arithmetic: norm and SwiGLU in few passes, and
decoding of a small model with fused weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import Weights, weights_of
from model.decode import PlainDecoder
from model.fast import portable
from model.quantized import Quantized
from model.rope import mrope_tables

MOST_WEIGHTS = 50_000_000  # 200 MB in float32: a larger model spends its time in its weights, and would not copy them


class RMSNorm(torch.autograd.Function):
    """F.rms_norm in float32, which torch differentiates on a CPU as eight steps."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        r = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        unit = x * r
        d_weight = (g * unit).sum(0) if ctx.needs_input_grad[1] else None
        g = g * weight
        along = torch.linalg.vecdot(g, unit).div_(-x.shape[-1])[:, None]
        return g.addcmul_(unit, along).mul_(r), d_weight, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row, (T, 1)"""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; only gate and up are kept."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(g)
        return torch.ops.aten.silu_backward(g * up, gate), d_up


def make_decoder(model, prompts, sampling, G: int, generator) -> PlainDecoder:
    """CpuDecoder for a small model, else the plain one; and for fp8, where each product rounds its own input."""
    weights = model.config.num_hidden_layers * 3 * model.config.hidden_size * model.config.intermediate_size  # most
    decoder = CpuDecoder if weights <= MOST_WEIGHTS and model.base_dtype != "fp8" else PlainDecoder
    return decoder(model, prompts, sampling, G, generator)


def fused(norm: Tensor | None, *layers: Weights) -> Tensor:
    """The weight of layers on the same input, adapters merged; behind a norm that leaves out its own weight."""
    merged = []
    for w in layers:
        weight = w.weight.dequantise(w.weight.dtype) if isinstance(w.weight, Quantized) else w.weight
        merged.append(weight if w.A is None else torch.addmm(weight, w.B, w.A, alpha=w.scale))
    return torch.cat(merged) if norm is None else torch.cat(merged) * norm


class CpuDecoder(PlainDecoder):
    """PlainDecoder with weights copied for this one rollout: adapters merged, what shares an input fused into one
    product (q, k and v; gate and up), the norms' weights folded into the products behind them."""

    def __init__(self, model, prompts, sampling, G: int, generator):
        super().__init__(model, prompts, sampling, G, generator)
        self.layers = []
        for layer in model.model.layers:
            q, k, v, o, gate, up, down = weights_of(layer, *layer.self_attn.values(), *layer.mlp.values())
            qkv, bias = fused(layer.input_layernorm.weight, q, k, v), torch.cat([q.bias, k.bias, v.bias])
            gate_up = fused(layer.post_attention_layernorm.weight, gate, up)
            self.layers.append((qkv, bias, fused(None, o), gate_up, fused(None, down)))
        self.head = fused(model.model.norm.weight, Weights(model.head_weight, None))
        every = torch.arange(int(self.position.max()) + sampling.max_new_tokens)
        self.tables = mrope_tables(every.expand(3, -1), model.config, self.head.dtype)

    def step(self, ids: Tensor, t: int) -> Tensor:
        """ids (R,) -> logits (R, V)"""
        c, R = self.model.config, len(ids)
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        x = F.embedding(ids, self.model.model.embed_tokens.weight)  # (R, C)
        tables = [table.index_select(0, self.position + t) for table in self.tables]
        for number, (qkv, bias, o, gate_up, down) in enumerate(self.layers):
            heads = F.linear(self.unit(x), qkv, bias).view(R, H + 2 * K, D)
            qk = self.model.ops.rotate(heads[:, : H + K], tables)
            out = self.cache.step(number, qk[:, :H], qk[:, H:], heads[:, H + K :])
            x.addmm_(out.view(R, H * D), o.T)
            gate, up = F.linear(self.unit(x), gate_up).chunk(2, dim=1)
            x.addmm_(F.silu(gate).mul_(up), down.T)
        return F.linear(self.unit(x), self.head)

    def unit(self, x: Tensor) -> Tensor:
        """x / rms(x): the norm's weight is in the product behind it."""
        return x * inverse_rms(x, self.model.config.rms_norm_eps)


FORMS = dict(portable.FORMS, norm=RMSNorm.apply, swiglu=SwiGLU.apply, trim_last_layer=True, decoder=make_decoder)

"""The language model: Qwen2.5's decoder layers over packed tokens.

A layer does not know whether it trains, prefills or decodes: it hands its queries, keys and values to `attention`, a
function (layer number, q, k, v) -> out. Training passes packed attention over segments; decoding passes one that also
writes and reads a cache (decode.py). Positions reach it as rotary tables. So all paths share these lines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import cpu
from model.attention import attend
from model.kernels import swiglu
from model.linear import project
from model.rope import rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich, 2019; arXiv 1910.07467), computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if cpu.handles(x):
            return cpu.RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020; arXiv 2002.05202). The vision tower's has biases, the language model's has none."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj, pad=True)
        return project(swiglu(gate, up), self.down_proj)[0]


class Attention(nn.Module):
    def __init__(self, config, number: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.H, self.K, self.D, self.number = config.num_attention_heads, config.num_key_value_heads, D, number
        self.q_proj = nn.Linear(C, self.H * D, bias=True)
        self.k_proj = nn.Linear(C, self.K * D, bias=True)
        self.v_proj = nn.Linear(C, self.K * D, bias=True)
        self.o_proj = nn.Linear(self.H * D, C, bias=False)

    def forward(self, x: Tensor, tables, attention, rows: Tensor | None = None) -> Tensor:
        """rows: the tokens that ask, (n,); None = all. (T, C) -> (n, C)"""
        if rows is None:
            q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        else:
            k, v = project(x, self.k_proj, self.v_proj)
            (q,) = project(x.index_select(0, rows), self.q_proj)
        k = rotate(k.view(-1, self.K, self.D), tables)
        q = rotate(q.view(-1, self.H, self.D), tables if rows is None else [table[rows] for table in tables])
        out = attention(self.number, q, k, v.view(-1, self.K, self.D))
        return project(out.reshape(-1, self.H * self.D), self.o_proj)[0]


class DecoderLayer(nn.Module):
    def __init__(self, config, number: int):
        super().__init__()
        self.self_attn = Attention(config, number)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, tables, attention, rows: Tensor | None = None) -> Tensor:
        """(T, C), or with rows (n,), the tokens whose result is wanted: (n, C)"""
        inner = self.self_attn(self.input_layernorm(x), tables, attention, rows)
        x = (x if rows is None else x.index_select(0, rows)) + inner
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    """Embedding, decoder layers, final norm. The head is the model's business (it may be the embedding itself)."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def through(self, x: Tensor, tables, segments, recompute: bool, attention=None, asking=None) -> Tensor:
        """(T, C) through the layers. segments: [Segments], one for all of them, or with asking, the tokens (n,) that
        the last layer computes, that one's behind it (Segments.tails); then (n, C) comes out. attention replaces packed
        attention. recompute: keep only each layer's input for the backward pass."""
        last = len(self.layers) - 1
        attention = attention or (lambda layer, q, k, v: attend(q, k, v, segments[-1 if layer == last else 0]))
        for number, layer in enumerate(self.layers):
            args = x, tables, attention, asking if number == last else None
            x = recomputed(layer, *args) if recompute else layer(*args)
        return x


def recomputed(block, *args):
    """block(*args) of which only the arguments are kept; what lies between is computed again in the backward pass."""
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=draws(block))


def draws(block) -> bool:
    """Whether the block draws random numbers, which must be the same again: saving their state costs the host time."""
    return block.training and any(getattr(module, "dropout", 0.0) for module in block.modules())

"""Fast forms in float32 on a CPU: few passes over memory and few calls. The tiny model lives here.

Products of many rows go to oneDNN: MKL, which torch would call, has no AVX-512 kernels for AMD and takes 2.2 times as
long there.

A decoding step of a small model on a CPU, where calls cost more than arithmetic (CpuDecoder): for one rollout the
decoder layers are copied with their adapters merged, what shares an input fused into one product (q, k and v; gate and
up), and the norms' weights folded into the products behind them.
"""

import os
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import adapter_of
from model.decode import PlainDecoder
from model.fast import portable
from model.fast.portable import flat_arguments, stack
from model.packed import normalise_patches
from model.rope import mrope_tables

# oneDNN reads it at its first product. A step of the tiny model has some 50 shapes; with room for fewer than there
# are, oneDNN makes the code of each again in every step, 0.2 ms a product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
ONEDNN = torch.backends.mkldnn.is_available()
LARGE = 1 << 22  # multiplications; of a smaller product, oneDNN's start and the code it makes are the larger part
PIECE, LEAST = 1024, 128  # rows of a piece of the loss: at most, and at least but for the last
CPU_PATCHES = 128  # patches at a time; as float32 0.6 MB, which stays in a core's cache
MOST_COPIES = 1 << 20  # numbers of a layer's keys; so few are copied to every row, for calls cost more than reading
MOST_WEIGHTS = 50_000_000  # 200 MB in float32: a larger model spends its time in its weights, and would not copy them


# -- Products


def large(x: Tensor, weight: Tensor) -> bool:
    return ONEDNN and x.numel() * len(weight) >= LARGE


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without autograd: x (T, in), weight (out, in), bias (out,) -> (T, out)."""
    if large(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x weight^T; y is overwritten or not."""
    if large(x, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return y.addmm_(x, weight.T)


def linear(x: Tensor, *layers, pad: bool = False) -> tuple[Tensor, ...]:
    """`linear` of qwen.py: adapters merged into the weights where that pays, else `portable.project`."""
    adapters = [adapter_of(layer) for layer in layers]
    dropped = any(a is not None and a[3] > 0 for a in adapters)
    if not dropped and all(pays_to_merge(x, m, a) for m, a in zip(layers, adapters)):
        return Merged.apply(x, *flat_arguments(layers, adapters))
    return portable.project(x, *layers)


def pays_to_merge(x: Tensor, layer, adapter) -> bool:
    """W + s B A is made once a pass and spares tokens the slim products beside W: not where W is large for the pass."""
    return adapter is None or layer.weight.shape[0] <= x.shape[0]


class Merged(torch.autograd.Function):
    """Several linears, without dropout: W + s B A is made once for the pass, so that a token pays one product each way
    beside the slim ones of A's and B's gradients."""

    @staticmethod
    def forward(ctx, x, scales, *tensors):
        quads = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        weights = [w if a is None else torch.addmm(w, b, a, alpha=s) for (w, _, a, b), s in zip(quads, scales)]
        ctx.save_for_backward(x, *tensors, *weights)
        ctx.scales = scales
        return tuple(product(x, w, quad[1]) for w, quad in zip(weights, quads))

    @staticmethod
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        n, d_x, d_tensors = len(grads), None, []
        for i, (g, scale) in enumerate(zip(grads, ctx.scales)):
            merged, (_, _, a, b) = saved[4 * n + i], saved[4 * i : 4 * i + 4]
            need_weight, need_bias, need_adapter, _ = ctx.needs_input_grad[2 + 4 * i : 6 + 4 * i]
            if ctx.needs_input_grad[0]:
                d_x = product(g, merged.T) if d_x is None else add_product(d_x, g, merged.T)
            d_tensors.append(product(g.T, x.T) if need_weight else None)
            d_tensors.append(g.sum(0) if need_bias else None)
            if need_adapter:
                back, h = product(g, b.T), product(x, a)  # (T, r)
                d_tensors += [product(back.T, x.T).mul_(scale), product(h.T, g.T).mul_(scale).T]
            else:
                d_tensors += [None, None]
        return d_x, None, *d_tensors


def embed_patches(patches: Tensor, weight: Tensor) -> Tensor:
    """`embed_patches` of qwen.py, few patches at a time: as floats those of a batch would go through memory."""
    return stack([embed_few_patches(few, weight) for few in patches.split(CPU_PATCHES)])


def embed_few_patches(patches: Tensor, weight: Tensor) -> Tensor:
    is_pixels = patches.dtype == torch.uint8
    patches = normalise_patches(patches, weight.dtype) if is_pixels else patches.to(weight.dtype)
    if weight.dtype == torch.float32:
        return Merged.apply(patches, [0.0], weight, None, None, None)[0]
    return F.linear(patches, weight)


# -- Norm, SwiGLU, rotary positions


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row, (T, 1)"""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """F.rms_norm, which torch differentiates as eight steps."""

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
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        g = g * weight
        along = torch.linalg.vecdot(g, unit).div_(-x.shape[-1])[:, None]
        return g.addcmul_(unit, along).mul_(r), d_weight, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return RMSNorm.apply(x, weight, eps)


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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return SwiGLU.apply(gate, up)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """`portable.turn` in four passes, without autograd. x: (T, H, D); cos, sin: (T, 1, D/2)."""
    out = torch.empty(x.shape)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return out


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    return portable.Rotate.apply(x, *tables, turn)


# -- Log-probs


def logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float = 1.0, banned: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    simple = len(hidden) and not with_entropy and banned is None and temperature == 1.0
    if simple and not head_weight.requires_grad:
        logprobs, correct = LogprobsAtOnce.apply(hidden, head_weight, targets)
        return logprobs, None, correct
    options = temperature, banned, with_entropy, product
    return portable.TargetLogprobs.apply(hidden, head_weight, targets, *options)


def pieces(rows: int) -> list[slice]:
    """Cuts rows into pieces of few different sizes, so that products of any number of rows have few shapes."""
    sizes, left, size = [PIECE] * (rows // PIECE), rows % PIECE, PIECE // 2
    while size >= LEAST:
        if left >= size:
            sizes.append(size)
            left -= size
        size //= 2
    ends = [0, *accumulate([*sizes, left] if left else sizes)]
    return [slice(i, j) for i, j in pairwise(ends)]


class LogprobsAtOnce(torch.autograd.Function):
    """SFT's case on a CPU: the head is frozen, so a row's gradient is its `grad` times W[y] - softmax W, which is made
    while the chunk's exponentials are there; nothing is computed again. TargetLogprobs is the general case."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets):
        logprobs, units, correct = [], [], []
        for rows in pieces(len(hidden)):
            logits, y = product(hidden[rows], head_weight), targets[rows, None]  # (n, V)
            chosen, most = logits.gather(1, y), logits.amax(-1, keepdim=True)
            total = logits.sub_(most).exp_().sum(-1, keepdim=True)
            logprobs.append((chosen - most - total.log())[:, 0])
            correct.append((chosen >= most)[:, 0])
            mean = product(logits, head_weight.T).div_(total)
            units.append(head_weight.index_select(0, y[:, 0]).sub_(mean))
        ctx.save_for_backward(stack(units))
        correct = stack(correct)
        ctx.mark_non_differentiable(correct)
        return stack(logprobs), correct

    @staticmethod
    def backward(ctx, grad, _correct):
        return ctx.saved_tensors[0] * grad[:, None], None, None


# -- Decoding


def pick_decoder(model, prompts, sampling, G: int):
    """CpuDecoder for a small model, else None."""
    weights = sum(p.numel() for p in model.model.layers.parameters())
    return CpuDecoder if weights <= MOST_WEIGHTS else None


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
    step's attention is two products and a softmax. GroupCache.step is the general case."""

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


class CpuDecoder(PlainDecoder):
    """PlainDecoder with fused weights, which are copied for this one rollout."""

    def __init__(self, model, prompts, sampling, G: int, generator):
        super().__init__(model, prompts, sampling, G, generator)
        steps, cache = sampling.max_new_tokens, self.cache
        self.config, self.eps = model.config, model.config.rms_norm_eps
        self.embedding = model.model.embed_tokens.weight
        self.layers = [self.fuse_layer(layer) for layer in model.model.layers]
        self.head = model.head_weight * model.model.norm.weight
        cells = len(self.position) * (max(cache.lengths) + steps) * cache.K * cache.D
        small = len(set(cache.lengths)) == 1 and cells <= MOST_COPIES
        self.attend = RowCache(cache, steps).step if small else cache.step
        every = torch.arange(int(self.position.max()) + steps)
        self.cos, self.sin = mrope_tables(every.expand(3, -1), model.config, self.head.dtype)

    def fuse_layer(self, layer) -> tuple:
        """(qkv, its bias, o, gate_up, down)"""
        at, mlp = layer.self_attn, layer.mlp
        qkv = fused(layer.input_layernorm, at.q_proj, at.k_proj, at.v_proj)
        gate_up, _ = fused(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        return *qkv, fused(None, at.o_proj)[0], gate_up, fused(None, mlp.down_proj)[0]

    def step(self, ids: Tensor, t: int) -> Tensor:
        """ids (R,) -> logits (R, V)"""
        H, K, D, R = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim, len(ids)
        x = F.embedding(ids, self.embedding)  # (R, C)
        tables = [table.index_select(0, self.position + t) for table in (self.cos, self.sin)]
        for number, (qkv, bias, o, gate_up, down) in enumerate(self.layers):
            heads = product(self.unit(x), qkv, bias).view(R, H + 2 * K, D)
            qk = turn(heads[:, : H + K], *tables, 1.0)
            out = self.attend(number, qk[:, :H], qk[:, H:], heads[:, H + K :])
            x = add_product(x, out.view(R, H * D), o)
            gate, up = product(self.unit(x), gate_up).chunk(2, dim=1)
            x = add_product(x, F.silu(gate).mul_(up), down)
        return product(self.unit(x), self.head)

    def unit(self, x: Tensor) -> Tensor:
        """x / rms(x): the norm's weight is in the product behind it."""
        return x * inverse_rms(x, self.eps)


FORMS = dict(
    portable.FORMS, linear=linear, norm=norm, swiglu=swiglu, rotate=rotate, embed_patches=embed_patches,
    logprobs=logprobs, trim_last_layer=True, pick_decoder=pick_decoder,
)  # fmt: skip
OTHER_DTYPES = dict(portable.FORMS, embed_patches=embed_patches)

"""Fast forms in PyTorch alone, for any device: few kernels, few passes over memory.

Products with frozen weights and trained adapters: linears that share an input go together, in few kernels.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T          A_i (r, in), B_i (out_i, r): the adapter, when there is one

q, k and v share an input, gate and up share one: their A's go through one product, and every adapter term is added by
the product that makes it (addmm), not by a kernel of its own. The same in the backward pass.

Log-probs of target tokens without ever holding (T, V) logits. At V = 151,936 the logits of 2,048 tokens are 1.2 GB in
float32, and autograd would keep them and their softmax. Here a chunk of rows at a time goes through the head; forward
keeps one number a row (the log-sum-exp), backward computes the chunk again and turns it into the gradient in place:

    d logp(y | h) / dh = (onehot(y) - softmax(h W^T / tau)) W / tau
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import ALIGN, Weights
from model.fast import quantized
from model.packed import Segments
from model.quantized import Quantized

CHUNK_BYTES = 256 << 20  # float32 logits held at a time; 441 rows at the real vocabulary


# -- Products with adapters


def linear(x: Tensor, *layers: Weights, pad: bool = False, unused: bool = False) -> tuple[Tensor, ...]:
    """(T, in) through each layer: a tuple of (T, out_i).

    pad: outputs come with zero columns up to the next multiple of 8, and x may have such columns; the vision tower's
    3,420 needs it on a GPU. unused: only the backward pass is wanted, the outputs may hold anything.
    """
    frozen = not any(p.requires_grad for w in layers for p in (w.weight, w.bias) if p is not None)
    if frozen and any(w.A is not None for w in layers) and not any(w.dropout for w in layers):
        scales, tensors = [w.scale for w in layers], [t for w in layers for t in w[:4]]
        return Project.apply(x, pad, unused, scales, *tensors)
    return tuple(linear_by_autograd(x, w, pad) for w in layers)


def linear_by_autograd(x: Tensor, layer: Weights, pad: bool) -> Tensor:
    """The path of trained weights and of dropout."""
    if isinstance(layer.weight, Quantized):
        y = quantized.Product.apply(x, layer.weight)
        y = y if layer.bias is None else y + layer.bias
    else:
        y = F.linear(x, *padded(layer.weight, layer.bias, x.shape[-1], pad))
    if layer.A is None:
        return y
    h = F.dropout(x, layer.dropout) if layer.dropout else x
    h = F.linear(h, widen(layer.A, 1, x.shape[-1]).to(x.dtype))  # (T, r)
    return y + F.linear(h * layer.scale, widen(layer.B, 0, y.shape[-1]).to(x.dtype))


def widen(x: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind x along dim, up to size."""
    missing = size - x.shape[dim]
    return x if missing == 0 else F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])


def padded(weight: Tensor, bias: Tensor | None, width: int, pad: bool) -> tuple[Tensor, Tensor | None]:
    """weight (out, in) widened to the input's width and, with pad, to an aligned output; bias likewise. A low-bit
    weight stays as it is: those of real models are aligned."""
    if isinstance(weight, Quantized):
        return weight, bias
    out = len(weight) + (-len(weight) % ALIGN if pad else 0)
    if tuple(weight.shape) != (out, width):
        frozen = not weight.requires_grad
        weight = padded_storage(weight, (out, width)) if frozen else widen(widen(weight, 1, width), 0, out)
    if bias is not None and len(bias) != out:
        bias = widen(bias, 0, out) if bias.requires_grad else padded_storage(bias, (out,))
    return weight, bias


def padded_storage(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A frozen tensor widened with zeros to shape. It moves once into a storage of that size, of which it is a view
    ever after: widening it costs nothing. (A trained one's storage is the optimizer's: it is copied each time.)"""
    if x.untyped_storage().nbytes() != math.prod(shape) * x.itemsize or x.storage_offset():
        wide = x.data
        for dim, size in enumerate(shape):
            wide = widen(wide, dim, size)
        x.data = wide[tuple(slice(n) for n in x.shape)]
    return x.detach().as_strided(shape, (*shape[1:], 1))


def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.mul_(scale)


class Project(torch.autograd.Function):
    """Frozen weights, adapters without dropout; gradients to x and to every A and B."""

    @staticmethod
    def forward(ctx, x, pad, unused, scales, *tensors):
        quads = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        A = stack([q[2] for q in quads if q[2] is not None]).to(x.dtype)  # (sum of ranks, in)
        h = x @ widen(A, 1, x.shape[1]).T  # (T, sum of ranks)
        fp8 = any(getattr(q[0], "kind", None) == "fp8" for q in quads)
        rounded = quantized.round_rows(x) if fp8 and not unused else None  # once for all that share x
        outs, saved, first = [], [], 0
        for (weight, bias, a, b), scale in zip(quads, scales):
            w, bias = padded(weight, bias, x.shape[1], pad)
            saved += [None if isinstance(w, Quantized) else w, a, b]  # of few bits: dequantised again going back
            if unused:
                y = x.new_empty(len(x), w.shape[0])
            else:
                y = quantized.product(x, w, bias, rounded) if isinstance(w, Quantized) else F.linear(x, w, bias)
            if a is not None and not unused:
                y.addmm_(h[:, first : first + len(a)], widen(b, 0, w.shape[0]).to(x.dtype).T, alpha=scale)
            first += 0 if a is None else len(a)
            outs.append(y)
        ctx.save_for_backward(x, h, *saved)
        ctx.scales, ctx.low = scales, [q[0] for q in quads]
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, h, *saved = ctx.saved_tensors
        scales, triples = ctx.scales, [saved[i : i + 3] for i in range(0, len(saved), 3)]
        d_x, back, A, d_B, first = None, [], [], [], 0
        for (w, a, b), low, scale, g in zip(triples, ctx.low, scales, grads):
            if ctx.needs_input_grad[0] and w is None:
                d_x = quantized.product_back(g, low, d_x)
            elif ctx.needs_input_grad[0]:
                d_x = g @ w if d_x is None else d_x.addmm_(g, w)
            if a is None:
                d_B.append(None)
                continue
            A.append(a)
            back.append(scaled(g @ widen(b, 0, g.shape[1]).to(g.dtype), scale))  # (T, r)
            d_B.append(scaled(g[:, : len(b)].T @ h[:, first : first + len(a)], scale).to(b.dtype))
            first += len(a)
        back = stack(back, 1)  # (T, sum of ranks)
        if d_x is not None:
            d_x.addmm_(back, widen(stack(A), 1, x.shape[1]).to(x.dtype))
        d_A = iter((back.T @ x)[:, : A[0].shape[1]].split([len(a) for a in A]))
        d_tensors = []
        for (_w, a, _b), d_b in zip(triples, d_B):
            d_tensors += [None, None, None if a is None else next(d_A).to(a.dtype), d_b]
        return d_x, None, None, None, *d_tensors


# -- Norm and SwiGLU


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
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
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


# -- Attention


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attention` of qwen.py by torch's scaled_dot_product_attention over padded buckets of similar segments."""
    assert q.shape[0] == segments.num_tokens, f"{q.shape[0]} queries, but segments of {segments.num_tokens}"
    H, D, K = *q.shape[1:], k.shape[1]
    if len(q) == 0:  # no answer in the whole batch: there are no queries
        return q
    if H != K:  # grouped queries: repeat here, because SDPA's own flag keeps the CPU from its fused kernel
        k, v = (x[:, :, None].expand(-1, -1, H // K, -1).reshape(-1, H, D) for x in (k, v))
    if segments.dense is None:
        segments.dense = [Bucket.build(segments, members, q.device) for members in similar_lengths(segments)]

    def take(x: Tensor, rows: Tensor | None) -> Tensor:
        # not x[rows]: on a CPU its gradient adds up a row's many uses in any order, and takes ten times as long
        return x if rows is None else x.index_select(0, rows.flatten())

    outs, positions = [], []
    for bucket in segments.dense:
        b, n, m = bucket.shape
        qb = take(q, bucket.q_index).view(b, n, H, D).transpose(1, 2)
        kb = take(k, bucket.k_index).view(b, m, H, D).transpose(1, 2)
        vb = take(v, bucket.k_index).view(b, m, H, D).transpose(1, 2)
        out = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=bucket.mask, is_causal=bucket.is_causal)
        out = out.transpose(1, 2).reshape(b * n, H, D)
        if bucket.q_index is None:
            return out
        valid = slice(None) if bucket.valid is None else bucket.valid
        outs.append(out[valid])
        positions.append(bucket.q_index.flatten()[valid])
    return torch.empty_like(q).index_copy(0, torch.cat(positions), torch.cat(outs))


def similar_lengths(segments: Segments) -> list[list[int]]:
    """Segment numbers in groups of nearly equal size, so that padding at most doubles a group's query-key area."""
    sizes = list(zip(segments.q_lengths, segments.k_lengths))
    groups: list[list[int]] = []
    area = max_q = max_k = 0
    for s in sorted(range(len(sizes)), key=sizes.__getitem__):
        q, k = sizes[s]
        if q == 0:
            continue
        padded = max(max_q, q) * max(max_k, k)
        if groups and padded * (len(groups[-1]) + 1) <= 2 * (area + q * k):
            groups[-1].append(s)
            area, max_q, max_k = area + q * k, max(max_q, q), max(max_k, k)
        else:
            groups.append([s])
            area, max_q, max_k = q * k, q, k
    return groups


@dataclass(eq=False)
class Bucket:
    """A group of segments as one dense attention: (b, H, q, D) against (b, H, k, D)."""

    q_index: Tensor | None  # (b, q) int64 packed query of each slot (padding repeats token 0); None = all of T in order
    k_index: Tensor | None  # (b, k) int64 packed key of each slot, likewise
    mask: Tensor | None  # (b, 1, q, k) bool, True = may attend; None = everything
    valid: Tensor | None  # (b * q,) bool, which slots are real queries; None = all
    shape: tuple[int, int, int]  # b, q, k
    is_causal: bool  # plain square causal mask, given to SDPA as a flag instead of a mask

    @classmethod
    def build(cls, segments: Segments, members: list[int], device) -> "Bucket":
        q_start = [0, *accumulate(segments.q_lengths)]
        k_start = [0, *accumulate(segments.k_lengths)]
        q_len = torch.tensor([segments.q_lengths[s] for s in members])
        k_len = torch.tensor([segments.k_lengths[s] for s in members])
        q, k = int(q_len.max()), int(k_len.max())
        uniform = bool((q_len == q).all()) and bool((k_len == k).all())
        q_slot, k_slot = torch.arange(q), torch.arange(k)
        q_valid = q_slot < q_len[:, None]  # (b, q)
        k_valid = k_slot < k_len[:, None]  # (b, k)
        q_index = (torch.tensor([q_start[s] for s in members])[:, None] + q_slot) * q_valid
        k_index = (torch.tensor([k_start[s] for s in members])[:, None] + k_slot) * k_valid
        if segments.kv_index is not None:
            k_index = segments.kv_index.cpu()[k_index]
        square_causal = segments.is_causal and uniform and q == k
        mask = None
        if not uniform or (segments.is_causal and not square_causal):
            mask = k_valid[:, None, :].expand(-1, q, -1)
            if segments.is_causal:  # aligned at the ends: query i of n sees keys up to k_len - n + i
                last = q_slot[None, :] + (k_len - q_len)[:, None]  # (b, q)
                mask = mask & (k_slot <= last[..., None])
            mask = mask[:, None].to(device)  # (b, 1, q, k)
        whole = uniform and members == list(range(len(segments.q_lengths)))  # packed order is already the dense order
        valid = None if uniform else q_valid.flatten().to(device)
        return cls(
            None if whole else q_index.to(device),
            None if whole and segments.kv_index is None else k_index.to(device),
            mask, valid, (len(members), q, k), square_causal,
        )  # fmt: skip


# -- Log-probs


def chunk_logits(hidden: Tensor, head_weight: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    logits = F.linear(hidden, head_weight).float()  # (n, V)
    if temperature != 1.0:
        logits /= temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


class TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, banned, with_entropy):
        N, V = hidden.shape[0], head_weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * V))
        logprobs, entropy, lse = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
        correct = torch.empty(N, dtype=torch.bool, device=hidden.device)
        for i in range(0, N, rows):
            s = slice(i, i + rows)
            logits = chunk_logits(hidden[s], head_weight, temperature, banned)
            lse[s] = logits.logsumexp(-1)
            chosen = logits.gather(1, targets[s, None])[:, 0]
            logprobs[s] = chosen - lse[s]
            correct[s] = chosen >= logits.amax(-1)
            if with_entropy:
                logp = logits.sub_(lse[s, None]).clamp_(min=-1e30)  # the clamp keeps 0 * -inf out
                entropy[s] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, head_weight, targets, lse)
        ctx.options = temperature, banned, rows
        ctx.mark_non_differentiable(entropy, correct)
        return logprobs, entropy if with_entropy else None, correct

    @staticmethod
    def backward(ctx, grad, _entropy, _correct):
        hidden, head_weight, targets, lse = ctx.saved_tensors
        temperature, banned, rows = ctx.options
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head_weight, dtype=torch.float32) if need_head else None
        for i in range(0, hidden.shape[0], rows):
            s = slice(i, i + rows)
            d = chunk_logits(hidden[s], head_weight, temperature, banned).sub_(lse[s, None]).exp_().neg_()
            d.scatter_add_(1, targets[s, None], torch.ones_like(d[:, :1]))  # onehot - softmax
            d = d.mul_(grad[s, None] / temperature).to(hidden.dtype)
            if need_hidden:
                d_hidden[s] = d @ head_weight
            if need_head:
                d_head += (d.T @ hidden[s]).float()
        return d_hidden, None if d_head is None else d_head.to(head_weight.dtype), *[None] * 4


FORMS = dict(attention=attention, linear=linear, logprobs=TargetLogprobs.apply)
CPU_FLOAT32 = dict(FORMS, norm=RMSNorm.apply, swiglu=SwiGLU.apply, trim_last_layer=True)

"""Fast forms for any device, in PyTorch alone.

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

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import adapter_of, aligned
from model.packed import Segments

CHUNK_BYTES = 256 << 20  # float32 logits held at a time; 441 rows at the real vocabulary


def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


# -- Products with adapters


def linear(x: Tensor, *layers, pad: bool = False) -> tuple[Tensor, ...]:
    """`linear` of qwen.py. Only a GPU gains from padding: gpu.py takes `project` itself."""
    return project(x, *layers)


def project(x: Tensor, *layers, pad: bool = False) -> tuple[Tensor, ...]:
    """(T, in) through each layer: a tuple of (T, out_i).

    A layer is an nn.Linear, or anything with weight, bias and `adapter()` -> (A, B, scale, dropout) or None. pad:
    outputs come with zero columns up to the next multiple of 8, and x may have such columns; the vision tower's 3,420
    needs it on a GPU.
    """
    adapters = [adapter_of(layer) for layer in layers]
    frozen = not any(p.requires_grad for m in layers for p in (m.weight, m.bias) if p is not None)
    dropped = any(a is not None and a[3] > 0 for a in adapters)
    if not frozen or dropped or not any(adapters):
        return tuple(project_one(x, m, a, pad) for m, a in zip(layers, adapters))
    return Project.apply(x, pad, *flat_arguments(layers, adapters))


def flat_arguments(layers, adapters) -> list:
    """[scales, weight, bias, A, B, weight, …]: how an autograd function takes them."""
    tensors, scales = [], []
    for layer, adapter in zip(layers, adapters):
        A, B, scale, _ = adapter or (None, None, 0.0, 0.0)
        tensors += [layer.weight, layer.bias, A, B]
        scales.append(scale)
    return [scales, *tensors]


def project_one(x: Tensor, layer, adapter, pad: bool = False) -> Tensor:
    """One layer by torch's own autograd: the path of trained weights and dropout."""
    weight, bias = padded(layer.weight, layer.bias, x.shape[-1], pad)
    y = F.linear(x, weight, bias)
    if adapter is None:
        return y
    A, B, scale, dropout = adapter
    h = F.linear(F.dropout(x, dropout) if dropout else x, widen(A, 1, x.shape[-1]).to(x.dtype))  # (T, r)
    return y + F.linear(h * scale, widen(B, 0, y.shape[-1]).to(x.dtype))


def widen(x: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind x along dim, up to size."""
    missing = size - x.shape[dim]
    return x if missing == 0 else F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])


def padded(weight: Tensor, bias: Tensor | None, width: int, pad: bool) -> tuple[Tensor, Tensor | None]:
    """weight (out, in) widened to the input's width and, with pad, to an aligned output; bias likewise."""
    out = aligned(weight.shape[0]) if pad else weight.shape[0]
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


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.mul_(scale)


class Project(torch.autograd.Function):
    """Frozen weights, adapters without dropout; gradients to x and to every A and B."""

    @staticmethod
    def forward(ctx, x, pad, scales, *tensors):
        quads = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        A = stack([q[2] for q in quads if q[2] is not None]).to(x.dtype)  # (sum of ranks, in)
        h = x @ widen(A, 1, x.shape[1]).T  # (T, sum of ranks)
        outs, saved, first = [], [], 0
        for (weight, bias, a, b), scale in zip(quads, scales):
            w, bias = padded(weight, bias, x.shape[1], pad)
            saved += [w, a, b]
            y = F.linear(x, w, bias)
            if a is not None:
                y.addmm_(h[:, first : first + len(a)], widen(b, 0, len(w)).to(x.dtype).T, alpha=scale)
                first += len(a)
            outs.append(y)
        ctx.save_for_backward(x, h, *saved)
        ctx.scales = scales
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, h, *saved = ctx.saved_tensors
        scales, triples = ctx.scales, [saved[i : i + 3] for i in range(0, len(saved), 3)]
        d_x, back, A, d_B, first = None, [], [], [], 0
        for (w, a, b), scale, g in zip(triples, scales, grads):
            if ctx.needs_input_grad[0]:
                d_x = g @ w if d_x is None else d_x.addmm_(g, w)
            if a is None:
                d_B.append(None)
                continue
            A.append(a)
            back.append(scaled(g @ widen(b, 0, len(w)).to(g.dtype), scale))  # (T, r)
            d_B.append(scaled(g[:, : len(b)].T @ h[:, first : first + len(a)], scale).to(b.dtype))
            first += len(a)
        back = stack(back, 1)  # (T, sum of ranks)
        if d_x is not None:
            d_x.addmm_(back, widen(stack(A), 1, x.shape[1]).to(x.dtype))
        d_A = iter((back.T @ x)[:, : A[0].shape[1]].split([len(a) for a in A]))
        d_tensors = []
        for (_w, a, _b), d_b in zip(triples, d_B):
            d_tensors += [None, None, None if a is None else next(d_A).to(a.dtype), d_b]
        return d_x, None, None, *d_tensors


# -- Attention and rotary positions


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attention` of qwen.py by torch's scaled_dot_product_attention over padded buckets of similar segments."""
    assert q.shape[0] == segments.num_tokens, f"{q.shape[0]} queries, but segments of {segments.num_tokens}"
    H, D, K = *q.shape[1:], k.shape[1]
    if len(q) == 0:  # no answer in the whole batch: there are no queries
        return q
    if H != K:  # grouped queries: repeat here, because SDPA's own flag keeps the CPU from its fused kernel
        k, v = (x[:, :, None].expand(-1, -1, H // K, -1).reshape(-1, H, D) for x in (k, v))

    def take(x: Tensor, rows: Tensor | None) -> Tensor:
        # not x[rows]: on a CPU its gradient adds up a row's many uses in any order, and takes ten times as long
        return x if rows is None else x.index_select(0, rows.flatten())

    outs, positions = [], []
    for bucket in segments.buckets(q.device):
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


class Rotate(torch.autograd.Function):
    """turn(x, cos, sin, sign): x turned by sign times its angles. The gradient is turned back, so only the tables are
    kept for it."""

    @staticmethod
    def forward(ctx, x, cos, sin, turn):
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn
        return turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return ctx.turn(grad.contiguous(), *ctx.saved_tensors, -1.0), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x turned by sign times its angles, without autograd. x: (T, H, D); cos, sin: (T, 1, D/2)."""
    sin = sin if sign > 0 else -sin
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    return Rotate.apply(x, *tables, turn)


# -- Log-probs


def logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, temperature: float = 1.0, banned: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    return TargetLogprobs.apply(hidden, head_weight, targets, temperature, banned, with_entropy, F.linear)


def chunk_logits(hidden: Tensor, head_weight: Tensor, temperature: float, banned: Tensor | None, product) -> Tensor:
    logits = product(hidden, head_weight).float()  # (n, V)
    if temperature != 1.0:
        logits /= temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


class TargetLogprobs(torch.autograd.Function):
    """product(x, weight) -> x weight^T, without autograd."""

    @staticmethod
    def forward(ctx, hidden, head_weight, targets, temperature, banned, with_entropy, product):
        N, V = hidden.shape[0], head_weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * V))
        logprobs, entropy, lse = (hidden.new_empty(N, dtype=torch.float32) for _ in range(3))
        correct = torch.empty(N, dtype=torch.bool, device=hidden.device)
        for i in range(0, N, rows):
            s = slice(i, i + rows)
            logits = chunk_logits(hidden[s], head_weight, temperature, banned, product)
            lse[s] = logits.logsumexp(-1)
            chosen = logits.gather(1, targets[s, None])[:, 0]
            logprobs[s] = chosen - lse[s]
            correct[s] = chosen >= logits.amax(-1)
            if with_entropy:
                logp = logits.sub_(lse[s, None]).clamp_(min=-1e30)  # the clamp keeps 0 * -inf out
                entropy[s] = -logp.exp().mul_(logp).sum(-1)
        ctx.save_for_backward(hidden, head_weight, targets, lse)
        ctx.options = temperature, banned, rows, product
        ctx.mark_non_differentiable(entropy, correct)
        return logprobs, entropy if with_entropy else None, correct

    @staticmethod
    def backward(ctx, grad, _entropy, _correct):
        hidden, head_weight, targets, lse = ctx.saved_tensors
        temperature, banned, rows, product = ctx.options
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head_weight, dtype=torch.float32) if need_head else None
        for i in range(0, hidden.shape[0], rows):
            s = slice(i, i + rows)
            d = chunk_logits(hidden[s], head_weight, temperature, banned, product).sub_(lse[s, None]).exp_().neg_()
            d.scatter_add_(1, targets[s, None], torch.ones_like(d[:, :1]))  # onehot - softmax
            d = d.mul_(grad[s, None] / temperature).to(hidden.dtype)
            if need_hidden:
                d_hidden[s] = product(d, head_weight.T)
            if need_head:
                d_head += (d.T @ hidden[s]).float()
        return d_hidden, None if d_head is None else d_head.to(head_weight.dtype), *[None] * 5


FORMS = dict(attention=attention, linear=linear, rotate=rotate, logprobs=logprobs)

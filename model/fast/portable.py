"""Fast forms in PyTorch alone, for any device: few kernels, few passes over memory.

Products with frozen weights and trained adapters: linears that share an input go together.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T          A_i (r, in), B_i (out_i, r): the adapter, when there is one

The A's go through one product, and every adapter term is added by the product that makes it (addmm), not by a kernel of
its own. The same in the backward pass.

Log-probs of target tokens without ever holding (T, V) logits. At V = 151,936 the logits of 2,048 tokens are 1.2 GB in
float32, and autograd would keep them and their softmax. Here a chunk of rows at a time goes through the head; forward
keeps one number a row (the log-sum-exp), backward computes the chunk again and turns it into the gradient in place:

    d logp(y | h) / dh = (onehot(y) - softmax(h W^T / tau)) W / tau
"""

import math
from collections import defaultdict
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import Weights, aligned
from model.fast import quantized
from model.packed import Segments
from model.quantized import Quantized, head_product

CHUNK_BYTES = 256 << 20  # float32 logits held at a time; 441 rows at the real vocabulary


# -- Products with adapters


def linear(x: Tensor, *layers: Weights, last: bool = False) -> tuple[Tensor, ...]:
    """`linear` of qwen.py. Weights whose sizes are no multiple of 8 give outputs with zero columns behind them up to
    the next one, and x may have such columns: a GPU multiplies the tower's 3,420 four times slower."""
    frozen = not any(p.requires_grad for w in layers for p in (w.weight, w.bias) if p is not None)
    if frozen and any(w.A is not None for w in layers) and not any(w.dropout for w in layers):
        return Project.apply(x, last, layers, *(t for w in layers for t in (w.A, w.B)))
    return tuple(linear_by_autograd(x, w) for w in layers)


def linear_by_autograd(x: Tensor, layer: Weights) -> Tensor:
    """The path of trained weights and of dropout."""
    if isinstance(layer.weight, Quantized):
        y = Project.apply(x, False, [Weights(layer.weight, None)], None, None)[0]
        y = y if layer.bias is None else y + layer.bias
    else:
        y = F.linear(x, *padded(layer, x.shape[-1]))
    if layer.A is None:
        return y
    h = F.dropout(x, layer.dropout) if layer.dropout else x
    h = F.linear(h, widen(layer.A, 1, x.shape[-1]))  # (T, r)
    return y + F.linear(h * layer.scale, widen(layer.B, 0, y.shape[-1]))


def widen(x: Tensor, dim: int, size: int) -> Tensor:
    """Zeros behind x along dim, up to size."""
    missing = size - x.shape[dim]
    return x if missing == 0 else F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])


def padded(layer: Weights, width: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, the weight (out, in) widened to the input's width, both to an aligned output."""
    out = aligned(len(layer.weight))
    bias = layer.bias if layer.bias is None else in_shape(layer.bias, (out,))
    return in_shape(layer.weight, (out, width)), bias


def in_shape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x with zeros behind it along each dimension. A frozen tensor moves once into a storage of that size, of which it
    is a view ever after: that costs nothing. (A trained one's storage is the optimizer's: it is copied each time.)"""
    if tuple(x.shape) == shape:
        return x
    wide = x
    if x.requires_grad or x.untyped_storage().nbytes() != math.prod(shape) * x.itemsize or x.storage_offset():
        for dim, size in enumerate(shape):
            wide = widen(wide, dim, size)
        if x.requires_grad:
            return wide
        x.data = wide[tuple(slice(n) for n in x.shape)]
    return x.detach().as_strided(shape, (*shape[1:], 1))


def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.mul_(scale)


class Project(torch.autograd.Function):
    """Frozen weights, adapters without dropout; gradients to x and to every A and B. Of weights in few bits only the
    codes are kept. The last product of a recomputed block is left out inside of a backward pass: nobody asks for it."""

    @staticmethod
    def forward(ctx, x, last, layers, *adapters):
        """layers: Weights. adapters: A and B of each, or None and None."""
        unused = last and torch._C._current_graph_task_id() != -1
        A, ctx.ranks = [a for a in adapters[::2] if a is not None], [0 if a is None else len(a) for a in adapters[::2]]
        h = x @ widen(stack(A), 1, x.shape[1]).T if A else x.new_empty(len(x), 0)  # (T, sum of ranks)
        fp8 = any(isinstance(w.weight, Quantized) and w.weight.kind == "fp8" for w in layers)
        rounded = quantized.round_rows(x) if fp8 and not unused else None  # once for all that share x
        outs = []
        for w, b, own in zip(layers, adapters[1::2], h.split(ctx.ranks, 1)):
            if unused:
                y = x.new_empty(len(x), w.weight.shape[0])
            elif isinstance(w.weight, Quantized):  # not padded: those of real models are aligned
                y = quantized.product(x, w.weight, w.bias, rounded)
            else:
                y = F.linear(x, *padded(w, x.shape[1]))
            if b is not None and not unused:
                y.addmm_(own, widen(b, 0, y.shape[1]).T, alpha=w.scale)
            outs.append(y)
        ctx.save_for_backward(x, h, *adapters)
        ctx.layers = layers
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, h, *adapters = ctx.saved_tensors
        d_x, back, d_B = None, [], []
        for w, b, g, own in zip(ctx.layers, adapters[1::2], grads, h.split(ctx.ranks, 1)):
            if ctx.needs_input_grad[0]:
                low = isinstance(w.weight, Quantized)
                weight = quantized.dequantise(w.weight, g.dtype) if low else padded(w, x.shape[1])[0]
                d_x = g @ weight if d_x is None else d_x.addmm_(g, weight)
            if b is not None:
                back.append(scaled(g @ widen(b, 0, g.shape[1]), w.scale))  # (T, r)
                d_B.append(scaled(g[:, : len(b)].T @ own, w.scale))
        if not back:
            return d_x, None, None, *adapters
        back, A = stack(back, 1), [a for a in adapters[::2] if a is not None]  # (T, sum of ranks)
        if d_x is not None:
            d_x.addmm_(back, widen(stack(A), 1, x.shape[1]))
        d_A = (back.T @ x)[:, : A[0].shape[1]].split([len(a) for a in A])
        made = iter(zip(d_A, d_B))
        return d_x, None, None, *(d for b in adapters[1::2] for d in ((None, None) if b is None else next(made)))


# -- Attention


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attention` of qwen.py by torch's scaled_dot_product_attention, segments of one size at a time."""
    assert q.shape[0] == segments.num_tokens, f"{q.shape[0]} queries, but segments of {segments.num_tokens}"
    H, D, K = *q.shape[1:], k.shape[1]
    if len(q) == 0:  # no answer in the whole batch: there are no queries
        return q
    if H != K:  # grouped queries: repeat here, because SDPA's own flag keeps the CPU from its fused kernel
        k, v = (x[:, :, None].expand(-1, -1, H // K, -1).reshape(-1, H, D) for x in (k, v))
    if segments.dense is None:
        segments.dense = of_one_size(segments, q.device)
    sizes, q_rows, k_rows = segments.dense
    if q_rows is not None:
        q = q.index_select(0, q_rows)
    if k_rows is not None:  # not k[k_rows]: on a CPU its gradient adds up a row's many uses in any order, and slowly
        k, v = k.index_select(0, k_rows), v.index_select(0, k_rows)
    outs, q_sizes, k_sizes = [], [b * n for b, n, *_ in sizes], [b * m for b, _, m, _ in sizes]
    for (b, n, m, mask), *heads in zip(sizes, q.split(q_sizes), k.split(k_sizes), v.split(k_sizes)):
        heads = [x.view(b, -1, H, D).transpose(1, 2) for x in heads]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=segments.is_causal and n == m)
        outs.append(out.transpose(1, 2).reshape(-1, H, D))
    out = stack(outs)
    return out if q_rows is None else torch.empty_like(q).index_copy(0, q_rows, out)


def of_one_size(segments: Segments, device) -> tuple[list, Tensor | None, Tensor | None]:
    """[(segments b of a size, their queries n, keys m, mask)], and the packed queries and keys in that order, int64;
    None where that is the order in which they are packed."""
    q_starts, k_starts = accumulate(segments.q_lengths, initial=0), accumulate(segments.k_lengths, initial=0)
    sizes = defaultdict(list)
    for n, m, *starts in zip(segments.q_lengths, segments.k_lengths, q_starts, k_starts):
        if n:
            sizes[n, m].append(starts)
    q_rows = [torch.arange(q, q + n) for (n, _), starts in sizes.items() for q, _ in starts]
    k_rows = [torch.arange(k, k + m) for (_, m), starts in sizes.items() for _, k in starts]
    is_packed = len(sizes) == 1 and len(q_rows) == len(segments.q_lengths)
    q_rows, k_rows = None if is_packed else torch.cat(q_rows).to(device), torch.cat(k_rows)
    if segments.kv_index is not None:
        k_rows = segments.kv_index.cpu()[k_rows]
    is_packed = is_packed and segments.kv_index is None
    batches = []
    for (n, m), starts in sizes.items():
        is_cut = segments.is_causal and n != m  # aligned at the ends
        mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if is_cut else None
        batches.append((len(starts), n, m, mask))
    return batches, q_rows, None if is_packed else k_rows.to(device)


# -- Log-probs


def chunk_logits(hidden: Tensor, head_weight, temperature: float, banned: Tensor | None) -> Tensor:
    if isinstance(head_weight, Quantized):
        logits = head_product(hidden, head_weight, quantized.product).float()  # (n, V)
    else:
        logits = F.linear(hidden, head_weight).float()
    if temperature != 1.0:
        logits /= temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


def through_head(d: Tensor, head_weight) -> Tensor:
    """d (n, V) of logits -> (n, C) of hidden states. The terms of an int8 head's blocks are summed in float32."""
    if isinstance(head_weight, Tensor):
        return d @ head_weight
    blocks, total = head_weight.blocks(), 0.0
    for block, part in zip(blocks, d.split([len(block.codes) for block in blocks], 1)):
        total = total + (part @ quantized.dequantise(block, d.dtype)).float()
    return total.to(d.dtype)


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
        ctx.save_for_backward(hidden, targets, lse)
        ctx.options = head_weight, temperature, banned, rows
        ctx.mark_non_differentiable(entropy, correct)
        return logprobs, entropy if with_entropy else None, correct

    @staticmethod
    def backward(ctx, grad, _entropy, _correct):
        hidden, targets, lse = ctx.saved_tensors
        head_weight, temperature, banned, rows = ctx.options
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head_weight, dtype=torch.float32) if need_head else None
        for i in range(0, hidden.shape[0], rows):
            s = slice(i, i + rows)
            d = chunk_logits(hidden[s], head_weight, temperature, banned).sub_(lse[s, None]).exp_().neg_()
            d.scatter_add_(1, targets[s, None], torch.ones_like(d[:, :1]))  # onehot - softmax
            d = d.mul_(grad[s, None] / temperature).to(hidden.dtype)
            if need_hidden:
                d_hidden[s] = through_head(d, head_weight)
            if need_head:
                d_head += (d.T @ hidden[s]).float()
        return d_hidden, None if d_head is None else d_head.to(head_weight.dtype), *[None] * 4


FORMS = dict(attention=attention, linear=linear, logprobs=TargetLogprobs.apply)

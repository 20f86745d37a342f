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

from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import ALIGN, Weights, aligned
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
    weight, out = layer.weight, aligned(len(layer.weight))
    if weight.requires_grad:
        return widen(widen(weight, 0, out), 1, width), bias_of(layer, out)
    return corner(weight, out, width, weight.dtype), bias_of(layer, out)


def corner(weight: Tensor | Quantized, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A frozen weight (out, in) as the upper left corner of (rows, columns), zeros elsewhere at first. A tensor moves
    into a storage of that size once, of which it is a view ever after. Codes become numbers in a new one each time.

    Behind the zeros that align it, the storage's spare columns and rows are scratch: each product with an adapter in
    them (with_columns, with_rows) fills them for itself. So two products with one weight may be under way at once, in
    two threads or on two streams of a GPU, only with the same adapters in it."""
    (out, width), shape = weight.shape, (rows, columns)
    if isinstance(weight, Quantized):
        if shape == (out, width):
            return quantized.dequantise(weight, dtype)
        wide = torch.zeros(shape, dtype=dtype, device=weight.device)
        quantized.dequantise(weight, dtype, wide[:out, :width])
        return wide
    if shape == (out, width):
        return weight.detach()
    wide = getattr(weight, "wide", None)
    if wide is not None and wide.data_ptr() != weight.data_ptr():
        wide = None  # the weight was moved since
    if wide is None or len(wide) < rows or wide.shape[1] < columns:
        size = shape if wide is None else [max(pair) for pair in zip(shape, wide.shape)]
        larger = weight.new_zeros(size, requires_grad=False)
        larger[:out, :width] = weight.detach()
        weight.data, weight.wide = larger[:out, :width], larger
        wide = larger
    return wide[:rows, :columns]


def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """torch.cat that does not copy a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x.mul_(scale)


class Project(torch.autograd.Function):
    """Frozen weights, adapters without dropout; gradients to x and to every A and B. Of weights in few bits only the
    codes are kept. The last product of a recomputed block is left out inside of a backward pass: nobody asks for it.

    Beside a large product an adapter's small one reads and writes the whole result once more. So it goes inside, as R
    more columns or rows of the weight (R: sum of the ranks), where the side that is copied for it is the smaller one:

        [x h] [W sB]^T = y          g [W sB] = [g W, s g B]     out much larger than in
        y = x W^T + s h B^T         [g, s g B] [W; A] = d_x     in much larger than out
    """

    @staticmethod
    def forward(ctx, x, last, layers, *adapters):
        """layers: Weights. adapters: A and B of each, or None and None."""
        unused = last and torch._C._current_graph_task_id() != -1
        A, B = [widen(a, 1, x.shape[1]) for a in adapters[::2] if a is not None], adapters[1::2]
        ctx.layers, ctx.ranks = layers, [0 if a is None else len(a) for a in adapters[::2]]
        T, width, R = *x.shape, sum(ctx.ranks)
        ctx.inside, fp8 = way_inside(layers, width, R), is_fp8(layers)
        kept, h = x, x @ stack(A).T if A else x.new_empty(T, 0)
        if ctx.inside == "columns":
            both = torch.cat([x, h], 1)
            kept, h = both.split([width, R], 1)  # the copy is kept, so that x itself can go
        ctx.save_for_backward(kept, h, *adapters)
        if unused:
            return tuple(x.new_empty(T, height(w)) for w in layers)
        if ctx.inside == "columns" and not fp8:
            weights = with_columns(layers, B, ctx.ranks, width, x.dtype)
            return tuple(F.linear(both, weight, bias_of(w, len(weight))) for w, weight in zip(layers, weights))
        rounded, outs = quantized.round_rows(x) if fp8 else None, []  # once for all that share x
        for w, b, own in zip(layers, B, h.split(ctx.ranks, 1)):
            if isinstance(w.weight, Quantized):
                y = quantized.product(x, w.weight, w.bias, rounded)
            else:
                y = F.linear(x, *padded(w, width))
            outs.append(y if b is None else y.addmm_(own, widen(b, 0, y.shape[1]).T, alpha=w.scale))
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        x, h, *adapters = ctx.saved_tensors
        (width, R), layers, B, d_x = (x.shape[1], h.shape[1]), ctx.layers, adapters[1::2], None
        A = [a for a in adapters[::2] if a is not None]
        if ctx.inside == "columns" and ctx.needs_input_grad[0]:
            both = sum_of_products(grads, with_columns(layers, B, ctx.ranks, width, x.dtype))
            d_x, back = both.split([width, R], 1)
        else:
            each = zip(layers, B, grads)
            back = [scaled(g @ widen(b, 0, g.shape[1]), w.scale) for w, b, g in each if b is not None]
            back = stack(back, 1) if back else h
        if ctx.needs_input_grad[0]:
            if ctx.inside == "rows":
                d_x = torch.cat([grads[0], back], 1) @ with_rows(layers[0], A[0], width, x.dtype)
            else:
                if d_x is None:
                    whole = (corner(w.weight, height(w), width, x.dtype) for w in layers)
                    d_x = sum_of_products(grads, whole)
                d_x = d_x.addmm_(back, widen(stack(A), 1, width)) if A else d_x
        d_A, d_adapters = iter((back.T @ x)[:, : A[0].shape[1]].split([len(a) for a in A]) if A else ()), []
        for w, b, g, own in zip(layers, B, grads, h.split(ctx.ranks, 1)):
            d_adapters += (None, None) if b is None else (next(d_A), scaled(g[:, : len(b)].T @ own, w.scale))
        return d_x, None, None, *d_adapters


def way_inside(layers, width: int, R: int) -> str:
    """ "columns" or "rows" of the weights, or "" where adapters stay beside them."""
    out = sum(w.weight.shape[0] for w in layers)
    if not R or R % ALIGN or R * 8 > width:
        return ""
    return "columns" if out >= 2 * width else "rows" if len(layers) == 1 and width >= 2 * out else ""


def height(layer: Weights) -> int:
    """Columns of a linear's output. Low-bit weights are not padded: those of real models are aligned."""
    out = layer.weight.shape[0]
    return out if isinstance(layer.weight, Quantized) else aligned(out)


def is_fp8(layers) -> bool:
    return any(isinstance(w.weight, Quantized) and w.weight.kind == "fp8" for w in layers)


def sum_of_products(grads, weights: Iterator[Tensor]) -> Tensor:
    total = grads[0] @ next(weights)
    for g, weight in zip(grads[1:], weights):
        total.addmm_(g, weight)
    return total


def with_columns(layers, B, ranks, width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """(out, width + R) of each layer: W, and s B behind it in the columns of its own rank."""
    first = width
    for w, b, rank in zip(layers, B, ranks):
        weight = corner(w.weight, height(w), width + sum(ranks), dtype)
        weight[:, width:first] = 0  # all but its own, which another thread may be reading
        weight[:, first + rank :] = 0
        if b is not None:
            torch.mul(b, w.scale, out=weight[: len(b), first : first + rank])
        first += rank
        yield weight


def with_rows(layer: Weights, A: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(out + r, width): W, and A below it."""
    out = height(layer)
    weight = corner(layer.weight, out + len(A), width, dtype)
    weight[out:, : A.shape[1]] = A
    return weight


def bias_of(layer: Weights, size: int) -> Tensor | None:
    return None if layer.bias is None else widen(layer.bias, 0, size)


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
    for n, m, q, k, before in zip(segments.q_lengths, segments.k_lengths, q_starts, k_starts, segments.before):
        keys = torch.cat([torch.arange(before.start, before.stop), torch.arange(k, k + m)])
        if n:
            sizes[n, len(keys)].append((torch.arange(q, q + n), keys))
    q_rows, k_rows = (torch.cat(rows) for rows in zip(*(pair for pairs in sizes.values() for pair in pairs)))
    is_packed = len(sizes) == 1 and len(q_rows) == segments.num_tokens and 0 not in segments.q_lengths
    batches = []
    for (n, m), pairs in sizes.items():
        is_cut = segments.is_causal and n != m  # aligned at the ends
        mask = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n) if is_cut else None
        batches.append((len(pairs), n, m, mask))
    keys_packed = is_packed and segments.prefix is None
    return batches, None if is_packed else q_rows.to(device), None if keys_packed else k_rows.to(device)


# -- Log-probs


def chunk_logits(hidden: Tensor, head_weight, banned: Tensor | None) -> Tensor:
    """(n, V) in the hidden states' dtype, before the temperature; -inf where banned."""
    if isinstance(head_weight, Quantized):
        logits = head_product(hidden, head_weight, quantized.product)
    else:
        logits = F.linear(hidden, head_weight)
    if banned is not None:
        logits[:, banned] = float("-inf")
    return logits


def row_statistics(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
    """Of softmax(logits / temperature), float32 (n,) each: the log-sum-exp, the target's logit / temperature, the
    largest one, and the entropy in nats, or None. Writes over float32 logits."""
    logits = logits.float()
    if temperature != 1.0:
        logits /= temperature
    lse, chosen, top = logits.logsumexp(-1), logits.gather(1, targets[:, None])[:, 0], logits.amax(-1)
    if not with_entropy:
        return lse, chosen, top, None
    logp = logits.sub_(lse[:, None]).clamp_(min=-1e30)  # the clamp keeps 0 * -inf out
    return lse, chosen, top, -logp.exp().mul_(logp).sum(-1)


def logits_gradient(logits: Tensor, lse: Tensor, targets: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """grad (n,) of the log-probs -> (n, V) in the logits' dtype: grad / temperature (onehot - softmax)."""
    d = logits.float()
    if temperature != 1.0:
        d /= temperature
    d = d.sub_(lse[:, None]).exp_().neg_()
    d.scatter_add_(1, targets[:, None], torch.ones_like(d[:, :1]))
    return d.mul_(grad[:, None] / temperature).to(logits.dtype)


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
    def forward(ctx, hidden, head_weight, targets, temperature, banned, with_entropy, forms):
        """forms: (row_statistics, logits_gradient), the device's."""
        N, V = hidden.shape[0], head_weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * V))
        lse, chosen, top, entropy = (hidden.new_empty(N, dtype=torch.float32) for _ in range(4))
        for i in range(0, N, rows):
            s = slice(i, i + rows)
            logits = chunk_logits(hidden[s], head_weight, banned)
            lse[s], chosen[s], top[s], nats = forms[0](logits, targets[s], temperature, with_entropy)
            if with_entropy:
                entropy[s] = nats
        ctx.save_for_backward(hidden, targets, lse)
        ctx.options = head_weight, temperature, banned, rows, forms[1]
        correct = chosen >= top
        ctx.mark_non_differentiable(entropy, correct)
        return chosen - lse, entropy if with_entropy else None, correct

    @staticmethod
    def backward(ctx, grad, _entropy, _correct):
        hidden, targets, lse = ctx.saved_tensors
        head_weight, temperature, banned, rows, gradient = ctx.options
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head_weight, dtype=torch.float32) if need_head else None
        for i in range(0, hidden.shape[0], rows):
            s = slice(i, i + rows)
            d = gradient(chunk_logits(hidden[s], head_weight, banned), lse[s], targets[s], grad[s], temperature)
            if need_hidden:
                d_hidden[s] = through_head(d, head_weight)
            if need_head:
                d_head += (d.T @ hidden[s]).float()
        return d_hidden, None if d_head is None else d_head.to(head_weight.dtype), *[None] * 5


def logprobs(*args) -> tuple[Tensor, Tensor | None, Tensor]:
    """`target_logprobs` of qwen.py, with its arguments."""
    return TargetLogprobs.apply(*args, (row_statistics, logits_gradient))


FORMS = dict(attention=attention, linear=linear, logprobs=logprobs)

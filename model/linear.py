"""Products with frozen weights and trained adapters: linears that share an input go together, in few kernels.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T          A_i (r, in), B_i (out_i, r): the adapter, when there is one

q, k and v share an input, gate and up share one: their A's go through one product, and every adapter term is added by
the product that makes it (addmm), not by a kernel of its own. The same in the backward pass.

A linear here is an nn.Linear, or anything with weight, bias and `adapter()` -> (A, B, scale, dropout) or None.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu

ALIGN = 8  # bf16 numbers in 16 bytes: products whose sizes are no multiple of it fall to kernels several times slower


def aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def adapter_of(linear):
    return linear.adapter() if hasattr(linear, "adapter") else None


def project(x: Tensor, *linears, pad: bool = False) -> tuple[Tensor, ...]:
    """(T, in) through each linear: a tuple of (T, out_i).

    pad: outputs may come with zero columns up to the next multiple of 8, and x may have such columns; the vision
    tower's 3,420 needs it on a GPU.
    """
    pad = pad and x.is_cuda
    adapters = [adapter_of(linear) for linear in linears]
    frozen = not any(p.requires_grad for m in linears for p in (m.weight, m.bias) if p is not None)
    dropped = any(a is not None and a[3] > 0 for a in adapters)
    if cpu.handles(x) and not dropped and all(pays_to_merge(x, m, a) for m, a in zip(linears, adapters)):
        return cpu.Merged.apply(x, *packed(linears, adapters))
    if not frozen or dropped or not any(adapters):
        return tuple(plain(x, m, a, pad) for m, a in zip(linears, adapters))
    return Project.apply(x, pad, *packed(linears, adapters))


def packed(linears, adapters) -> list:
    """[scales, weight, bias, A, B, weight, …]: how an autograd function takes them."""
    tensors, scales = [], []
    for linear, adapter in zip(linears, adapters):
        A, B, scale, _ = adapter or (None, None, 0.0, 0.0)
        tensors += [linear.weight, linear.bias, A, B]
        scales.append(scale)
    return [scales, *tensors]


def pays_to_merge(x: Tensor, linear, adapter) -> bool:
    """W + s B A is made once a pass and spares tokens the slim products beside W: not where W is large for the pass."""
    fits = x.shape[1] == linear.weight.shape[1]
    return fits and (adapter is None or linear.weight.shape[0] <= x.shape[0])


def plain(x: Tensor, linear, adapter, pad: bool = False) -> Tensor:
    """One linear by torch's own autograd: the slow twin of `Project`, and the path of trained weights and dropout."""
    weight, bias = padded(linear.weight, linear.bias, x.shape[-1], pad)
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
        weight = roomy(weight, (out, width)) if frozen else widen(widen(weight, 1, width), 0, out)
    if bias is not None and len(bias) != out:
        bias = widen(bias, 0, out) if bias.requires_grad else roomy(bias, (out,))
    return weight, bias


def roomy(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A frozen tensor widened with zeros to shape. It moves once into a storage of that size, of which it is a view
    ever after: widening it costs nothing. (A trained one's storage is the optimizer's: it is copied each time.)"""
    if getattr(x, "room", None) == shape:  # it lies in a buffer of partition.py, with zeros behind it already
        return x.as_strided(shape, (*shape[1:], 1))
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

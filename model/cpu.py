"""What a CPU computes in its own way: few passes over memory and few calls, in float32. The embedded model lives here.

Each function has its plain twin (named in its docstring) that a GPU, other dtypes and the tests take. Products of many
rows go to oneDNN: MKL, which torch would ask, has no AVX-512 kernels for AMD and takes 2.2 times as long there.
"""

import os
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN reads it at its first product. A step of the embedded model has some 50 shapes; with room for fewer than there
# are, oneDNN makes the code of each again in every step, 0.2 ms a product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
ONEDNN = torch.backends.mkldnn.is_available()
LARGE = 1 << 22  # multiplications; of a smaller product, oneDNN's start and the code it makes are the larger part
PIECE, LEAST = 1024, 128  # rows of a piece of the loss: at most, and at least but for the last


def large(x: Tensor, weight: Tensor) -> bool:
    return ONEDNN and handles(x) and x.numel() * len(weight) >= LARGE


def handles(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, its twin, without autograd: x (T, in), weight (out, in), bias (out,) -> (T, out)."""
    if large(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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


def add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x weight^T; y is overwritten or not."""
    if large(x, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return y.addmm_(x, weight.T)


class Merged(torch.autograd.Function):
    """`linear.plain` of several linears, without dropout: W + s B A is made once for the pass, so that a token pays
    one product each way beside the slim ones of A's and B's gradients."""

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


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """`kernels.rotate_pairs` in four passes, without autograd. x: (T, H, D); cos, sin: (T, 1, D/2)."""
    out = torch.empty(x.shape)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return out

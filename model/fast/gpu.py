"""Fast forms on CUDA: Triton kernels for what costs more in memory traffic than in arithmetic, attention.py's kernels,
and portable.py's products. Triton comes with torch's CUDA builds; without it plain forms stand in for its kernels.
"""

import torch
from torch import Tensor

from model import qwen
from model.fast import portable
from model.fast.attention import Rotate, attention, tower_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring none
    triton = None

BLOCK = 2048  # numbers a program handles; 4 KB of bf16


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, both contiguous: one kernel each way, instead of three and four."""

    @staticmethod
    def forward(ctx, gate, up):
        assert gate.is_contiguous() and up.is_contiguous(), f"strides {gate.stride()} and {up.stride()}"
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        swiglu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        n = gate.numel()
        swiglu_backward_kernel[(triton.cdiv(n, BLOCK),)](grad.contiguous(), gate, up, d_gate, d_up, n, BLOCK=BLOCK)
        return d_gate, d_up


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm` of qwen.py; a trained weight's gradient is left to torch."""
    return qwen.norm(x, weight, eps) if weight.requires_grad else Norm.apply(x, weight, eps)


class Norm(torch.autograd.Function):
    """One kernel each way. The gradient may be a strided view: portable.Project hands on one that a product made."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps, out = eps, torch.empty_like(x)
        assert x.is_contiguous(), f"strides {x.stride()}"
        norm_kernel[(len(x),)](x, weight, out, eps, C=x.shape[1], WIDE=triton.next_power_of_2(x.shape[1]), num_warps=4)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, d_x, wide = grad if grad.stride(1) == 1 else grad.contiguous(), torch.empty_like(x), x.shape[1]
        norm_backward_kernel[(len(x),)](
            grad, x, weight, d_x, grad.stride(0), ctx.eps, C=wide, WIDE=triton.next_power_of_2(wide), num_warps=4
        )
        return d_x, None, None


def row_statistics(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
    """Of portable.py, the logits read once."""
    n, V = logits.shape
    lse, chosen, top, entropy = torch.empty(4, n, device=logits.device)
    statistics_kernel[(n,)](logits, targets, lse, chosen, top, entropy, V, 1 / temperature, ENTROPY=with_entropy,
                            SIZE=4096, num_warps=8)  # fmt: skip
    return lse, chosen, top, entropy if with_entropy else None


def logits_gradient(logits: Tensor, lse: Tensor, targets: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """Of portable.py, written over the logits."""
    (n, V), factor = logits.shape, grad / temperature
    gradient_kernel[(n, triton.cdiv(V, 8192))](logits, lse, targets, factor, V, 1 / temperature, SIZE=8192, num_warps=8)
    return logits


def logprobs(*args) -> tuple[Tensor, Tensor | None, Tensor]:
    """`target_logprobs` of qwen.py, with its arguments."""
    return portable.TargetLogprobs.apply(*args, (row_statistics, logits_gradient))


if triton:

    @triton.jit
    def statistics_kernel(logits, targets, lse, chosen, top, entropy, V, inverse, ENTROPY: tl.constexpr,
                          SIZE: tl.constexpr):  # fmt: skip
        """A row a program: every lane keeps its largest logit, and sums relative to it."""
        n = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, SIZE)
        high = tl.full([SIZE], -1e30, tl.float32)
        total, weighted = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
        for first in range(0, V, SIZE):
            z = tl.load(logits + n * V + first + i, mask=first + i < V, other=float("-inf")).to(tl.float32) * inverse
            z = tl.where(z < -1e30, -1e30, z)  # a NaN stays one
            higher = tl.maximum(high, z)
            fade, weight = tl.exp(high - higher), tl.exp(z - higher)
            if ENTROPY:
                weighted = fade * (weighted + (high - higher) * total) + weight * (z - higher)
            total, high = fade * total + weight, higher
        highest = tl.max(high, 0)
        fade = tl.exp(high - highest)
        whole = tl.sum(total * fade, 0)
        tl.store(lse + n, highest + tl.log(whole))
        tl.store(top + n, highest)
        z = tl.load(logits + n * V + tl.load(targets + n)).to(tl.float32) * inverse
        tl.store(chosen + n, z)
        if ENTROPY:  # log of the sum - mean of z - highest
            tl.store(entropy + n, tl.log(whole) - tl.sum(fade * (weighted + (high - highest) * total), 0) / whole)

    @triton.jit
    def gradient_kernel(logits, lse, targets, factor, V, inverse, SIZE: tl.constexpr):
        n = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        z = tl.load(logits + n * V + i, mask=i < V, other=0.0).to(tl.float32) * inverse
        right = (i == tl.load(targets + n)).to(tl.float32)
        d = (right - tl.exp(z - tl.load(lse + n))) * tl.load(factor + n)
        tl.store(logits + n * V + i, d, mask=i < V)

    @triton.jit
    def normalised(x, t, eps, C: tl.constexpr, WIDE: tl.constexpr):
        """Row t of x over its root mean square, the inverse of that, and which of WIDE numbers are in the row."""
        i = tl.arange(0, WIDE)
        row = tl.load(x + t * C + i, mask=i < C, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(row * row, 0) / C + eps)
        return row * inverse, inverse, i

    @triton.jit
    def norm_kernel(x, weight, out, eps, C: tl.constexpr, WIDE: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        unit, _, i = normalised(x, t, eps, C, WIDE)
        tl.store(out + t * C + i, unit * tl.load(weight + i, mask=i < C, other=0.0).to(tl.float32), mask=i < C)

    @triton.jit
    def norm_backward_kernel(grad, x, weight, d_x, stride, eps, C: tl.constexpr, WIDE: tl.constexpr):
        """With u = x / rms and g = grad * weight: d_x = (g - u mean(g u)) / rms."""
        t = tl.program_id(0).to(tl.int64)
        unit, inverse, i = normalised(x, t, eps, C, WIDE)
        g = tl.load(grad + t * stride + i, mask=i < C, other=0.0).to(tl.float32)
        g *= tl.load(weight + i, mask=i < C, other=0.0).to(tl.float32)
        tl.store(d_x + t * C + i, (g - unit * (tl.sum(g * unit, 0) / C)) * inverse, mask=i < C)

    @triton.jit
    def swiglu_kernel(gate, up, out, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(gate + i, mask=i < n).to(tl.float32)
        u = tl.load(up + i, mask=i < n).to(tl.float32)
        tl.store(out + i, g * tl.sigmoid(g) * u, mask=i < n)

    @triton.jit
    def swiglu_backward_kernel(grad, gate, up, d_gate, d_up, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        d = tl.load(grad + i, mask=i < n).to(tl.float32)
        g = tl.load(gate + i, mask=i < n).to(tl.float32)
        u = tl.load(up + i, mask=i < n).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(d_up + i, d * g * s, mask=i < n)
        tl.store(d_gate + i, d * u * s * (1 + g * (1 - s)), mask=i < n)


FORMS = dict(portable.FORMS, attention=attention, tower_attention=tower_attention)
if triton:
    rotate = lambda x, tables: Rotate.apply(x, *tables)
    FORMS |= dict(norm=norm, swiglu=SwiGLU.apply, rotate=rotate, logprobs=logprobs)

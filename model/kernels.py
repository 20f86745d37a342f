"""Hand-written Triton kernels for what costs more in memory traffic than in arithmetic: rotary embedding and
SwiGLU, forward and backward. Each has its plain twin beside it, which is also the path on a CPU; `swiglu` and `turn`
choose. Triton comes with torch's CUDA builds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring none
    triton = None

BLOCK = 2048  # numbers a program handles; 4 KB of bf16


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; the two of one shape. One kernel each way on a GPU, instead of three and four."""
    if triton and gate.is_cuda and gate.is_contiguous() and up.is_contiguous():
        return SwiGLU.apply(gate, up)
    return cpu.SwiGLU.apply(gate, up) if cpu.handles(gate) else F.silu(gate) * up


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain twin of the rotary kernel: turn the pairs (x_i, x_{i+D/2}). x: (T, H, D); cos, sin: (T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x turned by sign times its angles, as a new tensor. x: (T, H, D), rows may be strided, heads side by side."""
    if cpu.handles(x):
        return cpu.turn(x, cos, sin, sign)
    if not (triton and x.is_cuda):
        return rotate_pairs(x, cos, sin if sign > 0 else -sin)
    T, H, D = x.shape
    assert x.stride(2) == 1 and x.stride(1) == D, f"heads lie side by side, found strides {x.stride()}"
    assert cos.is_contiguous() and sin.is_contiguous(), f"tables lie row by row, found strides {cos.stride()}"
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    heads, half = triton.next_power_of_2(min(H, BLOCK // D)), triton.next_power_of_2(D // 2)
    rotary_kernel[(T, triton.cdiv(H, heads))](x, out, cos, sin, x.stride(0), H, sign, D=D, HALF=half, HEADS=heads)
    return out


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
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


if triton:

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

    @triton.jit
    def rotary_kernel(x, out, cos, sin, stride, H, sign, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        i = tl.arange(0, HALF)[None, :]
        inside = (head < H) & (i < D // 2)
        c = tl.load(cos + t * (D // 2) + i, mask=i < D // 2).to(tl.float32)
        s = tl.load(sin + t * (D // 2) + i, mask=i < D // 2).to(tl.float32) * sign
        first = x + t * stride + head * D + i
        a = tl.load(first, mask=inside).to(tl.float32)
        b = tl.load(first + D // 2, mask=inside).to(tl.float32)
        to = out + (t * H + head) * D + i
        tl.store(to, a * c - b * s, mask=inside)
        tl.store(to + D // 2, b * c + a * s, mask=inside)

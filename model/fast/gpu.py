"""Fast forms on CUDA: FlashAttention, and Triton kernels for what costs more in memory traffic than in arithmetic.

Triton comes with torch's CUDA builds. Without it rotary embedding and SwiGLU stay plain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.fast import portable
from model.packed import Segments

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring none
    triton = None

BLOCK = 2048  # numbers a program handles; 4 KB of bf16
# Mean length from which on. No smaller than graphs.ROWS: these lengths are the host's, which a graph would freeze.
LONG, LONG_STEP = 8192, 512


# -- Attention


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attention` of qwen.py: bf16 and fp16 by FlashAttention's variable-length kernel, the rest by dense batches."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return portable.attention(q, k, v, segments)
    assert q.shape[0] == segments.num_tokens, f"{q.shape[0]} queries, but segments of {segments.num_tokens}"
    if is_long(q, segments):
        return long_attention(q, k, v, segments)
    if segments.kv_index is not None:
        k, v = k.index_select(0, segments.kv_index), v.index_select(0, segments.kv_index)
    return FlashVarlen.apply(q, k, v, segments)


def is_long(q: Tensor, segments: Segments) -> bool:
    """Whether cuDNN's kernels are worth a call for each segment: on Hopper cards alone they outrun FlashAttention 2."""
    square = segments.is_causal and segments.kv_index is None and segments.q_lengths == segments.k_lengths
    if not square or segments.num_tokens <= LONG * len(segments.q_lengths):
        return False
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    return hopper and not torch.are_deterministic_algorithms_enabled()  # its backward pass adds up in any order


def long_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Few long causal segments by cuDNN, one after the other. Each is padded at its end, which nothing before it sees:
    cuDNN plans its kernels anew for every length."""
    outs = []
    for n, *heads in zip(segments.q_lengths, *(x.split(segments.q_lengths) for x in (q, k, v))):
        padded = (F.pad(x, (0, 0, 0, 0, 0, -n % LONG_STEP)) if n % LONG_STEP else x for x in heads)
        heads = [x.transpose(0, 1)[None] for x in padded]  # (1, H or K, n, D)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out[0].transpose(0, 1)[:n])
    return torch.cat(outs) if len(outs) > 1 else outs[0]


class FlashVarlen(torch.autograd.Function):
    """FlashAttention 2 (Dao, 2023; arXiv 2307.08691) as it ships with torch: no padding, no mask. Called below
    `torch.nn.attention.varlen`, because that wrapper of torch 2.11 refuses K < H, which the kernels themselves take."""

    @staticmethod
    def forward(ctx, q, k, v, segments):
        sizes = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, 0.0, segments.is_causal)
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, False)
        ctx.save_for_backward(q, k, v, out, lse, rng_state, unused)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, rng_state, unused = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, *ctx.sizes, rng_state, unused
        )
        return *grads, None


# -- Elementwise kernels


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


class Rotate(torch.autograd.Function):
    """One kernel. The gradient is turned back, so only the tables are kept for it."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return turn(grad.contiguous(), *ctx.saved_tensors, -1.0), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x (T, H, D) turned by sign times its angles; its rows may be strided, heads lie side by side. cos, sin:
    (T, 1, D/2)."""
    T, H, D = x.shape
    assert x.stride(2) == 1 and x.stride(1) == D, f"heads lie side by side, not with strides {x.stride()}"
    assert cos.is_contiguous() and sin.is_contiguous(), f"tables lie row by row, not with strides {cos.stride()}"
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    heads, half = triton.next_power_of_2(min(H, BLOCK // D)), triton.next_power_of_2(D // 2)
    rotary_kernel[(T, triton.cdiv(H, heads))](x, out, cos, sin, x.stride(0), H, sign, D=D, HALF=half, HEADS=heads)
    return out


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


FORMS = dict(portable.FORMS, attention=attention)
if triton:
    FORMS |= dict(swiglu=SwiGLU.apply, rotate=lambda x, tables: Rotate.apply(x, *tables))

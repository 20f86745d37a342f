"""Rotary embedding and attention on CUDA. Attention goes by the kernel that is fastest for the segments: windows of the
vision tower by one of our own, large batches of long ones or of one length by cuDNN, all others by FlashAttention."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import qwen
from model.fast import portable
from model.packed import Segments

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring none
    triton = None

BLOCK = 2048  # numbers a program of rotary_kernel handles
WINDOW = 64  # patches of a whole window of the released models: 8 x 8
LARGE = 8192  # tokens; no fewer than graphs.ROWS, for a graph would freeze the host's lengths
LEAST = 256  # length of many segments of one length
LONG, LONG_STEP = 8192, 512  # mean length of segments that go one after the other; what each is padded to
_met: set = set()  # shapes of large batches of one length


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attention` of qwen.py in bf16 and fp16; in float32, and before Ampere, by portable.py's dense batches."""
    is_old = torch.cuda.get_device_capability(q.device) < (8, 0)  # FlashAttention refuses it
    if is_old or q.dtype not in (torch.bfloat16, torch.float16) or (segments.prefix and not triton):
        return portable.attention(q, k, v, segments)
    assert q.shape[0] == segments.num_tokens, f"{q.shape[0]} queries, but segments of {segments.num_tokens}"
    if is_dense(q, segments):
        return dense_attention(q, k, v, segments)
    return (Flash if segments.prefix is None else FlashWithPrefix).apply(q, k, v, segments)


# -- By cuDNN


def is_dense(q: Tensor, segments: Segments) -> bool:
    """Whether cuDNN takes them: long causal segments, and large batches of segments of one length whose shape was met
    before: it plans its kernels anew for every shape, for 0.05 s. Only on Hopper cards they outrun FlashAttention 2."""
    lengths = segments.q_lengths
    if segments.num_tokens <= LARGE or segments.prefix or lengths != segments.k_lengths:
        return False
    if torch.cuda.get_device_capability(q.device)[0] != 9 or torch.are_deterministic_algorithms_enabled():
        return False  # its backward pass adds up in any order
    if segments.is_causal and segments.num_tokens > LONG * len(lengths):
        return True
    if not is_uniform(lengths) or lengths[0] < LEAST:
        return False
    if segments.recurs is None:  # decided by the first of the layers that share them
        shape = len(lengths), lengths[0], *q.shape[1:], segments.is_causal
        segments.recurs = shape in _met
        _met.add(shape)
    return segments.recurs


def is_uniform(lengths: list[int]) -> bool:
    return len(lengths) > 1 and len(set(lengths)) == 1


def dense_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Segments of one length as they lie, others one after the other, padded to fewer lengths that need a plan: at the
    end, which nothing before it sees."""
    lengths = segments.q_lengths
    if is_uniform(lengths):
        return cudnn(*(x.view(-1, lengths[0], *x.shape[1:]) for x in (q, k, v)), segments.is_causal).flatten(0, 1)
    outs = []
    for n, *heads in zip(lengths, *(x.split(lengths) for x in (q, k, v))):
        if missing := -n % LONG_STEP:
            heads = [F.pad(x, (0, 0, 0, 0, 0, missing)) for x in heads]
        outs.append(cudnn(*(x[None] for x in heads), is_causal=True)[0, :n])
    return portable.stack(outs)


def cudnn(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """(b, n, H, D), keys and values (b, n, K, D) -> (b, n, H, D)."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(*heads, is_causal=is_causal, enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


# -- All other segments


def flash(q: Tensor, k: Tensor, v: Tensor, s: Segments) -> tuple[Tensor, ...]:
    """FlashAttention 2 (Dao, 2023; arXiv 2307.08691) as it ships with torch: no padding, no mask. Returns (T, H, D),
    the log-sum-exp (H, T) float32, and what the backward pass wants beside. Called below `torch.nn.attention.varlen`,
    because that wrapper of torch 2.11 refuses K < H, which the kernels themselves take."""
    sizes = s.cu_q, s.cu_k, s.max_q, s.max_k
    return torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, s.is_causal, False)[:4]


def flash_backward(grad: Tensor, q, k, v, out, lse, s: Segments, *state) -> tuple[Tensor, ...]:
    """Gradients of q, k, v."""
    sizes = s.cu_q, s.cu_k, s.max_q, s.max_k
    return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, *sizes, 0.0, s.is_causal, *state)


class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments):
        out, lse, *state = flash(q, k, v, segments)
        ctx.save_for_backward(q, k, v, out, lse, *state)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, *state = ctx.saved_tensors
        return *flash_backward(grad.contiguous(), q, k, v, out, lse, ctx.segments, *state), None


class FlashWithPrefix(torch.autograd.Function):
    """The prefix by one call, where the completions of a prompt are one large segment and nothing is causal, and a
    query's own segment by another. The two results of a query are weighted by their sums of exponentials; with the log
    of both sums together each backward call finds the weights of the whole softmax."""

    @staticmethod
    def forward(ctx, q, k, v, segments):
        out, lse, *state = flash(q, k, v, segments)
        other, other_lse, *_ = flash(q, k, v, segments.prefix)
        T, H, D = out.shape
        merge_kernel[(T,)](out, lse, other, other_lse, T, H=H, D=D, WIDE=triton.next_power_of_2(H * D))
        ctx.save_for_backward(q, k, v, out, lse, *state)  # states are of dropout: there is none, any will do
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, *state = ctx.saved_tensors
        grad = grad.contiguous()
        own, other = (flash_backward(grad, q, k, v, out, lse, s, *state) for s in (ctx.segments, ctx.segments.prefix))
        torch._foreach_add_(own, other)
        return *own, None


if triton:

    @triton.jit
    def merge_kernel(out, lse, other, other_lse, T, H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr):
        """One query a program: out (T, H, D) and lse (H, T) become those of both. A query without keys has +inf as
        FlashAttention's log-sum-exp."""
        t = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, WIDE)
        real, head = i < H * D, i // D
        a = tl.load(lse + head * T + t, mask=real, other=0.0)
        b = tl.load(other_lse + head * T + t, mask=real, other=0.0)
        b = tl.where(b == float("inf"), float("-inf"), b)
        top = tl.maximum(a, b)
        both = top + tl.log(tl.exp(a - top) + tl.exp(b - top))
        x = tl.load(out + t * (H * D) + i, mask=real, other=0.0).to(tl.float32)
        y = tl.load(other + t * (H * D) + i, mask=real, other=0.0).to(tl.float32)
        tl.store(out + t * (H * D) + i, x * tl.exp(a - both) + y * tl.exp(b - both), mask=real)
        tl.debug_barrier()  # all threads of a head have read its old one
        tl.store(lse + head * T + t, both, mask=real & (i % D == 0))


# -- Rotary embedding, and windows of the vision tower


class Rotate(torch.autograd.Function):
    """One kernel. The gradient is turned back, so only the tables are kept for it."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad):
        return turn(grad.contiguous(), *ctx.saved_tensors, -1.0), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor | None = None) -> Tensor:
    """x (T, H, D) turned by sign times its angles, into `out` if it is given; rows of both may be strided, heads lie
    side by side. cos, sin: (T, 1, D/2)."""
    T, H, D = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    assert x.stride()[1:] == out.stride()[1:] == (D, 1), f"heads lie side by side, not with strides {x.stride()}"
    assert cos.is_contiguous() and sin.is_contiguous(), f"tables lie row by row, not with strides {cos.stride()}"
    sizes = {"D": D, "HALF": triton.next_power_of_2(D // 2), "HEADS": triton.next_power_of_2(min(H, BLOCK // D))}
    rotary_kernel[(T, triton.cdiv(H, sizes["HEADS"]))](x, out, cos, sin, x.stride(0), out.stride(0), H, sign, **sizes)
    return out


def tower_attention(ops, qkv: Tensor, tables: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    """`tower_attention` of qwen.py, windows in bf16 and fp16 by kernels of their own."""
    if triton and segments.max_q <= WINDOW and qkv.dtype in (torch.bfloat16, torch.float16):
        return Windows.apply(qkv, *tables, segments)
    return qwen.tower_attention(ops, qkv, tables, segments)


class Windows(torch.autograd.Function):
    """Rotary embedding, then full attention within segments of at most WINDOW patches: one program a segment and head,
    which sees all of it. So the softmax is made again in the backward pass, and the gradient is written in one piece.
    FlashAttention spends most of such a segment's time on padding and on sums between programs."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, segments):
        P, H, D = len(qkv), qkv.shape[1] // 3, qkv.shape[2]
        qk, out = turn(qkv[:, : 2 * H], cos, sin, 1.0), qkv.new_empty(P, H, D)
        launch(windows_kernel, segments, qk, qkv, out)
        ctx.save_for_backward(qkv, qk, cos, sin)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, qk, cos, sin = ctx.saved_tensors
        d_qk, d_qkv = torch.empty_like(qk), torch.empty_like(qkv)
        launch(windows_backward_kernel, ctx.segments, qk, qkv, grad.contiguous(), d_qk, d_qkv)
        turn(d_qk, cos, sin, -1.0, out=d_qkv[:, : qk.shape[1]])
        return d_qkv, None, None, None


def launch(kernel, segments, *tensors) -> None:
    """tensors: qk (P, 2 H, D), turned; qkv (P, 3 H, D), of which the last third is read; others (P, H, D) and so on."""
    _, heads, D = tensors[0].shape
    assert not segments.is_causal and segments.max_q == segments.max_k <= WINDOW, f"{segments.max_k} keys"
    assert all(x.is_contiguous() for x in tensors), f"strides {[x.stride() for x in tensors]}"
    grid, wide = (len(segments.cu_q) - 1, heads // 2), max(16, triton.next_power_of_2(D))
    kernel[grid](*tensors, segments.cu_q, D**-0.5, H=heads // 2, D=D, WIDE=wide, SIZE=WINDOW, num_warps=4)


if triton:

    @triton.jit
    def rotary_kernel(
        x, out, cos, sin, stride, pitch, H, sign, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr
    ):
        t = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        i = tl.arange(0, HALF)[None, :]
        inside = (head < H) & (i < D // 2)
        c = tl.load(cos + t * (D // 2) + i, mask=i < D // 2).to(tl.float32)
        s = tl.load(sin + t * (D // 2) + i, mask=i < D // 2).to(tl.float32) * sign
        first = x + t * stride + head * D + i
        a = tl.load(first, mask=inside).to(tl.float32)
        b = tl.load(first + D // 2, mask=inside).to(tl.float32)
        to = out + t * pitch + head * D + i
        tl.store(to, a * c - b * s, mask=inside)
        tl.store(to + D // 2, b * c + a * s, mask=inside)

    @triton.jit
    def window(cu, D: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr):
        """This program's segment: its rows (SIZE, 1), the columns (1, WIDE) of its head, which of both are real, and
        which keys are (1, SIZE)."""
        first = tl.load(cu + tl.program_id(0)).to(tl.int64)
        n = tl.load(cu + tl.program_id(0) + 1) - first
        i, d = tl.arange(0, SIZE), tl.arange(0, WIDE)
        real = (i < n)[:, None] & (d < D)[None, :]
        return (first + i)[:, None], (tl.program_id(1) * D + d)[None, :], real, (i < n)[None, :]

    @triton.jit
    def softmax_of(q, k, keys, scale):
        """(SIZE, SIZE) in float32; rows beyond the segment hold numbers that nobody reads."""
        scores = tl.where(keys, tl.dot(q, tl.trans(k)) * scale, -1e30)
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        return weights / tl.sum(weights, 1)[:, None]

    @triton.jit
    def windows_kernel(qk, qkv, out, cu, scale, H: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
                       SIZE: tl.constexpr):  # fmt: skip
        row, column, real, keys = window(cu, D, WIDE, SIZE)
        q = tl.load(qk + row * (2 * H * D) + column, mask=real, other=0.0)
        k = tl.load(qk + row * (2 * H * D) + H * D + column, mask=real, other=0.0)
        v = tl.load(qkv + row * (3 * H * D) + 2 * H * D + column, mask=real, other=0.0)
        p = softmax_of(q, k, keys, scale)
        tl.store(out + row * (H * D) + column, tl.dot(p.to(v.dtype), v), mask=real)

    @triton.jit
    def windows_backward_kernel(qk, qkv, grad, d_qk, d_qkv, cu, scale, H: tl.constexpr, D: tl.constexpr,
                                WIDE: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
        """With o = p v: d_v = p^T d_o, d_p = d_o v^T, d_s = p (d_p - sum of p d_p over the keys)."""
        row, column, real, keys = window(cu, D, WIDE, SIZE)
        at_q, at_v = row * (2 * H * D) + column, row * (3 * H * D) + 2 * H * D + column
        q = tl.load(qk + at_q, mask=real, other=0.0)
        k = tl.load(qk + at_q + H * D, mask=real, other=0.0)
        p = softmax_of(q, k, keys, scale)
        d_o = tl.load(grad + row * (H * D) + column, mask=real, other=0.0)  # zeros where rows of p mean nothing
        tl.store(d_qkv + at_v, tl.dot(tl.trans(p.to(d_o.dtype)), d_o), mask=real)
        d_p = tl.dot(d_o, tl.trans(tl.load(qkv + at_v, mask=real, other=0.0)))
        d_s = (p * (d_p - tl.sum(p * d_p, 1)[:, None]) * scale).to(q.dtype)
        tl.store(d_qk + at_q, tl.dot(d_s, k), mask=real)
        tl.store(d_qk + at_q + H * D, tl.dot(tl.trans(d_s), q), mask=real)

"""Products with low-bit weights in training and prefill: nothing but codes and scales is kept for the backward pass.

int8 and nf4 are dequantised into a buffer of the product's dtype, each time anew: of a 3B model's 2.8 billion weights
that takes milliseconds a pass. fp8 on a GPU multiplies codes (torch._scaled_mm), the input rounded row by row; a CPU
rounds likewise and multiplies dequantised numbers. The gradient passes by the dequantised weights in every format.
The products of decoding are in kernels.py, but for nf4's sums, which are here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.quantized import BLOCK, E4M3, NF4, Quantized, rounded_rows

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch bring none
    triton = nf4_sums = None

LEAST_ROWS = 512  # rows of x from which on fp8 products outrun bf16 ones
_pairs: dict = {}  # device -> (256, 2) float32: the numbers of a byte's high and low half


def dequantise(weight: Quantized, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """weight.dequantise, into `out`, whose rows may be strided, if it is given; by one kernel on a GPU."""
    is_fp8 = weight.kind == "fp8"
    if triton is None or weight.device.type == "cpu" or (is_fp8 and not has_e4m3(weight.device)):
        whole = weight.dequantise(dtype)
        return whole if out is None else out.copy_(whole)
    (N, K), bytes_a_row = weight.shape, weight.codes.shape[1]
    if weight.device not in _pairs:
        byte = torch.arange(256)
        _pairs[weight.device] = torch.stack([NF4[byte >> 4], NF4[byte & 15]], 1).to(weight.device)
    out = torch.empty(N, K, dtype=dtype, device=weight.device) if out is None else out
    codes, stride = weight.codes.view(E4M3) if is_fp8 else weight.codes, weight.scales.stride(0) * (not is_fp8)
    dequantise_kernel[(triton.cdiv(bytes_a_row, 1024), N)](
        codes, weight.scales, _pairs[weight.device], out, K, bytes_a_row, stride, out.stride(0),
        IS_NF4=weight.kind == "nf4", GROUP=BLOCK, SIZE=1024, num_warps=4,
    )  # fmt: skip
    return out


def has_e4m3(device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """rounded_rows, by one kernel on a GPU that has e4m3."""
    if triton is None or not has_e4m3(x.device):
        return rounded_rows(x)
    x = x.contiguous()
    codes, scales = torch.empty_like(x, dtype=E4M3), torch.empty(len(x), 1, device=x.device)
    size = triton.next_power_of_2(x.shape[1])
    round_rows_kernel[(len(x),)](x, codes, scales, x.shape[1], SIZE=size, num_warps=min(16, max(1, size // 512)))
    return codes, scales


def product(x: Tensor, weight: Quantized, bias: Tensor | None = None, rounded=None) -> Tensor:
    """x (T, in) W^T + b -> (T, out), without autograd. rounded: round_rows(x), where it was made for another weight."""
    if weight.kind == "fp8":
        codes, scales = rounded or round_rows(x)
        is_large = x.dtype == torch.bfloat16 and len(x) >= LEAST_ROWS and all(n % 16 == 0 for n in weight.shape)
        if is_large and has_e4m3(x.device):
            return scaled_product(codes, scales, weight.codes.view(E4M3), weight.scales, bias)
        x = (codes.float() * scales).to(x.dtype)
    return F.linear(x, dequantise(weight, x.dtype), bias)


def scaled_product(codes: Tensor, scales: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """bf16 (scales codes) (scale weight)^T: codes e4m3 (T, K), scales (T, 1), weight e4m3 (N, K), scale (1, 1)."""
    scale = scale.repeat(1, len(weight))
    return torch._scaled_mm(codes, weight.t(), scales, scale, bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def permutes() -> str:
    """PTX: four bytes of nf4 -> the bf16 numbers of their high halves ($0, $1) and low halves ($2, $3). A table in
    memory, or comparisons, would take longer than reading bf16.

    A permute picks four of eight bytes by the low three bits of four selectors. So high and low bytes of the 16 codes
    are picked from codes 0 to 7 and from 8 to 15, and the selector's fourth bit, spread over a byte, chooses."""
    planes = NF4.to(torch.bfloat16).view(torch.uint8).view(16, 2).T  # low bytes, high bytes
    words = [[f"0x{int.from_bytes(bytes(plane[i : i + 4].tolist()), 'little'):08x}" for i in (0, 4, 8, 12)]
             for plane in planes]  # fmt: skip
    text = ["{", ".reg .b32 u, s0, s1, m0, m1, a, b, l0, l1, h0, h1;", "shl.b32 u, $4, 4;"]
    text += ["and.b32 s0, $4, 0x7777;", "shr.u32 s1, $4, 16;", "and.b32 s1, s1, 0x7777;"]
    text += ["prmt.b32 m0, u, $4, 0xd9c8;", "prmt.b32 m1, u, $4, 0xfbea;"]  # fourth bits of four halves each
    for name, plane in zip("lh", words):
        for i in (0, 1):
            text += [f"prmt.b32 a, {plane[0]}, {plane[1]}, s{i};", f"prmt.b32 b, {plane[2]}, {plane[3]}, s{i};"]
            text += [f"lop3.b32 {name}{i}, a, b, m{i}, 0xd8;"]  # b where the mask is set, else a
    text += ["prmt.b32 $0, l0, h0, 0x7351;", "prmt.b32 $1, l1, h1, 0x7351;"]
    return "\n".join([*text, "prmt.b32 $2, l0, h0, 0x6240;", "prmt.b32 $3, l1, h1, 0x6240;", "}"])


if triton:
    PERMUTES: tl.constexpr = tl.constexpr(permutes())

    @triton.jit
    def dequantise_kernel(codes, scales, table, out, K, BYTES, stride, pitch, IS_NF4: tl.constexpr,
                          GROUP: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
        """out (N, K) = codes (N, BYTES) times scales, in float32, rounded once. stride: from a row's scales to the
        next row's, 0 where it is the same one; pitch: of out. table (256, 2): the numbers of a byte of nf4."""
        n = tl.program_id(1).to(tl.int64)
        i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        byte = tl.load(codes + n * BYTES + i, mask=i < BYTES)
        if IS_NF4:
            k = i // GROUP * (2 * GROUP) + i % GROUP
            first = scales + n * stride + i // GROUP * 2
            high = tl.load(table + byte.to(tl.int32) * 2) * tl.load(first, mask=k < K, other=0.0).to(tl.float32)
            low = tl.load(table + byte.to(tl.int32) * 2 + 1)
            low *= tl.load(first + 1, mask=k + GROUP < K, other=0.0).to(tl.float32)
            tl.store(out + n * pitch + k, high, mask=k < K)
            tl.store(out + n * pitch + k + GROUP, low, mask=k + GROUP < K)
        else:
            tl.store(out + n * pitch + i, byte.to(tl.float32) * tl.load(scales + n * stride), mask=i < K)

    @triton.jit
    def round_rows_kernel(x, codes, scales, K: tl.constexpr, SIZE: tl.constexpr):
        """A row a program."""
        t = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, SIZE)
        row = tl.load(x + t * K + i, mask=i < K, other=0.0).to(tl.float32)
        scale = tl.max(tl.abs(row), 0) / 448.0
        tl.store(scales + t, scale)
        row = tl.minimum(tl.maximum(row * (1.0 / tl.where(scale == 0, 1.0, scale)), -448.0), 448.0)
        tl.store(codes + t * K + i, row.to(tl.float8e4nv), mask=i < K)

    @triton.jit
    def add_nf4(acc, byte, pair, a_high, a_low):
        """acc + a tile of 128 columns: bytes (64, N), two scales (N,) in 32 bits, the columns of x for either half."""
        high, low = tl.inline_asm_elementwise(
            PERMUTES, "=r,=r,=r,=r,r", [byte], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        acc += tl.dot(a_high, high) * (pair << 16).to(tl.float32, bitcast=True)[None, :]
        return acc + tl.dot(a_low, low) * ((pair >> 16) << 16).to(tl.float32, bitcast=True)[None, :]

    @triton.jit
    def nf4_sums(x, w, w_up, scales, up_scales, m, rows, first, R, K: tl.constexpr, STEPS: tl.constexpr,
                 SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
        """kernels.sums for nf4, scales included, 128 columns a step: quantized.TILE."""
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        TILES: tl.constexpr = (K + 127) // 128
        k = tl.arange(0, 64)
        from_x = x + m[:, None] * K + first + k[None, :]
        place, block = first // 2 + rows[None, :] * (TILES * 64) + k[:, None], first // 128 + rows * TILES
        for i in range(STEPS):
            left = K - first - i * 128  # of a last step beyond the row nothing is read
            a = tl.load(from_x + i * 128, mask=(m[:, None] < R) & (k[None, :] < left), other=0.0)
            b = tl.load(from_x + i * 128 + 64, mask=(m[:, None] < R) & (k[None, :] + 64 < left), other=0.0)
            byte = tl.load(w + place + i * 64, mask=left > 0, other=0)
            acc = add_nf4(acc, byte, tl.load(scales + block + i, mask=left > 0, other=0), a, b)
            if SWIGLU:
                byte = tl.load(w_up + place + i * 64, mask=left > 0, other=0)
                up = add_nf4(up, byte, tl.load(up_scales + block + i, mask=left > 0, other=0), a, b)
        return acc, up

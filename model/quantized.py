"""Frozen weights in 8 or 4 bits: the formats, in plain PyTorch. Fast forms: model/fast/quantized.py.

    int8   a row's weights are q s, q in -127..127, s = max|row| / 127 in float32                     8 bits a weight
    fp8    e4m3 (4 bits of exponent, 3 of mantissa) times one power of two a tensor: exact in bf16    8
    nf4    codes of 4 bits, the quantiles of a normal distribution, times the largest of each 64
           neighbours of a row (Dettmers et al., 2023; arXiv 2305.14314; bitsandbytes' codes)         4.25

Only the seven linears of each decoder layer are kept so: the vision tower, norms, biases, embedding and head are a
small share of the bytes, and the tower bears it badly. Errors of the weights, of their size: 0.8, 2.6 and 9.2 %.
Where every GiB counts, a head of its own may be kept in int8 too, and the embedding in host memory.

Products with fp8 weights round their input, too: each row to e4m3 times its own scale.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE_DTYPES = ("bf16", "fp8", "int8", "nf4")
LOW_BIT = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0
BLOCK = 64  # weights that share a scale of nf4
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PIECE = 1 << 24  # weights that are quantised, or of a head dequantised, at a time
TILE = 2 * BLOCK  # weights whose codes share 64 bytes: weight k of them in the high half of byte k, k + 64 in the low
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


class Quantized(nn.Module):
    """A frozen weight (out, in) in one of the formats; it stands where a Linear has its parameter `weight`.

    kind: fp8, int8 or nf4. codes: int8 (out, in); of fp8 the bytes (uint8); of nf4 uint8 (out, tiles * 64), two a byte.
    scales: float32 (out, 1) of int8, (1, 1) of fp8; bfloat16 (out, in / 64 rounded up to an even number) of nf4.
    dtype: what products with it are computed in. A module, so that it moves with the model; it has no parameter.
    """

    requires_grad = False
    device = property(lambda self: self.codes.device)

    def __init__(self, kind: str, codes: Tensor, scales: Tensor, shape, dtype: torch.dtype):
        super().__init__()
        self.kind, self.codes, self.scales, self.shape, self.dtype = kind, codes, scales, torch.Size(shape), dtype
        self.twin = None  # on a CPU, where reading codes costs more than memory: the dequantised weight

    def numel(self) -> int:
        return self.shape.numel()

    def _apply(self, fn, recurse=True):
        """.to() and the like: codes and scales change their device, never their dtype."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.codes, self.scales = self.codes.to(like.device), self.scales.to(like.device)
        self.dtype, self.twin = like.dtype, None
        return self

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """(out, in): computed in float32, rounded once."""
        if self.twin is not None and self.twin.dtype == dtype:
            return self.twin
        if self.kind == "nf4":
            blocks = NF4.to(self.device)[self.nf4_codes().long()].view(len(self.codes), -1, BLOCK)
            whole = (blocks * self.scales.float()[..., None]).flatten(1)[:, : self.shape[1]]
        else:
            codes = self.codes.view(E4M3) if self.kind == "fp8" else self.codes
            whole = codes.float() * self.scales
        whole = whole.to(dtype).contiguous()
        if self.device.type == "cpu":
            self.twin = whole
        return whole

    def blocks(self) -> "list[Quantized]":
        """Its rows, at most PIECE weights a block, as views. Not of fp8, whose rows share one scale."""
        pieces = (x.split(max(1, PIECE // self.shape[1])) for x in (self.codes, self.scales))
        shape = lambda codes: (len(codes), self.shape[1])
        return [Quantized(self.kind, codes, scales, shape(codes), self.dtype) for codes, scales in zip(*pieces)]

    def nf4_codes(self) -> Tensor:
        """(out, in rounded up to tiles) uint8, 0 to 15, in the order of the weights."""
        tiles = self.codes.view(len(self.codes), -1, BLOCK)
        return torch.cat([tiles >> 4, tiles & 15], dim=2).flatten(1)


def quantise(weight: Tensor, kind: str, dtype: torch.dtype) -> Quantized:
    """weight (out, in) in a format of BASE_DTYPES. dtype: of the products with it."""
    if kind != "fp8" and weight.numel() > PIECE and not weight.is_meta:  # by rows: on the way they take much memory
        pieces = [quantise(rows, kind, dtype) for rows in weight.split(max(1, PIECE // weight.shape[1]))]
        codes, scales = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("codes", "scales"))
        return Quantized(kind, codes, scales, weight.shape, dtype)
    w = weight.detach().float()
    if kind == "int8":
        scales = w.abs().amax(1, keepdim=True) / 127
        codes = (w / scales.masked_fill(scales == 0, 1)).round().clamp(-127, 127).to(torch.int8)
    elif kind == "fp8":
        mantissa, exponent = torch.frexp(w.abs().amax() / E4M3_MAX)  # the next power of two
        one = mantissa * 0 + 1  # NaN where a weight is NaN or Inf, of which no exponent would tell
        scales = torch.ldexp(one, exponent - (mantissa == 0.5).int()).view(1, 1)
        codes = to_e4m3(w / scales).view(torch.uint8)
    else:  # bitsandbytes' rule: w times the reciprocal of its block's largest, then the nearest code, of two the lower
        blocks = F.pad(w, (0, -w.shape[1] % TILE)).view(len(w), -1, BLOCK)
        scales = blocks.abs().amax(2).to(torch.bfloat16)  # (out, blocks); released weights have it exactly
        largest = scales.float()[..., None]
        unit = blocks * torch.where(largest == 0, largest, 1 / largest)
        middles = ((NF4[1:] + NF4[:-1]) / 2).to(w.device)
        codes = torch.bucketize(unit.clamp(-1, 1), middles).to(torch.uint8)
        high, low = codes.view(len(w), -1, 2, BLOCK).unbind(2)
        codes = (high << 4 | low).flatten(1)
    return Quantized(kind, codes, scales, w.shape, dtype)


def to_e4m3(x: Tensor) -> Tensor:
    """Clamped first: what is larger becomes NaN in torch 2.11, and 448 in 2.13."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, n) -> e4m3 (T, n) and float32 scales (T, 1): what a product with fp8 weights takes."""
    scales = x.abs().amax(1, keepdim=True).float() / E4M3_MAX
    return to_e4m3(x.float() / scales.masked_fill(scales == 0, 1)), scales


def product(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """x (T, in) W^T + b -> (T, out). The gradient passes through the rounding of x as if there were none."""
    if weight.kind == "fp8":
        codes, scales = rounded_rows(x.detach())
        x = x + ((codes.float() * scales).to(x.dtype) - x).detach()
    return F.linear(x, weight.dequantise(x.dtype), bias)


def head_product(x: Tensor, head: Quantized, times=product) -> Tensor:
    """x (n, C) head^T -> (n, V), the head in int8 and never dequantised whole. times: the form of `product`."""
    return torch.cat([times(x, block) for block in head.blocks()], 1)


class HostEmbedding(nn.Module):
    """A frozen embedding whose weight (V, C) stays in host memory: only looked-up rows go to the device of the ids,
    for which the host waits. No parameter: those move with the model, and DeepSpeed sends them to the other ranks."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def _apply(self, fn, recurse=True):
        """.to() and the like change its dtype, never its device."""
        self.weight = self.weight.to(fn(self.weight[:0]).dtype)
        return self

    def forward(self, ids: Tensor) -> Tensor:  # (n,) -> (n, C)
        rows = torch.empty(len(ids), self.weight.shape[1], dtype=self.weight.dtype, pin_memory=ids.is_cuda)
        torch.index_select(self.weight, 0, ids.cpu(), out=rows)
        return rows.to(ids.device, non_blocking=True)


def format_of(name: str, base_dtype: str, head_dtype: str) -> str:
    """Of a model's weight by its name; bf16 stands for the dtype of the products."""
    if name == HEAD:
        return head_dtype
    return base_dtype if LOW_BIT.fullmatch(name) else "bf16"


def put(module: nn.Module, name: str, weight: "Tensor | Quantized") -> None:
    """Replace a parameter of a model by name."""
    owner, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner)
    delattr(owner, leaf)
    setattr(owner, leaf, weight if isinstance(weight, Quantized) else nn.Parameter(weight))


def quantized_weights(model: nn.Module) -> dict[str, Quantized]:
    """{name: weight} of what a model keeps in few bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}

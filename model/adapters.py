"""A Linear with a LoRA adapter, and the one flat parameter that holds all adapters of a block.

    y = x W^T + b + s · (x A^T) B^T        W (out, in) frozen, A (r, in) random, B (out, r) zero at the start
                                           s = alpha / r, or alpha / sqrt(r) when rank-stabilised

DeepSpeed pays for every trained tensor on the host, several times a step: hooks, norms, copies. The 3B model has 828
A's and B's, so those of a block (a decoder layer, a vision block, the merger) lie one behind the other in its parameter
`adapters`, each at a multiple of 8 numbers with zeros between them: 69 tensors.

A block takes its linears through `weights_of`, which makes all views at once; their gradients come back as one tensor.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGN = 8  # bf16 numbers in 16 bytes: products whose sizes are no multiple of it use kernels several times slower


def aligned(n: int) -> int:
    """The next multiple of ALIGN."""
    return -(-n // ALIGN) * ALIGN


def scale_of(args) -> float:
    """s of LoraArgs."""
    return args.lora_alpha / (math.sqrt(args.lora_rank) if args.use_rslora else args.lora_rank)


def shifted(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """weight + scale · B A, summed in fp32 -> (out, in) fp32."""
    return weight.float() + (B.float() @ A.float()) * scale


class Weights(NamedTuple):
    """A linear as the operation `linear` takes it. A is None without an adapter, and where it is switched off."""

    weight: Tensor  # (out, in), or a Quantized
    bias: Tensor | None  # (out,)
    A: Tensor | None = None  # (r, in)
    B: Tensor | None = None  # (out, r)
    scale: float = 0.0
    dropout: float = 0.0  # probability, on the adapter's input; 0 unless the layer trains


def weights_of(block: nn.Module, *linears: nn.Module) -> list[Weights]:
    """The Weights of linears of this block, with its adapters as they are now."""
    home = vars(block).get("block_adapters")
    views, weights = Unpack.apply(block.adapters, home) if home else (), []
    for linear in linears:
        adapter = ()
        if isinstance(linear, LoRALinear) and linear.enabled:
            A, B = views[2 * linear.number : 2 * linear.number + 2]
            adapter = A, B, linear.scaling, linear.dropout if linear.training else 0.0
        weights.append(Weights(linear.weight, linear.bias, *adapter))
    return weights


def has_dropout(block: nn.Module) -> bool:
    """Whether the block trains and has dropout: then it draws random numbers."""
    return block.training and any(getattr(module, "dropout", 0.0) for module in block.modules())


class Unpack(torch.autograd.Function):
    """The flat parameter -> every A and B of the block; their gradients -> its one gradient."""

    @staticmethod
    def forward(ctx, flat, home):
        ctx.shapes, ctx.like = home.shapes, {"dtype": flat.dtype, "device": flat.device}
        ctx.set_materialize_grads(False)
        return tuple(home.pieces(flat))

    @staticmethod
    def backward(ctx, *grads):
        pieces = []
        for grad, (rows, columns) in zip(grads, ctx.shapes, strict=True):
            size = rows * columns
            pieces.append(torch.zeros(size, **ctx.like) if grad is None else grad.reshape(size))
            if padding := -size % ALIGN:
                pieces.append(torch.zeros(padding, **ctx.like))
        return torch.cat(pieces), None


class BlockAdapters:
    """The adapters of one block: its parameter `adapters` (N,), and where in it lies what.

    No module: the block owns the parameter, so that optimizers, .to() and DeepSpeed may exchange its storage.
    """

    def __init__(self, block, layers, rank):
        """layers: the LoRALinears inside block. dtype of A and B: that of the first weight."""
        self.shapes = [shape for m in layers for shape in ((rank, m.in_features), (m.out_features, rank))]
        sizes = [aligned(rows * columns) for rows, columns in self.shapes]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.padding = sum(sizes) - sum(rows * columns for rows, columns in self.shapes)
        self.block, block.block_adapters = block, self
        like = layers[0].weight
        block.adapters = nn.Parameter(torch.zeros(sum(sizes), dtype=like.dtype, device=like.device))
        for number, layer in enumerate(layers):
            layer.home, layer.number = self, number
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))  # as PEFT and Linear itself: bound 1 / sqrt(in)

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """flat (N,) -> its views [A_0, B_0, A_1, B_1, …]. as_strided: a third of the time that split and view take."""
        first = flat.storage_offset()
        return [flat.as_strided(s, (s[1], 1), first + i) for s, i in zip(self.shapes, self.starts, strict=True)]

    def remove(self) -> None:
        del self.block.adapters, self.block.block_adapters


class LoRALinear(nn.Module):
    """A Linear with an adapter beside it. `enabled`: the adapter takes part. The operation `linear` computes it.

    It owns weight and bias under their old names, so the base's state-dict keys do not change. Its A and B are its
    block's: it has none before BlockAdapters(block, layers).
    """

    lora_A = property(lambda self: self.home.pieces(self.home.block.adapters)[2 * self.number])  # (r, in), a view
    lora_B = property(lambda self: self.home.pieces(self.home.block.adapters)[2 * self.number + 1])  # (out, r)

    def __init__(self, base: nn.Linear, args):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scaling, self.dropout, self.enabled = scale_of(args), args.lora_dropout, True

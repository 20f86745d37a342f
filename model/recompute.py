"""Blocks of which only the input is kept: the backward pass computes them again (Chen et al., 2016; arXiv 1604.06174).

What nobody asks for is left out of the second pass: a block's last product. With `ops.offload` the inputs wait in host
memory. A long sequence's MLP goes a piece of its tokens at a time, for its activations are seven times as large as x.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.adapters import Weights, has_dropout
from model.ops import Ops

PIECE = 32_768  # tokens or patches that the MLP of a recomputed block takes at a time


def recomputed(block: nn.Module) -> Callable:
    """The block, keeping only its arguments. The state of the random numbers is kept only where the block draws any:
    that costs the host time."""
    how = {"use_reentrant": False, "preserve_rng_state": has_dropout(block)}
    how["context_fn"] = lambda: (block.ops.during("first"), block.ops.during("again"))

    def run(*args) -> Tensor:
        with saved_tensors_hooks(to_host, from_host) if block.ops.offload else nullcontext():
            return checkpoint(block, *args, **how)

    return run


def to_host(x: Tensor) -> tuple[Tensor, torch.device]:
    """A copy in pinned memory, written in the order of the GPU's work: the host does not wait."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True), x.device


def from_host(saved: tuple[Tensor, torch.device]) -> Tensor:
    return saved[0].to(saved[1], non_blocking=True)


def in_pieces(ops: Ops, function: Callable, x: Tensor, *layers: Weights) -> Tensor:
    """function(x, *layers), token by token of x (T, C), inside a recomputed block: not all rows of x at once."""
    if len(x) <= PIECE:
        return function(x, *layers)
    return InPieces.apply(ops, function, layers, x, *(t for w in layers for t in w if is_trained(t)))


def num_pieces(rows: int) -> int:
    return max(1, -(-rows // PIECE))


def is_trained(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class InPieces(torch.autograd.Function):
    """Keeps x alone, and computes each piece again in its backward pass. trained: those tensors of the layers."""

    @staticmethod
    def forward(ctx, ops, function, layers, x, *trained):
        ctx.save_for_backward(x, *trained)
        ctx.settings = ops, function, layers
        if ops.phase == "again":  # the block's result is not needed
            return torch.empty_like(x)
        return torch.cat([function(piece, *layers) for piece in x.chunk(num_pieces(len(x)))])

    @staticmethod
    def backward(ctx, grad):
        (ops, function, layers), (x, *trained) = ctx.settings, ctx.saved_tensors
        trained = [t.detach().requires_grad_() for t in trained]
        mine = iter(trained)
        layers = [w._make(next(mine) if is_trained(t) else t for t in w) for w in layers]
        d_x, d_trained = [], []
        count = num_pieces(len(x))
        for piece, d_piece in zip(x.chunk(count), grad.chunk(count)):
            piece = piece.detach().requires_grad_()
            with torch.enable_grad(), ops.during("again"):
                grads = torch.autograd.grad(function(piece, *layers), [piece, *trained], d_piece)
            d_x.append(grads[0])
            d_trained = torch._foreach_add(d_trained, grads[1:]) if d_trained else grads[1:]
        return None, None, None, torch.cat(d_x), *d_trained

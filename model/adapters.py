"""A Linear with an adapter beside it, and the one flat parameter that holds all adapters of a block.

    y = x W^T + b + s · (x A^T) B^T        W (out, in) frozen, A (r, in) random, B (out, r) zero at the start
                                           s = alpha / r, or alpha / sqrt(r) when rank-stabilised

DeepSpeed pays for every trained tensor on the host, several times a step: hooks, norms, copies. The 3B model has 828
A's and B's, so those of a block (a decoder layer, a vision block, the merger) lie one behind the other in its parameter
`adapters`, each at a multiple of 8 numbers with zeros between them: 69 tensors.

While a block computes, its layers use views that were made all at once and whose gradients come back as one tensor
(Unpack). At any other time lora_A and lora_B are views of the parameter as it is then.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGN = 8  # bf16 numbers in 16 bytes: products whose sizes are no multiple of it use kernels several times slower


def aligned(n: int) -> int:
    """The next multiple of ALIGN."""
    return -(-n // ALIGN) * ALIGN



def scale_of(args):
    """s of LoraArgs."""
    return args.lora_alpha / (math.sqrt(args.lora_rank) if args.use_rslora else args.lora_rank)


def shifted(weight, A, B, scale):
    """weight + scale · B A, summed in fp32 -> (out, in) fp32."""
    return weight.float() + (B.float() @ A.float()) * scale


class Unpack(torch.autograd.Function):
    """The flat parameter -> every A and B of the block; their gradients -> its one gradient."""

    @staticmethod
    def forward(ctx, flat, adapters):
        ctx.adapters, ctx.like = adapters, {"dtype": flat.dtype, "device": flat.device}
        ctx.set_materialize_grads(False)
        return tuple(adapters.pieces(flat))

    @staticmethod
    def backward(ctx, *grads):
        pieces = []
        for grad, (rows, columns) in zip(grads, ctx.adapters.shapes, strict=True):
            size = rows * columns
            pieces.append(torch.zeros(size, **ctx.like) if grad is None else grad.reshape(size))
            if aligned(size) > size:
                pieces.append(torch.zeros(aligned(size) - size, **ctx.like))
        return torch.cat(pieces), None


class BlockAdapters:
    """The adapters of one block: its parameter `adapters` (N,), and where in it lies what.

    No module: the block owns the parameter, so that optimizers, .to() and DeepSpeed may exchange its storage.
    """

    def __init__(self, block, layers, rank, dtype=None):
        """layers: the LoRALinears inside block. dtype of A and B: that of the first weight unless given."""
        kinds = {(layer.weight.dtype, layer.weight.device) for layer in layers}
        assert len(kinds) == 1, f"one flat parameter for weights of {kinds}"
        self.shapes = [shape for m in layers for shape in ((rank, m.in_features), (m.out_features, rank))]
        sizes = [aligned(rows * columns) for rows, columns in self.shapes]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.padding = sum(sizes) - sum(rows * columns for rows, columns in self.shapes)
        self.block, self.views = block, None
        like = layers[0].weight
        flat = torch.zeros(sum(sizes), dtype=dtype or like.dtype, device=like.device)
        block.register_parameter("adapters", nn.Parameter(flat))
        for number, layer in enumerate(layers):
            layer.home, layer.number = self, number
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))  # as PEFT and Linear itself: bound 1 / sqrt(in)
        # always: the recomputation of a checkpointed block ends by an exception, once it has all it needs
        hooks = block.register_forward_pre_hook(self.unpack), block.register_forward_hook(self.clear, always_call=True)
        self.hooks = hooks

    def pieces(self, flat):
        """flat (N,) -> its views [A_0, B_0, A_1, B_1, …]. as_strided: a third of the time that split and view take."""
        first = flat.storage_offset()
        return [flat.as_strided(s, (s[1], 1), first + i) for s, i in zip(self.shapes, self.starts, strict=True)]

    def piece(self, number):
        """One of them, by torch's own autograd: slow, its gradient is as long as the whole parameter."""
        rows, columns = self.shapes[number]
        return self.block.adapters.narrow(0, self.starts[number], rows * columns).view(rows, columns)

    def unpack(self, *_):
        self.views = Unpack.apply(self.block.adapters, self)

    def clear(self, *_):
        self.views = None

    def remove(self):
        for hook in self.hooks:
            hook.remove()
        del self.block.adapters


class LoRALinear(nn.Linear):
    """A Linear with an adapter beside it. `enabled`: the adapter takes part. `merged`: it is in the weight already.

    It owns weight and bias under their old names, so the base's state-dict keys do not change. Its A and B are its
    block's: it has none before BlockAdapters(block, layers).
    """

    lora_A = property(lambda self: self.home.piece(2 * self.number), doc="(r, in), a view")
    lora_B = property(lambda self: self.home.piece(2 * self.number + 1), doc="(out, r), a view")

    def __init__(self, base, args):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank = args.lora_rank
        self.scaling = scale_of(args)
        self.dropout = args.lora_dropout
        self.enabled, self.merged = True, False

    def adapter(self):
        """(A, B, scale, dropout) for the linear operation; None while the adapter takes no part."""
        if not self.enabled or self.merged:
            return None
        views = self.home.views
        A, B = (self.lora_A, self.lora_B) if views is None else views[2 * self.number : 2 * self.number + 2]
        return A, B, self.scaling, self.dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        """(T, in) -> (T, out): the plain form, by torch's own autograd. Faster ones are in model/fast/."""
        y = F.linear(x, self.weight, self.bias)
        adapter = self.adapter()
        if adapter is None:
            return y
        A, B, scale, dropout = adapter
        h = F.linear(F.dropout(x, dropout) if dropout else x, A.to(x.dtype))  # (T, r)
        return y + F.linear(h * scale, B.to(x.dtype))

    def extra_repr(self):
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"

    @torch.no_grad()
    def shift_weight(self, sign):
        """weight += sign · s · B A."""
        self.weight.copy_(shifted(self.weight, self.lora_A, self.lora_B, sign * self.scaling))


def adapter_of(linear):
    """(A, B, scale, dropout) of a linear that has an adapter which takes part, else None."""
    return linear.adapter() if hasattr(linear, "adapter") else None


def has_dropout(block) -> bool:
    """Whether the block trains and has dropout: then it draws random numbers."""
    return block.training and any(getattr(module, "dropout", 0.0) for module in block.modules())

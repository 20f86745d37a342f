"""Bytes that a block (decoder layer, vision block, merger) keeps for its backward pass, and the most it takes there.

    costs = Model(model, bytes of a number, cuda, load)
    costs.vision, costs.language        a Cost a block; costs.merger

What each of our autograd functions keeps is written at its line, in columns: a column of T rows is T numbers. With
recomputation only a block's input stays, and one block at a time is redone. Legend: training/memory.py's.

On a CPU float32 has functions of its own (model/cpu.py), any other dtype takes the plain twins.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from model.adapters import adapter_of, aligned
from model.fast.graphs import round_up
from model.qwen import PART


@dataclass(frozen=True)
class Load:
    """What one micro-batch brings."""

    tokens: int  # T
    answers: int  # N
    patches: int = 0  # P
    clips: int = 0
    segments: int = 1  # sequences, or prompts and completions
    keys: int | None = None  # keys that attention reads, where completions share a prompt; None = T
    part: int = 0  # the largest part of a clip, should the batch have to be cut: see part_of_clip

    @property
    def asking(self):
        """Tokens that the last layer computes on a CPU in float32: from the first answer's on, one more a sequence
        than is answered; in a completion all are. (Of several answers in a sequence what lies between is left out.)"""
        return min(self.tokens, self.answers + (self.segments if self.keys is None else 0))


def part_of_clip(t, h, w):
    """Patches of a clip that go through the tower at a time where a batch is long (vision.VisionTower.in_parts)."""
    return min(t, max(1, PART // (h * w))) * h * w


class Cost(NamedTuple):
    """A block's bytes a row, and `fixed` ones."""

    entry: int  # its input
    kept: float  # all that its backward pass needs, the input included
    redo: float  # the most that its backward pass holds at once, kept included
    fixed: int  # kept, however many rows there are
    needs_grad: bool  # whether its output has a gradient


class Kept(NamedTuple):
    """What one product (model/linear.py) keeps."""

    input: bool
    columns: float  # beside the input: the adapters' inner (T, r), dropout's copy
    fixed: int  # numbers
    needs_grad: bool


class Model:
    """Costs of a model's blocks. number: bytes of a weight or activation; cuda: the GPU's functions or the CPU's.

    load: what passes through: on a CPU in float32 small passes do not merge adapters, and the last layer computes only
    the tokens that are asked for. None: all of a long pass. sharing: ranks that share a batch.
    """

    def __init__(self, model, number, cuda=True, load=None, sharing=1):
        self.model, self.config, self.number, self.cuda, self.sharing = model, model.config, number, cuda, sharing
        self.own = not cuda and number == 4  # model/cpu.py
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.thawed_vision = any(name.startswith("visual.") for name, _ in trained)
        T, P, n = (load.tokens, load.patches, load.asking) if load else (math.inf, math.inf, 0)
        v = self.config.vision
        x_grad = self.embeds = model.visual.patch_embed.proj.weight.requires_grad
        self.vision, self.language = [], []
        for block in model.visual.blocks:
            H, D = v.num_heads, v.hidden_size // v.num_heads
            norms = block.norm1, block.norm2
            self.vision.append(self.block(block, [block.attn.qkv], block.attn.proj, H, H, D, x_grad, *norms, P))
            x_grad = self.vision[-1].needs_grad
        self.merger = self.merger_cost(x_grad, P / 4)
        c = self.config
        x_grad = self.merger.needs_grad or model.model.embed_tokens.weight.requires_grad
        for number, layer in enumerate(model.model.layers, 1):
            a = layer.self_attn
            share = n / T if self.own and load and number == c.num_hidden_layers and sharing == 1 else 1.0
            self.language.append(self.block(layer, [a.q_proj, a.k_proj, a.v_proj], a.o_proj, c.num_attention_heads,
                                            c.num_key_value_heads, c.head_dim, x_grad, layer.input_layernorm,
                                            layer.post_attention_layernorm, T, share))  # fmt: skip
            x_grad = self.language[-1].needs_grad

    def product(self, x_grad, rows, *linears, pad=False):
        """`project` of linears that share an input, of so many rows. x_grad: whether that input has a gradient."""
        weights = [p for m in linears for p in (m.weight, m.bias) if p is not None]
        adapters = [adapter_of(m) for m in linears]
        ranks = sum(len(a[0]) for a in adapters if a)
        thawed = any(p.requires_grad for p in weights)
        learns = any(m.home.block.adapters.requires_grad for m, a in zip(linears, adapters) if a)
        dropped = sum(a[3] > 0 for a in adapters if a)
        needs = x_grad or thawed or learns
        if not needs:
            return Kept(False, 0, 0, False)
        width, adapted = linears[0].in_features, [m for m, a in zip(linears, adapters) if a]
        if self.own and not dropped and all(m.out_features <= rows for m in adapted):  # Merged: x and every W + s B A
            return Kept(True, 0, width * sum(m.out_features for m in adapted), True)
        if not thawed and not dropped and ranks:  # Project: x and every x A^T
            return Kept(True, ranks, 0, True)
        fixed = 0
        if thawed and pad and self.cuda:  # a trained weight is widened by a copy, which its product keeps
            fixed = sum(aligned(m.out_features) * m.in_features for m in linears if m.out_features % 8)
        kept_input = thawed or (learns and dropped < len(adapted))
        # dropout keeps its output and a mask, of one byte a number; on a CPU the mask is as wide as the input
        mask = 1 / self.number if self.cuda else 1
        return Kept(kept_input, ranks + dropped * (1 + mask) * width, fixed, True)

    def norm(self, norm, x_grad):
        """Bytes that RMSNorm keeps: its input and 1 / rms in fp32. Its plain twin keeps the input in fp32, and where
        the weight is trained x / rms too."""
        width, trained = norm.weight.numel(), norm.weight.requires_grad
        if not x_grad and not trained:
            return 0
        return width * self.number + 4 if self.cuda or self.own else 4 * width * (1 + trained) + 4

    def block(self, block, inputs, output, H, K, D, x_grad, norm1, norm2, rows, share=1.0):
        """Cost of a decoder layer or vision block, through its backward pass: first the MLP, then attention.

        rows: how many pass. share: of them that ask; only keys and values are made of the others.
        """
        b, width = self.number, output.out_features
        fused = len(inputs) == 1  # the vision tower's qkv
        normed_grad = x_grad or norm1.weight.requires_grad
        if share < 1:
            qkv, q = self.product(normed_grad, rows, *inputs[1:]), self.product(normed_grad, share * rows, inputs[0])
        else:
            qkv, q = self.product(normed_grad, rows, *inputs), Kept(False, 0, 0, False)
        # q and k are turned into new tensors; v of a fused product keeps the whole product
        heads = K if self.cuda or fused or K == 1 else H  # the CPU's attention repeats k and v to all heads
        if self.sharing > 1 and not fused:  # each rank has its own of all tokens
            heads = max(heads, K)
        queries, values = H * D, 3 * width if fused else heads * D
        attention = self.norm(norm1, x_grad) + qkv.columns * b
        attention += width * b if qkv.input else 0
        attention += share * (width * q.input + q.columns) * b
        qkv_grad = qkv.needs_grad or q.needs_grad
        out = self.product(qkv_grad, share * rows, output)
        if qkv_grad:  # q, k, v, out, and the log-sum-exp of every query and head in fp32
            attention += (heads * D + values + share * 2 * queries) * b + share * 4 * H
            if self.sharing > 1 and not fused and out.input:  # of all tokens for attention, of its own for the product
                attention += queries * b
        elif out.input:
            attention += share * queries * b
        attention += share * out.columns * b + (D * b + 8 if share < 1 else 0) * share  # their tables and numbers
        x2_grad = x_grad or out.needs_grad

        mlp, asked = block.mlp, share * rows
        first = self.product(x2_grad or norm2.weight.requires_grad, asked, mlp.gate_proj, mlp.up_proj, pad=True)
        inner = mlp.gate_proj.out_features
        inner = aligned(inner) if self.cuda else inner
        second = self.product(first.needs_grad, asked, mlp.down_proj)
        kept = self.norm(norm2, x2_grad)
        kept += (width * b if first.input else 0) + first.columns * b
        gated = (2 if self.cuda or self.own else 3) * inner * b if first.needs_grad else 0  # gate, up (and silu(gate))
        last = (inner * b if second.input else 0) + second.columns * b
        kept += gated + last
        fixed = (qkv.fixed + q.fixed + out.fixed + first.fixed + second.fixed) * b
        if self.cuda and second.needs_grad and mlp.down_proj.weight.requires_grad and mlp.down_proj.in_features % 8:
            fixed += width * inner * b  # widened, as above

        # backward of the activation: the block's gradient, that of its input, of gate and of up; `last` is gone
        at_mlp = attention + share * (kept - last + (width + (4 if self.own else 3) * inner) * b)
        # backward of attention: the MLP is gone; gradients of x, out, q, k, v (k and v for every query head first), the
        # sum of dq in fp32 over heads rounded to 32 (FlashAttention 2, mha_varlen_bwd)
        own = K
        flash = (share * (width + 2 * queries) + 2 * own * D + (0 if H == own else 2 * queries)) * b
        flash += share * 4 * H * round_up(D, 32)
        at_attention = attention + flash if qkv_grad else 0
        redo = max(at_mlp, at_attention) if second.needs_grad else 0
        return Cost(width * b, attention + share * kept, redo, fixed, second.needs_grad or x2_grad)

    def merger_cost(self, x_grad, rows):
        """Of the merger, a patch; it is never recomputed by itself. rows: vision tokens."""
        b, merger, cell = self.number, self.model.visual.merger, self.config.vision.spatial_merge_size**2
        width = merger.ln_q.weight.numel()
        norm_grad = x_grad or merger.ln_q.weight.requires_grad
        first = self.product(norm_grad, rows, merger.mlp[0])
        second = self.product(first.needs_grad, rows, merger.mlp[2])
        kept = self.norm(merger.ln_q, x_grad)
        kept += (width * b if first.input else 0) + first.columns * b / cell
        kept += width * b * (first.needs_grad + second.input) + second.columns * b / cell  # into and out of GELU
        redo = kept + 2 * width * b  # gradients into and out of GELU
        return Cost(width * b, kept, redo, (first.fixed + second.fixed) * b, second.needs_grad)

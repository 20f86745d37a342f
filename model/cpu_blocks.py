"""A decoder layer and a vision block on a CPU: two autograd functions, one on each side of attention.

    before    x -> norm -> q, k, v, with q and k turned
    after     x, out -> x + o(out), norm, SwiGLU, down, + -> the next x

Adapters are merged for the pass (W' = W + s B A) with what shares an input in one product and the norm's weight folded
in, so that a token pays one product each way for each of the four. Of the adapters' gradients only G = g^T x is made
for the tokens, as large as W: dB = s G A^T and dA = s B^T G follow from it. The plain twins are DecoderLayer.plain and
VisionBlock.plain.

Rows go a few at a time, in pieces of few different sizes: oneDNN makes code for every size of a product that it
meets, which takes 0.2 ms, and batches hardly ever have the same length. What is wide stays in the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import cpu
from model.linear import adapter_of, packed

SLIM = 3  # times the arithmetic of the slim products through A and B that G may take: it needs fewer calls


def pays(rows: int, *linears) -> bool:
    """Whether a block of these linears goes through this file: no dropout, enough rows to merge for, and where
    gradients are wanted, linears so narrow that G costs little more than the slim products."""
    for linear in linears:
        A, _, _, dropout = adapter_of(linear) or (None, None, 0.0, 0.0)
        out, inner = linear.weight.shape
        if dropout or out * inner > rows * (out + inner):
            return False
        learns = torch.is_grad_enabled() and not linear.weight.requires_grad
        if learns and A is not None and out * inner > SLIM * 2 * len(A) * (out + inner):
            return False
    return True


class Joint:
    """Linears that share an input as one: weight (out, in) and bias (out,) with adapters merged, times the norm's
    weight (in,) where their input comes from one."""

    def __init__(self, quads, scales, norm=None):
        weights = [w if a is None else torch.addmm(w, b, a, alpha=s) for (w, _, a, b), s in zip(quads, scales)]
        self.quads, self.scales, self.norm = quads, scales, norm
        self.plain = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = self.plain if norm is None else self.plain * norm
        self.bias = None if quads[0][1] is None else torch.cat([quad[1] for quad in quads])
        self.G = self.d_bias = None

    def need(self, needs) -> "Joint":
        """needs: of each of the quads' tensors in turn, whether its gradient is asked for."""
        self.needs = [needs[4 * i : 4 * i + 4] for i in range(len(self.quads))]
        self.need_G = any(n[0] or n[2] for n in self.needs) or self.norm is not None and self.norm.requires_grad
        self.need_bias = any(n[1] for n in self.needs)
        return self

    def collect(self, g: Tensor, x: Tensor) -> None:
        """Some rows' share of the weight's gradient: g (n, out), x (n, in)."""
        if self.need_G:
            narrow, wide = (g, x) if g.shape[1] <= x.shape[1] else (x, g)  # oneDNN copies the first
            self.G = cpu.product(narrow.T, wide.T) if self.G is None else cpu.add_product(self.G, narrow.T, wide.T)
        if self.need_bias:
            self.d_bias = g.sum(0) if self.d_bias is None else self.d_bias.add_(g.sum(0))

    def gradients(self) -> tuple[Tensor | None, list]:
        """(of the norm's weight, [of weight, bias, A, B, weight, …])."""
        found, first, d_norm = [], 0, None
        if self.need_G:
            G = self.G if self.G.shape == self.weight.shape and not self.turned else self.G.T
            if self.norm is not None:
                d_norm = (G * self.plain).sum(0) if self.norm.requires_grad else None
                G = G * self.norm
        for (w, _, a, b), scale, (need_w, need_b, need_a, _) in zip(self.quads, self.scales, self.needs):
            rows = slice(first, first + len(w))
            first += len(w)
            found += [G[rows] if need_w else None, self.d_bias[rows] if need_b else None]
            found += [(b.T @ G[rows]).mul_(scale), (G[rows] @ a.T).mul_(scale)] if need_a else [None, None]
        return d_norm, found

    @property
    def turned(self) -> bool:
        """Whether G is kept as (in, out)."""
        return self.weight.shape[0] > self.weight.shape[1]


def quads_of(tensors) -> list:
    return [tensors[i : i + 4] for i in range(0, len(tensors), 4)]


def norm_backward(d_unit: Tensor, unit: Tensor, r: Tensor) -> Tensor:
    """Gradient of x -> unit = x r, r = 1 / rms(x); d_unit is overwritten."""
    along = torch.linalg.vecdot(d_unit, unit).div_(-unit.shape[1])[:, None]
    return d_unit.addcmul_(unit, along).mul_(r)


class Before(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm, eps, cos, sin, heads, scales, *tensors):
        """x: (T, C); heads: (H, K, D); tensors: weight, bias, A, B of each linear. -> q (T, H, D), k and v (T, K, D)"""
        H, K, D = heads
        joint, T = Joint(quads_of(tensors), scales, norm), len(x)
        r = cpu.inverse_rms(x, eps)
        unit = x * r
        out = x.new_empty(T, H + 2 * K, D)
        for rows in cpu.pieces(T):
            y = cpu.product(unit[rows], joint.weight, joint.bias).view(-1, H + 2 * K, D)
            cpu.turn(y[:, : H + K], cos[rows], sin[rows], 1.0, out[rows, : H + K])
            out[rows, H + K :] = y[:, H + K :]
        ctx.save_for_backward(x, r, cos, sin, norm, *tensors)
        ctx.options = heads, scales
        return out.split([H, K, K], dim=1)

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        x, r, cos, sin, norm, *tensors = ctx.saved_tensors
        (H, K, D), scales = ctx.options
        joint = Joint(quads_of(tensors), scales, norm).need(ctx.needs_input_grad[7:])
        unit, d_unit, weight = x * r, [], joint.weight.T
        for rows in cpu.pieces(len(x)):
            g = x.new_empty(rows.stop - rows.start, H + 2 * K, D)
            cpu.turn(d_q[rows], cos[rows], sin[rows], -1.0, g[:, :H])
            cpu.turn(d_k[rows], cos[rows], sin[rows], -1.0, g[:, H : H + K])
            g[:, H + K :] = d_v[rows]
            g = g.view(len(g), -1)
            joint.collect(g, unit[rows])
            if ctx.needs_input_grad[0]:
                d_unit.append(cpu.product(g, weight))
        d_norm, d_tensors = joint.gradients()
        d_x = norm_backward(torch.cat(d_unit), unit, r) if d_unit else None
        return d_x, d_norm, None, None, None, None, None, *d_tensors


class After(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out, norm, eps, scales, *tensors):
        """x: (T, C), out: (T, H D); tensors: weight, bias, A, B of o, gate, up and down. -> (T, C)"""
        o, gate_up, down = After.joints(tensors, scales, norm)
        x2 = torch.cat([cpu.sum_product(x[rows], out[rows], o.weight, o.bias) for rows in cpu.pieces(len(x))])
        r = cpu.inverse_rms(x2, eps)
        unit, kept, y = x2 * r, [], []
        for rows in cpu.pieces(len(x)):
            both = cpu.product(unit[rows], gate_up.weight, gate_up.bias)
            gate, up = both.chunk(2, dim=1)
            s = F.silu(gate)
            kept += [both, s]
            y.append(cpu.sum_product(x2[rows], s * up, down.weight, down.bias))
        ctx.save_for_backward(out, x2, r, norm, *tensors, *kept)
        ctx.scales, ctx.count = scales, len(kept)
        return torch.cat(y)

    @staticmethod
    def joints(tensors, scales, norm):
        """What goes into one product: o, gate and up, down."""
        quads = quads_of(tensors)
        parts = (slice(0, 1), None), (slice(1, 3), norm), (slice(3, 4), None)
        return [Joint(quads[part], scales[part], norm) for part, norm in parts]

    @staticmethod
    def backward(ctx, g):
        out, x2, r, norm, *rest = ctx.saved_tensors
        tensors, kept = rest[: -ctx.count], rest[-ctx.count :]
        needs = ctx.needs_input_grad[5:]
        o, gate_up, down = After.joints(tensors, ctx.scales, norm)
        o.need(needs[:4]), gate_up.need(needs[4:12]), down.need(needs[12:])
        g, unit, d_unit = g.contiguous(), x2 * r, []
        for rows, both, s in zip(cpu.pieces(len(g)), kept[::2], kept[1::2]):
            gate, up = both.chunk(2, dim=1)
            d_both = torch.empty_like(both)
            d_gate, d_up = d_both.chunk(2, dim=1)
            d_inner = cpu.product(g[rows], down.weight.T)
            down.collect(g[rows], s * up)
            torch.mul(s, d_inner, out=d_up)
            torch.ops.aten.silu_backward.grad_input(d_inner.mul_(up), gate, grad_input=d_gate)
            gate_up.collect(d_both, unit[rows])
            d_unit.append(cpu.product(d_both, gate_up.weight.T))
        d_x = norm_backward(torch.cat(d_unit), unit, r).add_(g)
        d_out = []
        for rows in cpu.pieces(len(g)):
            o.collect(d_x[rows], out[rows])
            d_out.append(cpu.product(d_x[rows], o.weight.T))
        d_norm, d_gate_up = gate_up.gradients()
        d_tensors = [*o.gradients()[1], *d_gate_up, *down.gradients()[1]]
        return d_x, torch.cat(d_out), d_norm, None, None, *d_tensors


def before(x, norm, tables, heads, *linears):
    scales, *tensors = packed(linears, [adapter_of(m) for m in linears])
    return Before.apply(x, norm.weight, norm.eps, *tables, heads, scales, *tensors)


def after(x, out, norm, *linears):
    """linears: o, gate, up, down."""
    scales, *tensors = packed(linears, [adapter_of(m) for m in linears])
    return After.apply(x, out.reshape(len(x), -1), norm.weight, norm.eps, scales, *tensors)

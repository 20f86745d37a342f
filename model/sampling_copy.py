"""The decoder layers' weights as sampling on a GPU reads them (fast_decode.py), and where they lie meanwhile."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import decode_kernels as kernels
from model.attention import attend
from model.captured import round_up
from model.kernels import swiglu, turn
from model.linear import adapter_of
from model.rope import mrope_tables


def merge(linears: list, adapters: list, outs: list[Tensor], norms: list[Tensor] | None = None) -> None:
    """outs[i] (N, K) = (W + scale B A) * norm of linears[i], summed in float32, rounded once: one launch for all of
    them, which are alike: one linear of several layers. Their adapters have one rank and dtype, or none has one."""
    first, weight, rows = adapters[0], linears[0].weight, []
    N, K = weight.shape
    for i, (linear, a, out) in enumerate(zip(linears, adapters, outs)):
        assert a is None or (a[0].is_contiguous() and a[1].is_contiguous()), "an adapter is laid out in strides"
        tensors = (linear.weight, *((linear.weight,) * 2 if a is None else a[:2]), norms[i] if norms else out, out)
        rows.append([t.data_ptr() for t in tensors])
    align = 16 if all(address % 16 == 0 for row in rows for address in row) else weight.element_size()
    table = torch.tensor(rows).to(weight.device, non_blocking=True)
    scales = torch.tensor([0.0 if a is None else float(a[2]) for a in adapters]).to(weight.device, non_blocking=True)
    grid = (-(-K // 128), -(-N // 64), len(linears))
    kernels.merge_kernel[grid](
        table, scales, weight, weight if first is None else first[0], N, K, weight.stride(0),
        0 if first is None else len(first[0]), ADAPTER=first is not None, NORM=norms is not None, ALIGN=align,
        BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8,
    )  # fmt: skip


def empty_pieces(shapes: list, like: Tensor, place) -> list[Tensor]:
    """Empty matrices of these shapes, 16-byte aligned: in the room that `place` (captured.py) finds, the largest first,
    and those that find none in one block. place: None where there are no pools."""
    made, size = [None] * len(shapes), [rows * columns for rows, columns in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: -size[i]):
        inside = place and place(size[i] * like.element_size())
        if inside:
            with inside:
                made[i] = like.new_empty(shapes[i])
    rest = [i for i, piece in enumerate(made) if piece is None]
    room = [round_up(size[i], 128) for i in rest]
    for i, piece in zip(rest, like.new_empty(sum(room)).split(room)):
        made[i] = piece[: size[i]].view(shapes[i])
    return made


class SamplingCopy:
    """The decoder layers' weights as sampling reads them: q, k and v in one, gate and up in one, adapters merged, the
    norm before a product folded into it. Costs its bytes (5.2 GiB for 3B) and some milliseconds; drop it after the
    rollout. What finds room in the pools of the CUDA graphs lies there, the rest in one block: pieces that the update
    can use once it is free."""

    NAMES = ("qkv", "o", "gate_up", "down")

    @torch.no_grad()
    def __init__(self, model):
        self.eps = model.config.rms_norm_eps
        layers = model.model.layers
        parts = self.parts(layers[:1])
        shapes = [(sum(p[0].out_features for p in stack), stack[0][0].in_features) for stack, _ in parts.values()]
        place = model.captures and model.captures.scratch()
        made = iter(empty_pieces(shapes * len(layers), model.head_weight, place))
        self.layers, self.biases = [{name: next(made) for name in parts} for _ in layers], []
        if model.partition is None:
            self.fill(layers, self.layers)
        for i, layer in enumerate(layers if model.partition else ()):  # parted weights are there a layer at a time
            model.partition.fetch(layer)
            self.fill([layer], self.layers[i : i + 1])

    def parts(self, layers) -> dict:
        """{name: (for each of the linears laid on top of each other that of every layer, norms or None)}"""
        attentions, mlps = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
        of = lambda modules, *names: [[getattr(m, name) for m in modules] for name in names]
        first = [layer.input_layernorm.weight for layer in layers]
        second = [layer.post_attention_layernorm.weight for layer in layers]
        return {
            "qkv": (of(attentions, "q_proj", "k_proj", "v_proj"), first), "o": (of(attentions, "o_proj"), None),
            "gate_up": (of(mlps, "gate_proj", "up_proj"), second), "down": (of(mlps, "down_proj"), None),
        }  # fmt: skip

    def fill(self, layers, made: list[dict]) -> None:
        for name, (stack, norms) in self.parts(layers).items():
            sizes = [linears[0].out_features for linears in stack]
            self.fuse(stack, norms, [layer[name].split(sizes) for layer in made])
            if name == "qkv":
                self.biases += [torch.cat([linear.bias for linear in linears]) for linears in zip(*stack)]

    def fuse(self, stack: list[list], norms, cut: list) -> None:
        """cut: of every layer, where each of its parts goes."""
        for i, linears in enumerate(stack):
            adapters = [adapter_of(linear) for linear in linears]
            sorts = [a and (len(a[0]), a[0].dtype) for a in adapters]  # some layers may have none, or others
            sorts = [(m.weight.stride(), sort) for m, sort in zip(linears, sorts)]
            for sort in set(sorts):
                which = [n for n, s in enumerate(sorts) if s == sort]
                mine = ([x[n] for n in which] for x in (linears, adapters, [c[i] for c in cut]))
                merge(*mine, norms and [norms[n] for n in which])

    def prefill(self, model, prompts, x: Tensor, cache) -> Tensor:
        """The prompts through the copy, keys and values into the GroupCache: logits of each one's last token, (N, V).
        x: (T, C), their embeddings; it is written over."""
        config, (T, C) = model.config, x.shape
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        cos, sin = mrope_tables(prompts.position_ids, config, x.dtype)
        for number, (w, bias) in enumerate(zip(self.layers, self.biases)):
            qkv = F.linear(F.rms_norm(x, (C,), None, self.eps), w["qkv"], bias).view(T, H + 2 * K, D)
            q, k = turn(qkv[:, : H + K], cos, sin, 1.0).split([H, K], dim=1)
            v = qkv[:, H + K :]
            cache.prompt_k[number].view(-1, K, D).index_copy_(0, cache.slots, k)
            cache.prompt_v[number].view(-1, K, D).index_copy_(0, cache.slots, v)
            x.addmm_(attend(q, k, v, prompts.segments).reshape(T, H * D), w["o"].T)
            h = F.rms_norm(x, (C,), None, self.eps)
            gate, up = w["gate_up"].chunk(2)
            x.addmm_(swiglu(F.linear(h, gate), F.linear(h, up)), w["down"].T)
        last = prompts.segments.cu_q[1:].long() - 1
        return model.model.norm(x[last]) @ model.head_weight.T


def merge_plain(weight, adapter=None, norm=None) -> Tensor:
    """Twin of `merge`: (W + scale B A) * norm in float32, rounded once."""
    y = weight.float()
    if adapter is not None:
        A, B, scale, _ = adapter
        y = y + scale * (B.to(weight.dtype).float() @ A.to(weight.dtype).float())
    return (y if norm is None else y * norm.float()).to(weight.dtype)

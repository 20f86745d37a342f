"""Qwen2.5-VL: the whole mathematics in plain PyTorch, from token ids and patches to log-probs, in one sitting; position
ids come from rope.py, what attends to what from packed.py, the adapters' weights from adapters.py.

    operations       attention, linear with its adapter, norm, SwiGLU, rotary positions, log-probs: in their plain forms
    language model   decoder layers
    vision tower     patches -> windows -> one token for every 2x2 patches
    Qwen2_5_VL       embedding, tower, decoder layers, head

Blocks call their operations through `ops` (ops.py), which may hold faster forms of the same signatures. A decoder layer
does not know whether it trains, prefills or decodes: `attention` is handed to it, and decoding hands it a cache.
Module names are the hub checkpoint's own (`visual.*`, `model.*`, `lm_head`). Sizes come from config.json (loading.py):
3B, 7B, 32B and 72B are the same code.

    T packed tokens     C width            V vocabulary        L layers
    H query heads       K key/value heads  D head dimension    P patches    M merged vision tokens (P / 4)
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model.adapters import Weights, has_dropout, weights_of
from model.ops import Ops, fast_forms
from model.packed import IGNORE, Packed, Segments, VisionPlan
from model.quantized import Quantized, head_product, product
from model.rope import mrope_tables

__all__ = ["IGNORE", "Packed", "Qwen2_5_VL", "Segments", "normalise_patches", "target_logprobs"]

# OPENAI_CLIP_MEAN and _STD of transformers/image_utils.py, which Qwen2-VL's preprocessing uses
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VISION_EPS = 1e-6  # of the tower's norms; config.json has no key for it
LONG = 65_536  # patches from which on a tower that keeps nothing runs in parts; so many blocks' inputs take 5.4 GB
PIECE = 32_768  # tokens whose MLP is trained at a time, and computed again: its activations are 16 times as large as x
PART = 32_768  # patches of a part, whose blocks' inputs take 2.7 GB while it is computed again


# -- Operations, in their plain forms


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Packed attention, one segment after the other, scaled by D^-0.5; softmax in float32.

    q: (T, H, D); k, v: (T, K, D), K divides H (grouped-query attention). Returns (T, H, D) in q's dtype."""
    groups = q.shape[1] // k.shape[1]
    outs, own = [], [x.split(n) for x, n in ((q, segments.q_lengths), (k, segments.k_lengths), (v, segments.k_lengths))]
    for qs, ks, vs, before in zip(*own, segments.before):
        ks, vs = torch.cat([k[before], ks]), torch.cat([v[before], vs])
        ks, vs = ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", qs.float(), ks.float()) * q.shape[-1] ** -0.5
        if segments.is_causal:
            n, m = scores.shape[1:]  # aligned at the ends: the last query sees every key
            future = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            scores = scores.masked_fill(future, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs.float()).to(q.dtype))
    return torch.cat(outs)


def linear(x: Tensor, *layers: Weights, last: bool = False) -> tuple[Tensor, ...]:
    """x (T, in) through layers that share this input, each with its adapter: (T, out) each.

    y = x W^T + b + s · (x A^T) B^T. last: of its block, so that a recomputation does not need it; a fast form leaves it
    out then."""
    outs = []
    for layer in layers:
        times = product if isinstance(layer.weight, Quantized) else F.linear
        y = times(x, layer.weight, layer.bias)
        if layer.A is not None:
            h = F.linear(F.dropout(x, layer.dropout) if layer.dropout else x, layer.A)  # (T, r)
            y = y + F.linear(h * layer.scale, layer.B)
        outs.append(y)
    return tuple(outs)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight (Zhang and Sennrich, 2019; arXiv 1910.07467), computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020; arXiv 2002.05202)"""
    return F.silu(gate) * up


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding (Su et al., 2021; arXiv 2104.09864): the pairs (x_i, x_{i+D/2}) turned by their angles.

    x: (T, H, D); tables: cos and sin, (T, 1, D/2) each."""
    cos, sin = tables
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def tower_attention(ops: Ops, qkv: Tensor, tables: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    """qkv (P, 3 H, D): queries and keys are turned, then attend -> (P, H, D)."""
    H = qkv.shape[1] // 3
    qk, v = qkv.split([2 * H, H], dim=1)
    q, k = ops.rotate(qk, tables).chunk(2, dim=1)
    return ops.attention(q, k, v, segments)


def logprobs(hidden, head_weight, targets, temperature=1.0, banned=None, with_entropy=True):
    """`target_logprobs` with the whole (N, V) logits at once, by autograd."""
    times = head_product if isinstance(head_weight, Quantized) else F.linear
    logits = times(hidden, head_weight).float() / temperature
    if banned is not None:
        logits[:, banned] = float("-inf")
    logp = logits.log_softmax(-1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1).detach() if with_entropy else None
    return logp.gather(1, targets[:, None])[:, 0], entropy, logp.argmax(-1) == targets


def target_logprobs(hidden, head_weight, targets, temperature=1.0, banned=None, with_entropy=True):
    """Log-prob of each target under softmax(hidden head_weight^T / temperature). SFT and GRPO both end here.

    hidden: (N, C), rows whose target is trained. head_weight: (V, C), or a Quantized. targets: (N,) int64, none IGNORE.
    banned: int64 ids that the policy can never draw; they are left out of the softmax, as in sampling.
    Returns log-probs (N,) float32 with gradient, entropies (N,) float32 in nats without (None unless with_entropy;
    they cost half as much as all the rest), and (N,) bool: is the target the most likely token.
    """
    assert hidden.shape[0] == targets.shape[0], f"{hidden.shape[0]} rows, {targets.shape[0]} targets"
    form = fast_forms(hidden.device.type, hidden.dtype).get("logprobs", logprobs)
    return form(hidden, head_weight, targets, temperature, banned, with_entropy)


# -- Both stacks


def mlp_holder(width: int, inner: int, bias: bool) -> nn.ModuleDict:
    """The vision tower's has biases, the language model's has none."""
    gate, up, down = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias), nn.Linear(inner, width, bias)
    return nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down})


def feed_forward(ops: Ops, x: Tensor, weight: Tensor, eps: float, gate, up, down, is_recomputed: bool) -> Tensor:
    """x + MLP(norm(x)): (n, C) -> (n, C). weight: of the norm."""
    h = ops.norm(x, weight, eps)
    return x + ops.linear(ops.swiglu(*ops.linear(h, gate, up)), down, last=is_recomputed)[0]


def recomputed(block: nn.Module, *args, is_recomputed=True) -> Tensor:
    """block(*args), of which only the arguments are kept: the backward pass computes it again (Chen et al., 2016; arXiv
    1604.06174), with is_recomputed without its last product. With `ops.offload` they wait in host memory."""
    how = {"use_reentrant": False, "preserve_rng_state": has_dropout(block)}
    with saved_tensors_hooks(to_host, from_host) if block.ops.offload else nullcontext():
        return checkpoint(block, *args, is_recomputed=is_recomputed, **how)


def to_host(x: Tensor) -> tuple[Tensor, torch.device]:
    """A copy in pinned memory, written in the order of the GPU's work: the host does not wait."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True), x.device


def from_host(saved: tuple[Tensor, torch.device]) -> Tensor:
    return saved[0].to(saved[1], non_blocking=True)


# -- The language model


class DecoderLayer(nn.Module):
    """Its submodules hold parameters under the checkpoint's names; all of the layer is in forward."""

    def __init__(self, config, number: int, ops: Ops):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, D
        self.eps, self.number, self.ops = config.rms_norm_eps, number, ops
        q, k, v = (nn.Linear(C, heads * D) for heads in (self.H, self.K, self.K))
        o = nn.Linear(self.H * D, C, bias=False)
        self.self_attn = nn.ModuleDict({"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o})
        self.mlp = mlp_holder(C, config.intermediate_size, False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(C), nn.RMSNorm(C)

    def forward(self, x: Tensor, tables, attention, query_rows: Tensor | None = None, is_recomputed=False) -> Tensor:
        """(T, C) -> (T, C), or (n, C) of the tokens query_rows (n,). attention: (number, q, k, v) -> (n, H, D).
        is_recomputed: for the backward pass all but the last product is computed again."""
        ops, query_tables = self.ops, tables
        q, k, v, o, *mlp = weights_of(self, *self.self_attn.values(), *self.mlp.values())

        h = ops.norm(x, self.input_layernorm.weight, self.eps)
        if query_rows is None:
            q, k, v = ops.linear(h, q, k, v)
        else:
            k, v = ops.linear(h, k, v)
            (q,) = ops.linear(h.index_select(0, query_rows), q)
            x, query_tables = x.index_select(0, query_rows), [table[query_rows] for table in tables]
        k = ops.rotate(k.view(-1, self.K, self.D), tables)
        q = ops.rotate(q.view(-1, self.H, self.D), query_tables)
        out = attention(self.number, q, k, v.view(-1, self.K, self.D))  # (n, H, D)
        x = x + ops.linear(out.reshape(-1, self.H * self.D), o)[0]

        mlp = self.post_attention_layernorm.weight, self.eps, *mlp
        if len(x) <= PIECE or not torch.is_grad_enabled():
            return feed_forward(ops, x, *mlp, is_recomputed)
        how = {"use_reentrant": False, "preserve_rng_state": has_dropout(self)}
        return torch.cat([checkpoint(feed_forward, ops, piece, *mlp, True, **how) for piece in x.split(PIECE)])


class LanguageModel(nn.Module):
    """Embedding, decoder layers, final norm. The head is the model's business (it may be the embedding itself)."""

    def __init__(self, config, ops: Ops):
        super().__init__()
        # nn.Embedding would draw its numbers here, which on the meta device imports torch's compiler: 3 s
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i, ops) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ops = ops

    def through(self, x, tables, segments, recompute: int, attention=None, query_rows=None, store=None) -> Tensor:
        """(T, C) through the layers, of which the first `recompute` keep only their input.

        segments: [Segments]. With query_rows (n,), the tokens that the last layer computes, a second one follows for
        that layer (Segments.tails), and (n, C) comes out. attention: (layer, q, k, v) -> out, replaces packed
        attention. store(layer, k, v) is called by the latter, if it is given."""
        last = len(self.layers) - 1

        def packed(layer, q, k, v):
            if store:
                store(layer, k, v)
            return self.ops.attention(q, k, v, segments[-1 if layer == last else 0])

        for number, layer in enumerate(self.layers):
            args = x, tables, attention or packed, query_rows if number == last else None
            x = recomputed(layer, *args) if number < recompute else layer(*args)
        return x


# -- The vision tower


class VisionBlock(nn.Module):
    def __init__(self, config, ops: Ops):
        super().__init__()
        width = config.hidden_size
        self.H, self.D, self.ops = config.num_heads, width // config.num_heads, ops
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = mlp_holder(width, config.intermediate_size, True)

    def forward(self, x: Tensor, tables, segments: Segments, is_recomputed=False) -> Tensor:  # (P, width) -> the same
        ops, P = self.ops, len(x)
        qkv, proj, gate, up, down = weights_of(self, *self.attn.values(), *self.mlp.values())

        h = ops.norm(x, self.norm1.weight, VISION_EPS)
        out = ops.tower_attention(ops, ops.linear(h, qkv)[0].view(P, 3 * self.H, self.D), tables, segments)
        x = x + ops.linear(out.reshape(P, -1), proj)[0]

        return feed_forward(ops, x, self.norm2.weight, VISION_EPS, gate, up, down, is_recomputed)


class Merger(nn.Module):
    """Four neighbouring patches -> one token of the language model's width."""

    def __init__(self, config, ops: Ops):
        super().__init__()
        self.width, self.ops = config.hidden_size * config.spatial_merge_size**2, ops
        self.ln_q = nn.RMSNorm(config.hidden_size)
        first, last = nn.Linear(self.width, self.width), nn.Linear(self.width, config.out_hidden_size)
        self.mlp = nn.Sequential(first, nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:  # (P, width) -> (M, out_hidden_size)
        first, last = weights_of(self, self.mlp[0], self.mlp[2])
        x = self.ops.norm(x, self.ln_q.weight, VISION_EPS).view(-1, self.width)
        return self.ops.linear(F.gelu(self.ops.linear(x, first)[0]), last)[0]


def normalise_patches(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 patch rows -> (x / 255 - mean) / std. patches: (P, 3 * 2 * 14 * 14), channel-major. Same shape, dtype."""
    scale = torch.tensor([1 / (255 * s) for s in STD], device=patches.device)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD)], device=patches.device)
    scale, shift = (x.repeat_interleave(patches.shape[1] // 3) for x in (scale, shift))  # whole rows: no short loops
    return torch.addcmul(shift, patches.float(), scale).to(dtype)


class VisionTower(nn.Module):
    """Nearly all blocks attend within windows of 112 x 112 pixels of one grid step; a few (7, 15, 23, 31 in the
    released models) within the whole grid step. No block looks across grid steps: motion is seen only inside a patch,
    which spans two frames, and by the language model."""

    def __init__(self, config, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        proj = nn.Conv3d(config.in_channels, config.hidden_size, size, stride=size, bias=False)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.blocks = nn.ModuleList(VisionBlock(config, ops) for _ in range(config.depth))
        self.merger = Merger(config, ops)

    def plan(self, grid_thw: list[tuple[int, int, int]]) -> VisionPlan:
        weight = self.patch_embed.proj.weight
        return VisionPlan.build(grid_thw, self.config, weight.device, weight.dtype)

    def forward(self, patches: Tensor, plan: VisionPlan, recompute: int = 0, graphs=None, is_part=False) -> Tensor:
        """patches: (P, 1176) uint8 pixels or normalised floats, in 2x2-block order. Returns (M, out_hidden_size) in
        the same order. recompute: so many blocks keep only their input for the backward pass."""
        P, weight, cell = len(patches), self.patch_embed.proj.weight, self.config.spatial_merge_size**2
        assert P == plan.steps.num_tokens, f"{P} patches, but grids of {plan.steps.num_tokens}"
        is_pixels = patches.dtype == torch.uint8
        patches = normalise_patches(patches, weight.dtype) if is_pixels else patches.to(weight.dtype)
        x = F.linear(patches, weight.flatten(1))  # (P, width): a convolution whose stride is its kernel is a product
        x = x.view(P // cell, -1).index_select(0, plan.order).view(P, -1)  # in window order
        args = x, plan.tables, [plan.windows, plan.steps], recompute
        x = self.through(*args, is_part) if graphs is None else graphs.run(self.blocks, self.through, *args)
        return self.merger(x).index_select(0, plan.inverse)

    def through(self, x: Tensor, tables, segments, recompute: int, is_part=False) -> Tensor:
        """(P, width) through the blocks. segments: [windows, whole grid steps]. is_part: of in_parts, whose own
        recomputation goes through the blocks inside of the backward pass, and needs their results."""
        for i, block in enumerate(self.blocks):
            args = x, tables, segments[i in self.config.fullatt_block_indexes]
            x = recomputed(block, *args, is_recomputed=not is_part) if i < recompute else block(*args)
        return x

    def in_parts(self, patches: Tensor, grid_thw) -> Tensor:
        """forward() of a long video, some grid steps at a time: exact, for no block looks across them. Of each part
        only the patches are kept; the backward pass computes it again, and once more block by block."""
        steps = [(max(1, PART // (h * w)), t, h, w) for t, h, w in grid_thw]  # grid steps of a part
        grids = [(min(n, t - i), h, w) for n, t, h, w in steps for i in range(0, t, n)]
        how = {"is_part": True, "use_reentrant": False, "preserve_rng_state": has_dropout(self)}
        parts, depth = zip(patches.split([t * h * w for t, h, w in grids]), grids, strict=True), len(self.blocks)
        return torch.cat([checkpoint(self, part, self.plan([grid]), depth, **how) for part, grid in parts])


# -- The model


class Qwen2_5_VL(nn.Module):
    """config: a loading.ModelConfig. Built with the plain operations; loading.py binds the fast ones."""

    def __init__(self, config):
        super().__init__()
        self.config, self.ops = config, Ops(attention, linear, norm, swiglu, rotate, tower_attention, logprobs)
        self.visual = VisionTower(config.vision, self.ops)
        self.model = LanguageModel(config, self.ops)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # how frozen weights are kept (loading.py): the decoder layers' linears, the head, the embedding on the host
        self.base_dtype, self.head_dtype, self.offload_embedding = "bf16", "bf16", False
        self.gradient_checkpointing = False  # keep only each block's input; recompute the rest going back
        self.kept_blocks = 0  # with it: of tower and layers, in this order, the last so many keep all

    def _apply(self, fn, recurse=True):
        """What .to() and .half() end in: weights of another device or dtype need other operations."""
        super()._apply(fn, recurse)
        if self.ops.bound:
            self.ops.bind(self.head_weight)
        return self

    def num_recomputed(self) -> tuple[int, int]:
        """The first so many blocks of the tower, and of the language model, that keep only their input."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return 0, 0
        depth, layers = len(self.visual.blocks), len(self.model.layers)
        return min(depth, depth + layers - self.kept_blocks), max(0, layers - self.kept_blocks)

    @property
    def head_weight(self) -> "Tensor | Quantized":
        """(V, C)"""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, packed: Packed, plan: VisionPlan | None) -> Tensor:
        """Token embeddings with the vision tokens put at their pads: (T, C). plan: of the pictures."""
        x, visual, c = self.model.embed_tokens(packed.input_ids), self.visual, self.config
        trained, recompute = any(p.requires_grad for p in visual.parameters()), self.num_recomputed()[0]
        if packed.patches is None:
            return x + self.no_picture(x) if self.training and trained and torch.is_grad_enabled() else x
        is_pad = (packed.input_ids == c.image_token_id) | (packed.input_ids == c.video_token_id)
        count = len(plan.order)
        if not is_pad.is_cuda:  # there it would wait for the device: the batch has to be right
            assert is_pad.sum() == count, f"{is_pad.sum()} image and video pads, but {count} vision tokens"
        pads = torch.nonzero_static(is_pad, size=count)[:, 0]
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            if recompute and self.kept_blocks == 0 and len(packed.patches) > LONG:
                vision = visual.in_parts(packed.patches, packed.grid_thw)  # (M, C)
            else:
                vision = visual(packed.patches, plan, recompute, self.ops.graphs)
        return x.index_copy(0, pads, vision.to(x.dtype))

    def no_picture(self, x: Tensor) -> Tensor:
        """Zero, by way of the tower: when it is trained on several ranks, a rank whose batch has no picture must
        still produce its gradients, in the same order, or the ranks' reductions no longer match."""
        m = self.config.vision.spatial_merge_size
        empty = x.new_zeros(m * m, self.visual.patch_embed.proj.weight[0].numel())
        return 0.0 * self.visual(empty, self.visual.plan([(1, m, m)]), self.num_recomputed()[0], self.ops.graphs).sum()

    def forward(self, packed: Packed, attention=None, rows: Tensor | None = None, store=None) -> Tensor:
        """Hidden states after the final norm: (T, C), or (n, C) of the sorted tokens `rows` (n,), on the host.

        attention: (layer, q, k, v) -> out, replaces packed attention: a token's step beside the cache of decode.py.
        store(layer, k, v): gets keys and values, turned, (T, K, D) each, in every layer: for that cache."""
        # what follows from lengths, grids and positions alone
        device, segments, query_rows = self.head_weight.device, [packed.segments], None
        plan = self.visual.plan(packed.grid_thw) if packed.patches is not None else None
        if rows is not None and attention is None and self.ops.trim_last_layer:
            tails, query_rows, rows = packed.segments.tails(rows)
            segments.append(tails.to(device))
            query_rows = query_rows.to(device, non_blocking=True)
        tables = mrope_tables(packed.position_ids, self.config, self.head_weight.dtype)
        args = self.embed(packed, plan), tables, segments, self.num_recomputed()[1]
        if self.ops.graphs is None or attention is not None or query_rows is not None:
            x = self.model.through(*args, attention, query_rows, store)
        else:
            x = self.ops.graphs.run(self.model.layers, self.model.through, *args, store=store)
        x = self.ops.norm(x, self.model.norm.weight, self.config.rms_norm_eps)
        return x if rows is None else x.index_select(0, rows.to(device, non_blocking=True))

    def logits(self, packed: Packed) -> Tensor:
        """(T, V). For tests and small inputs; training goes through target_logprobs, which never holds them all."""
        times = head_product if isinstance(self.head_weight, Quantized) else F.linear
        return times(self(packed), self.head_weight)

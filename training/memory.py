"""GPU memory of a training step, counted from shapes. Plain arithmetic over a model's modules, which may lie on `meta`.

    step = Step(model, cfg, dtype bytes, …)
    step.update(Load(…))      {moment: {component: bytes}} of a micro-batch: forward, loss, backward, optimizer
    step.sampling(…)          the same of a rollout or an evaluation

A block (decoder layer, vision block) keeps tensors for its backward pass. What each of our autograd functions keeps is
written at its line, in columns: a column of T rows is T numbers. With recomputation only a block's input stays, and one
block at a time is redone. The estimate is the largest moment; its components are what is printed.

On a CPU float32 has functions of its own (model/cpu.py), any other dtype takes the plain twins.

Legend: T packed tokens, N of them through the head, P patches, M = P / 4 vision tokens, C width, I width of the MLP,
H query heads, K kv heads, D head dim, V vocabulary, R rows that are sampled, G of them a prompt.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from dataset.video import ROW  # numbers of a patch, 1176
from lora import part_of
from model import cpu, cpu_blocks
from model.captured import GRANULE, HEADROOM, MAX_KEPT, ROWS, SHARE
from model.cpu_decode import MOST_WEIGHTS
from model.fast_decode import OWN_BUCKET, PARTS, PROMPT_BUCKET, round_up
from model.linear import adapter_of, aligned
from model.loss import CHUNK_BYTES
from model.vision import LONG, PART
from training.engine import BUCKET

GIB = 2**30
# Outside torch's allocator: the CUDA context, loaded kernels, NCCL. Measured: 1.2 to 1.3 GiB on an H100, torch 2.11.
CONTEXT = int(1.3 * GIB)
# Inside it: cuBLAS's workspace, 32 MiB on Hopper (torch, CublasHandlePool.cpp, parseChosenWorkspaceSize), for each
# thread that multiplies: the forward pass runs in one, the backward pass in another.
WORKSPACE = 2 * (32 << 20)


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
    the tokens that are asked for. None: all of a long pass.
    """

    def __init__(self, model, number, cuda=True, load=None):
        self.model, self.config, self.number, self.cuda = model, model.config, number, cuda
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
            share = n / T if self.own and load and number == c.num_hidden_layers else 1.0
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
        if self.own and cpu_blocks.pays(rows, *inputs, output, *block.mlp.children()):
            return self.joined_block(block, inputs, output, H, K, D, x_grad, norm1, norm2, rows, share)
        fused = len(inputs) == 1  # the vision tower's qkv
        normed_grad = x_grad or norm1.weight.requires_grad
        if share < 1:
            qkv, q = self.product(normed_grad, rows, *inputs[1:]), self.product(normed_grad, share * rows, inputs[0])
        else:
            qkv, q = self.product(normed_grad, rows, *inputs), Kept(False, 0, 0, False)
        # q and k are turned into new tensors; v of a fused product keeps the whole product
        heads = K if self.cuda or fused or K == 1 else H  # the CPU's attention repeats k and v to all heads
        queries, values = H * D, 3 * width if fused else heads * D
        attention = self.norm(norm1, x_grad) + qkv.columns * b
        attention += width * b if qkv.input else 0
        attention += share * (width * q.input + q.columns) * b
        qkv_grad = qkv.needs_grad or q.needs_grad
        out = self.product(qkv_grad, share * rows, output)
        if qkv_grad:  # q, k, v, out, and the log-sum-exp of every query and head in fp32
            attention += (heads * D + values + share * 2 * queries) * b + share * 4 * H
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
        flash = (share * (width + 2 * queries) + 2 * K * D + (0 if H == K else 2 * queries)) * b
        flash += share * 4 * H * round_up(D, 32)
        at_attention = attention + flash if qkv_grad else 0
        redo = max(at_mlp, at_attention) if second.needs_grad else 0
        return Cost(width * b, attention + share * kept, redo, fixed, second.needs_grad or x2_grad)

    def joined_block(self, block, inputs, output, H, K, D, x_grad, norm1, norm2, rows, share):
        """Cost of a block that goes through model/cpu_blocks.py, which keeps inputs and 1 / rms, not what is normed."""
        b, width, mlp = self.number, output.out_features, block.mlp
        inner = mlp.gate_proj.out_features
        first = x_grad or norm1.weight.requires_grad or self.learns(*inputs)
        second = first or norm2.weight.requires_grad or self.learns(output, *mlp.children())
        if not second:
            return Cost(width * b, 0, 0, 0, False)
        before, copied = (H + 2 * K) * D, 1 < K < H  # q, k and v are one tensor; the attention's copies of k and v
        kept = 0
        if first:  # x, q, k, v, the log-sum-exp of every query and head in fp32
            kept = width * b + 4 + (2 * H * D * b if copied else 0) + share * 4 * H
            kept += before * b if share == 1 or not copied else 0
            kept += share * (H * D * b + 8) if share < 1 else 0
        after = share * ((H * D + width + 3 * inner) * b + 4)  # out, x + o(out), gate, up, silu(gate)
        piece = min(1.0, cpu.PIECE / rows) * 5 * inner
        at_mlp = kept + after + share * (4 * width + piece) * b
        at_attention = kept + share * (width + 2 * H * D) * b + (2 * K + 2 * H * (H != K)) * D * b
        return Cost(width * b, kept + after, max(at_mlp, at_attention if first else 0), 0, True)

    def learns(self, *linears):
        adapters = [m.home.block.adapters for m in linears if adapter_of(m)]
        weights = [p for m in linears for p in (m.weight, m.bias) if p is not None]
        return any(p.requires_grad for p in [*adapters, *weights])

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


class Memory:
    """Bytes of every moment of a step on one device.

    model: with its adapters, frozen and freed as it will be trained. cfg: config.SFT or GRPO. number: bytes of a
    weight. world: ranks. cuda: False counts the CPU's functions. zero: `zero_optimization` of the engine's settings.
    """

    def __init__(self, model, cfg, number=2, world=1, cuda=True, zero=None):
        self.cfg, self.number, self.world, self.cuda, zero = cfg, number, world, cuda, zero or {}
        offload = zero.get("offload_optimizer") or {"device": "cpu" if cfg.offload_optimizer else "none"}
        self.offloaded = cuda and offload.get("device") == "cpu"
        self.shares = world if zero.get("stage", 2) == 2 else 1  # ZeRO-1 keeps all gradients on every rank
        self.model, self.costs = model, Model(model, number, cuda)
        self.config, self.recompute = model.config, cfg.gradient_checkpointing
        self.entropies = hasattr(cfg, "num_generations")  # GRPO's loss asks for them
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.count = sum(p.numel() for _, p in trained)
        self.language_count = sum(p.numel() for name, p in trained if part_of(name) == "llm")
        self.largest = max(p.numel() for _, p in trained)
        self.weights = number * (sum(p.numel() for p in model.parameters()) - self.count)
        self.layer_weights = number * sum(
            p.numel() for layer in model.model.layers for n, p in layer.named_parameters() if n.endswith("proj.weight")
        )
        self.head_trained = model.head_weight.requires_grad
        self.tied = model.lm_head is None
        self.bucket = int(zero.get("reduce_bucket_size") or min(self.count + 1024, BUCKET))
        # gradient of one thawed matrix, which lives until it is copied into the bucket
        self.matrix = number * max((p.numel() for name, p in trained if p.dim() > 1 and "embed" not in name), default=0)

    # What is there all the time

    def static(self):
        """Weights; what is trained, as ZeRO-2 holds it: in the weights' dtype, in fp32, and AdamW's two moments."""
        state = 0 if self.offloaded else 12 * self.count // self.world
        found = {"weights": self.weights, "trained parameters": self.number * self.count, "optimizer states": state}
        if self.cuda:
            found["workspace"] = WORKSPACE
        if getattr(self.cfg, "beta", 0) and self.cfg.reference == "start":
            found["reference"] = self.number * self.count
        return found

    def gradients(self, count=None):
        """fp32 sums of `count` gradients (all), of this rank's share; with offloading they are on the CPU."""
        return 0 if self.offloaded else 4 * (self.count if count is None else count) // self.shares

    def buckets(self):
        """Gradients on their way to be reduced; two with several GPUs, where reducing overlaps with computing."""
        return self.bucket * self.number * (2 if self.cuda and self.world > 1 else 1)

    def reducing(self, count):
        """So many gradients of a bucket being reduced: side by side in the weights' dtype, and in fp32."""
        return count * (self.number + 4) if self.number < 4 else 0

    # A training step

    def inputs(self, load):
        """The packed batch: ids, targets and three positions in int64, pixels in bytes; and its rotary tables."""
        return load.tokens * 40 + load.patches * ROW + self.tables(load)

    def tables(self, load):
        v, c = self.config.vision, self.config
        return (load.tokens * c.head_dim + load.patches * (v.hidden_size // v.num_heads)) * self.number

    def costs_of(self, load):
        return Model(self.model, self.number, self.cuda, load) if self.costs.own else self.costs

    def update(self, load, micro_batches=1, held=0):
        """{moment: {component: bytes}} of an optimizer step. held: bytes of inputs that are there throughout."""
        c, b, costs = self.config, self.number, self.costs_of(load)
        T, N, P = load.tokens, load.answers, load.patches
        base = self.static() | {"inputs": held}
        base["gradients"] = self.gradients() if micro_batches > 1 else 0
        vision = self.kept_vision(load, costs)
        width = c.hidden_size * b
        everything = base | {"vision activations": vision, "language activations": self.kept_language(load, costs)}
        rows = max(1, CHUNK_BYTES // (4 * c.vocab_size))
        chunk = min(N, rows) * c.vocab_size
        asking = load.asking if costs.own else T
        # last block's, normed, answers'
        hidden = asking * width * (2 if costs.language[-1].needs_grad else 1) + (N < asking) * N * width
        passing = {"inputs": held + self.inputs(load)}
        moments = {"vision tower": base | passing | {"vision activations": self.vision_forward(load)}}
        # forward: logits in fp32 and one more of that size for their log-sum-exp; two more for the entropy
        moments["loss"] = everything | passing | {"logits and loss": hidden + (12 if self.entropies else 8) * chunk}
        # recomputation holds on to the batch, all else only to the tables
        everything["inputs"] += self.inputs(load) if self.recompute else self.tables(load)
        everything["buckets"] = self.buckets()
        head = self.head_gradient()
        backward = asking * width + (1 + (N < asking)) * N * width + (4 + b * (b < 4)) * chunk + head
        moments["loss backwards"] = everything | {"logits and loss": backward}
        if self.head_trained:
            everything["head's gradient"] = b * c.vocab_size * c.hidden_size
        redo = self.redone(load, costs)
        moments["language model backwards"] = everything | {"one block redone": redo + self.matrix}
        # the first full bucket is reduced while the language model's gradients come in, the last one at the end
        full, sums = self.language_count > self.bucket, base["gradients"]
        if full:
            sums = max(sums, self.gradients(self.language_count))
        seen = base | {"vision activations": vision, "buckets": self.buckets(), "gradients": sums}
        if full:
            moments["full bucket reduced"] = seen | {"reduction": self.reducing(self.bucket)}
        if costs.thawed_vision and P:
            redo = self.vision_redone(load, costs) + P // 4 * width
            moments["vision tower backwards"] = seen | {"one block redone": redo + self.matrix}
        embedding = b * c.vocab_size * c.hidden_size if self.head_trained else 0
        moments["gradients reduced"] = self.static() | {
            "gradients": self.gradients(), "buckets": self.buckets(), "head's gradient": embedding,
            "reduction": self.reducing(self.count % self.bucket or self.bucket),
        }  # fmt: skip
        # the norm of one tensor's gradient in fp64; fp32 weights have their gradients flattened by a copy
        norm = 8 * self.largest if self.cuda else 0
        copied = self.gradients() if self.number == 4 else 0
        moments["optimizer"] = self.static() | {"gradients": self.gradients() + max(norm, copied)}
        return moments

    def kept_language(self, load, costs):
        kept = sum(self.kept(cost, load.tokens) for cost in costs.language)
        if self.recompute:
            return kept
        layers = sum(cost.kept > cost.entry for cost in costs.language)
        return kept + self.gathered(load) * layers + self.mask(load, costs)

    def redone(self, load, costs):
        """The most that a decoder layer's backward pass takes beyond what is kept. On a CPU in float32 the last layer
        is small and the one before it, without it, may take more."""
        last, *before = [self.beyond(cost, load.tokens) for cost in costs.language[:-3:-1]]
        gone = self.kept(costs.language[-1], load.tokens)
        if self.recompute:
            last += self.mask(load, costs)
        else:
            gone += self.mask(load, costs)
        return max(last, *(x - gone for x in before)) + (self.gathered(load) if self.recompute else 0)

    def mask(self, load, costs):
        """The last layer's, where it computes only the last tokens of each sequence."""
        return self.number * load.asking * load.tokens // load.segments if costs.own and load.keys is None else 0

    def beyond(self, cost, rows):
        """What a block's backward pass takes beyond what is kept of it."""
        return rows * (cost.redo - cost.entry) + cost.fixed if self.recompute else rows * (cost.redo - cost.kept)

    def gathered(self, load):
        """A layer's keys and values once for each completion that shares them, beyond those that are there anyway. The
        CPU's attention gathers them for all heads, puts the outputs back in order by a copy, and keeps a mask."""
        if load.keys is None:
            return 0
        c, T = self.config, load.tokens
        H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if self.cuda:
            return 2 * K * D * (load.keys - T) * self.number
        N = load.answers
        mask = N * (load.keys - T + N) // max(1, load.segments - load.clips)  # a prompt has one clip and no mask
        return ((2 * H * load.keys - 2 * (K if K == 1 else H) * T + H * T) * D + mask) * self.number

    def kept(self, cost, rows):
        if self.recompute and cost.kept > 0:
            return rows * cost.entry
        return rows * cost.kept + cost.fixed

    def part(self, load, learning=True):
        """Patches that go through the tower at a time: with recomputation many are cut."""
        cut = learning and self.recompute and self.costs.thawed_vision and load.patches > LONG
        return load.part if cut else load.patches

    def kept_vision(self, load, costs):
        """A long video's parts are made again from its patches, and only the tower's output stays."""
        if not costs.thawed_vision:
            return 0
        out = load.patches // 4 * self.config.hidden_size * self.number  # the tower's, which index_copy keeps
        part = self.part(load)
        return out * costs.merger.needs_grad + (self.kept_blocks(part, costs) if part == load.patches else 0)

    def kept_blocks(self, P, costs):
        blocks = [cost for cost in costs.vision if cost.needs_grad]
        pixels = P * ROW * self.number * costs.embeds  # as numbers, for the gradient of their embedding
        return sum(self.kept(cost, P) for cost in blocks) + P * costs.merger.kept + costs.merger.fixed + pixels

    def vision_redone(self, load, costs):
        """The most that a backward pass through the tower takes beyond what is kept."""
        P, last = self.part(load), costs.vision[-1]
        redo = self.beyond(last, P) if last.needs_grad else 0
        redo = max(redo, P * (costs.merger.redo - costs.merger.kept))
        return redo + (self.kept_blocks(P, costs) if P < load.patches else 0)

    def head_gradient(self):
        """A trained head's: summed in fp32, then in the weights' dtype."""
        return (4 + self.number) * self.config.vocab_size * self.config.hidden_size if self.head_trained else 0

    def vision_forward(self, load, learning=True):
        """Without gradients, the most that the tower holds: two inputs, the norm's output, gate, up, their product, the
        block's output; and the pixels as numbers, on a CPU of few patches at a time. Of parts the outputs, twice."""
        v, P = self.config.vision, self.part(load, learning)
        inner = aligned(v.intermediate_size) if self.cuda else v.intermediate_size
        outputs = 2 * load.patches // 4 * self.config.hidden_size if P < load.patches else 0
        return self.number * (P * (4 * v.hidden_size + 3 * inner + ROW * self.cuda) + outputs)

    # CUDA graphs

    def graphs(self, loads, most, whole, sizes=None):
        """{stack: bytes} of the passes that become CUDA graphs (model/captured.py), by its rule. Their memory is theirs
        alone, beside the peak: the pool of the largest one, gradients, and for each size what goes in and out.

        most: the peak, in bytes; whole: the device's. sizes: how many there will be; those of the loads unless given.
        """
        if not self.cuda or (self.recompute and getattr(self.cfg, "lora_dropout", 0)):
            return {}
        tower, found = self.model.visual.blocks, {}
        for name, field, blocks, costs in (
            ("vision tower", "patches", tower, self.costs.vision),
            ("language model", "tokens", self.model.model.layers, self.costs.language),
        ):
            passes = {}  # rows: (kept, in all)
            for load in loads:
                rows = round_up(getattr(load, field), GRANULE)
                kept = sum(self.kept(cost, rows) for cost in costs if cost.needs_grad)
                most_kept = max(0, *(self.beyond(cost, rows) for cost in costs))
                if 0 < rows <= ROWS and kept < SHARE * whole and most + 1.33 * kept < (1 - HEADROOM) * whole:
                    idle = self.vision_forward(Load(0, 0, rows)) if blocks is tower else 0
                    passes[rows] = max(kept + most_kept, idle)
            if passes:
                width, trained = costs[0].entry, sum(p.numel() for p in blocks.parameters() if p.requires_grad)
                count = min(MAX_KEPT, sizes or len(passes))
                found[name] = int(max(passes.values()) + 4 * count * max(passes) * width + trained * self.number)
        return found

    # Sampling

    def sampling(self, prompt_tokens, longest, patches, prompts, group, new_tokens, truncated=False):
        """{moment: {component: bytes}} of `prompts` prompts (of so many tokens in all) x `group` completions."""
        c, b, cuda = self.config, self.number, self.cuda and self.number == 2
        K, D, L, R = c.num_key_value_heads, c.head_dim, c.num_hidden_layers, prompts * group
        base = self.static()
        slots, place = max(1, new_tokens - 1), longest
        if cuda:  # the captured path: cache lengths are rounded up
            base["sampling copy"] = self.layer_weights
            slots, place = round_up(slots, OWN_BUCKET), round_up(longest, PROMPT_BUCKET)
        elif self.costs.own and self.layer_weights <= 4 * MOST_WEIGHTS:  # cpu_decode.py: the head too
            base["sampling copy"] = self.layer_weights + b * c.vocab_size * c.hidden_size
        base["KV cache"] = 2 * L * K * D * b * (prompts * place + R * slots)
        H, inner, V = c.num_attention_heads, c.intermediate_size, c.vocab_size
        splits = max(1, min(PARTS // max(1, prompts * K), place // 64)) + -(-slots // 64)
        row = b * (2 * c.hidden_size + (2 * H + 2 * K) * D + inner + V) + 4 * H * splits * (D + 1)
        base["buffers of a step"] = R * row if cuda else R * V * 12
        load = Load(prompt_tokens, 0, patches)
        base["inputs"] = self.inputs(load)
        # a layer of the prefill: input, q, k, v, the turned q and k, norm, gate, up, their product
        layer = b * prompt_tokens * (2 * c.hidden_size + (2 * H + 3 * K) * D + 3 * inner)
        logits = (b * (prompts + R) + (16 * R if truncated else 0)) * V
        return {
            "prompts' clips": base | {"vision activations": self.vision_forward(load, False)},
            "prefill": base | {"language activations": layer},
            "drawing": base | {"logits and loss": logits},
        }


def peak(moments):
    """(name, components) of the moment that takes most."""
    return max(moments.items(), key=lambda item: sum(item[1].values()))


def total(components):
    return int(sum(components.values()))

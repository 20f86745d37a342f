"""GPU memory of a training step, counted from shapes. Plain arithmetic over a model's modules, which may lie on `meta`.

    memory = Memory(model, cfg, bytes of a number, …)
    memory.update(Load(…))    {moment: {component: bytes}} of a micro-batch: forward, loss, backward, optimizer
    memory.sampling(…)        the same of a rollout or an evaluation

What a block keeps for its backward pass is counted in training/blocks.py. The estimate is the largest moment; its
components are what is printed.

Legend: T packed tokens, N of them through the head, P patches, M = P / 4 vision tokens, C width, I width of the MLP,
H query heads, K kv heads, D head dim, V vocabulary, R rows that are sampled, G of them a prompt.
"""


from dataset.video import ROW  # numbers of a patch, 1176
from lora import part_of
from model.adapters import aligned
from model.fast.cpu import MOST_WEIGHTS
from model.fast.decoder import OWN_BUCKET, PARTS, PROMPT_BUCKET
from model.fast.graphs import GRANULE, HEADROOM, MAX_KEPT, ROWS, SHARE, round_up
from model.fast.portable import CHUNK_BYTES
from model.qwen import LONG
from training.blocks import Load, Model
from training.engine import bucket_size

GIB = 2**30
# Outside torch's allocator: the CUDA context, loaded kernels, NCCL. Measured: 1.2 to 1.3 GiB on an H100, torch 2.11.
CONTEXT = int(1.3 * GIB)
# Inside it: cuBLAS's workspace, 32 MiB on Hopper (torch, CublasHandlePool.cpp, parseChosenWorkspaceSize), for each
# thread that multiplies: the forward pass runs in one, the backward pass in another.
WORKSPACE = 2 * (32 << 20)


class Memory:
    """Bytes of every moment of a step on one device.

    model: with its adapters, frozen and freed as it will be trained. cfg: config.SFT or GRPO. number: bytes of a
    weight. world: ranks; local: those of this machine, among which weights are parted, all of them unless given.
    cuda: False counts the CPU's functions. zero: `zero_optimization` of the engine's settings.
    """

    def __init__(self, model, cfg, number=2, world=1, cuda=True, zero=None, local=None):
        self.cfg, self.number, self.world, self.cuda, zero = cfg, number, world, cuda, zero or {}
        offload = zero.get("offload_optimizer") or {"device": "cpu" if cfg.offload_optimizer else "none"}
        self.offloaded = cuda and offload.get("device") == "cpu"
        self.shares = world if zero.get("stage", 2) == 2 else 1  # ZeRO-1 keeps all gradients on every rank
        self.sharing = cfg.sequence_parallel
        self.model, self.costs = model, Model(model, number, cuda, sharing=self.sharing)
        self.config, self.recompute = model.config, cfg.gradient_checkpointing
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.count = sum(p.numel() for _, p in trained)
        self.language_count = sum(p.numel() for name, p in trained if part_of(name) == "llm")
        self.largest = max(p.numel() for _, p in trained)
        self.weights = number * (sum(p.numel() for p in model.parameters()) - self.count)
        self.coming = 0  # bytes of the buffers that parted layers come to
        self.layer_weights = number * sum(
            p.numel() for layer in model.model.layers for n, p in layer.named_parameters() if n.endswith("proj.weight")
        )
        self.head_trained = model.head_weight.requires_grad
        self.tied = model.lm_head is None
        self.bucket = int(zero.get("reduce_bucket_size") or bucket_size(self.count, world))
        # gradient of one thawed matrix, which lives until it is copied into the bucket
        self.matrix = number * max((p.numel() for name, p in trained if p.dim() > 1 and "embed" not in name), default=0)

    # What is there all the time

    def static(self):
        """Weights; what is trained, as ZeRO-2 holds it: in the weights' dtype, in fp32, and AdamW's two moments."""
        state = 0 if self.offloaded else 12 * self.count // self.world
        found = {"weights": self.weights, "trained parameters": self.number * self.count, "optimizer states": state}
        if self.coming:
            found["layers on their way"] = self.coming
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
        return Model(self.model, self.number, self.cuda, load, self.sharing) if self.costs.own else self.costs

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
        asking = load.asking if costs.own and self.sharing == 1 else T
        # last block's, normed, answers'
        hidden = asking * width * (2 if costs.language[-1].needs_grad else 1) + (N < asking) * N * width
        passing = {"inputs": held + self.inputs(load)}
        moments = {"vision tower": base | passing | {"vision activations": self.vision_forward(load)}}
        # forward: logits in fp32 and one more of that size, for their log-sum-exp and then for the entropy
        moments["loss"] = everything | passing | {"logits and loss": hidden + 8 * chunk}
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
        last = costs.own and load.keys is None and self.sharing == 1
        return self.number * load.asking * load.tokens // load.segments if last else 0

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
        masks = self.recompute and getattr(self.cfg, "lora_dropout", 0)  # would have to be drawn twice alike
        if not self.cuda or self.sharing > 1 or self.coming or masks:
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

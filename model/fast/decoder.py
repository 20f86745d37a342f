"""Group decoding on a GPU at the speed of its memory, in bf16: the fast Decoder of decode.py.

A token's time has a floor, reading the weights once: 6.2 GB for the 3B model in bf16, 1.5 ms on an H200. The rest of a
step is kept small:

    Adapters     A and B of all decoder layers as the kernels read them, beside low-bit weights, read as they are stored
    merged       in bf16 a copy of the weights with adapters merged, for the length of a rollout: apart they cost 0.5 ms
                 a step, a fifth (dev/LOG.md)
    Step         one token of every row as a captured CUDA graph of hand-written kernels (kernels.py, linears.py): six a
                 layer, where plain PyTorch launches forty; the length of the caches is read on the device, so one graph
                 serves all steps, and addresses too, so it serves later rollouts
    GroupCache   a prompt's keys and values once for its whole group, as in decode.py

Nothing in the loop waits for the device, except a look every STOP_CHECK steps at whether all rows have ended.
"""

import warnings
from collections import OrderedDict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from model.adapters import Weights, weights_of
from model.decode import STOP_CHECK, Decoder, PlainDecoder, sample
from model.fast import kernels, linears
from model.fast.graphs import pow2, round_up
from model.fast.quantized import has_e4m3, pairs
from model.quantized import TILE, Quantized
from model.rope import mrope_tables

KEYS = 64  # prompt and own keys a program looks at at a time
PARTS = 128  # programs of one layer's attention to the prompts that are worth having: one a multiprocessor
PROMPT_BUCKET, OWN_BUCKET = 256, 128  # cache lengths are rounded up to these, so that graphs fit again
ATTENTION = dict(num_warps=4, num_stages=2)
MAX_GRAPHS = 8  # kept a model; a graph holds some MB of buffers, and capturing another takes well under a second
MARGIN = 1 << 29  # bytes of GPU memory that a rollout leaves free, beside its caches, for logits and activations
H_SPLIT = 16  # programs at most that share the columns of a product with A
STACKS = ("qkv", "o", "gate_up", "down")  # products of a layer, in their order
HEAD, LAYERS, CELLS = 6, 15, 9  # where in the table of addresses the head's stand, and each product's:
# up to three weights, their scales, A, B, and the weight of the norm behind it
CHOOSE_BLOCK = 1024  # a quarter of the logits that a program of `choose` reads

_steps: WeakKeyDictionary = WeakKeyDictionary()  # model -> {bucket: Step}, the latest last


def make_decoder(model, prompts, sampling, G: int, generator) -> Decoder:
    """CudaDecoder in bf16 where its caches have room, else the plain one."""
    is_fast = model.head_weight.dtype == torch.bfloat16 and kernels.triton and sampling.repetition_penalty == 1
    is_fast = is_fast and (model.base_dtype != "fp8" or has_e4m3(model.head_weight.device))
    decoder = CudaDecoder if is_fast and has_room(model, prompts, sampling, G) else PlainDecoder
    return decoder(model, prompts, sampling, G, generator)


def has_room(model, prompts, sampling, G: int) -> bool:
    """Whether keys and values fit, and in bf16 the merged weights. Warns where they do not."""
    device, need = model.head_weight.device, 0
    if model.base_dtype == "bf16":
        need = 2 * sum(p.numel() for n, p in model.model.layers.named_parameters() if n.endswith("proj.weight"))
    reserved, (free, total) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    free = min(free, torch.cuda.get_per_process_memory_fraction(device) * total - reserved)
    free += reserved - torch.cuda.memory_allocated(device)
    config, lengths = model.config, prompts.segments.q_lengths
    slots = len(lengths) * (round_up(max(lengths), PROMPT_BUCKET) + G * round_up(sampling.max_new_tokens, OWN_BUCKET))
    need += 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * slots  # keys and values
    if free < need + MARGIN:
        shortage = f"a rollout's caches and merged weights take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        hint = "--offload_optimizer True frees the optimizer's, fewer prompts at a time the caches'"
        warnings.warn(f"slow decoding: {shortage}; {hint}", stacklevel=4)
        return False
    return True


def stacks_of(layer) -> dict[str, list[Weights]]:
    """A decoder layer's products: the linears that share an input go together."""
    q, k, v, o, gate, up, down = weights_of(layer, *layer.self_attn.values(), *layer.mlp.values())
    return {"qkv": [q, k, v], "o": [o], "gate_up": [gate, up], "down": [down]}


class Adapters:
    """The adapters of all layers, in the weights' dtype: A (L, linears of the stack, rank, in) and B (L, out, rank),
    scaled, by stack. Linears without one have zeros; the rank is rounded up to 16, and 0 where there is none at all."""

    def __init__(self, layers: list[dict], like: Tensor):
        everyone = [w for stacks in layers for stack in stacks.values() for w in stack]
        self.rank = round_up(max((len(w.A) for w in everyone if w.A is not None), default=0), 16)
        self.A, self.B = {}, {}
        for name in STACKS if self.rank else ():
            shapes = [w.weight.shape for w in layers[0][name]]
            self.A[name] = like.new_zeros(len(layers), len(shapes), self.rank, shapes[0][1])
            self.B[name] = like.new_zeros(len(layers), sum(shape[0] for shape in shapes), self.rank)
            for A, B, stacks in zip(self.A[name], self.B[name], layers):
                for own_a, own_b, w in zip(A, B.split([shape[0] for shape in shapes]), stacks[name]):
                    if w.A is not None:
                        own_a[: len(w.A)].copy_(w.A)
                        own_b[:, : len(w.A)].copy_(w.B).mul_(w.scale)


def merged(layers: list[dict], like: Tensor) -> list[dict]:
    """layers with adapters merged into copies of their weights, summed in float32 and rounded once. All copies lie in
    one block, which goes back whole: the update can use it."""
    adapted = [w for stacks in layers for stack in stacks.values() for w in stack if w.A is not None]
    rooms = [round_up(w.weight.numel(), 128) for w in adapted]
    copies = iter(like.new_empty(sum(rooms)).split(rooms))

    def merge(w: Weights) -> Weights:
        if w.A is None:  # one that is trained whole lies anywhere in the optimizer's storage
            weight = w.weight.contiguous()
            return w._replace(weight=weight if weight.data_ptr() % 16 == 0 else weight.clone())
        out = next(copies)[: w.weight.numel()].view(w.weight.shape)
        torch.addmm(w.weight, w.B.to(out.dtype), w.A.to(out.dtype), alpha=w.scale, out=out)
        return Weights(out, w.bias)

    return [{name: [merge(w) for w in stack] for name, stack in stacks.items()} for stacks in layers]


def row_stride(weight) -> int:
    """From one row to the next, in stored elements: training may have laid weights out in strides."""
    return weight.codes.shape[1] if isinstance(weight, Quantized) else weight.stride(0)


class Tile(NamedTuple):
    """How `linear_kernel` cuts a product up."""

    n: int  # rows of W a program
    k: int  # columns at a time
    split: int  # programs that share the columns
    warps: int
    stages: int  # loads in flight
    ahead: int  # bytes of each row of W asked for before the input is ready


def tile_for(name: str, rows: int, kind: str = "bf16") -> Tile:
    """Measured at the 3B shape (dev/LOG.md)."""
    few = {
        "qkv": Tile(16, 256, 2, 4, 5, 512), "o": Tile(32, 256, 4, 4, 5, 512), "gate_up": Tile(32, 128, 1, 4, 4, 1024),
        "down": Tile(64, 128, 8, 4, 5, 512), "head": Tile(64, 128, 1, 4, 5, 256),
    }  # fmt: skip
    many = {
        "qkv": Tile(32, 128, 1, 4, 5, 512), "o": Tile(32, 128, 1, 4, 5, 512), "gate_up": Tile(128, 64, 1, 4, 3, 512),
        "down": Tile(64, 128, 4, 4, 5, 512), "head": Tile(64, 128, 1, 4, 3, 0),
    }  # fmt: skip
    tile = (few if rows <= 16 else many)[name]
    if kind == "bf16":
        return tile
    if rows <= 16:
        tile = tile._replace(n=min(tile.n, 32), k=128, stages=6 if name == "gate_up" else tile.stages)
    return tile._replace(k=TILE, ahead=tile.ahead // 4) if kind == "nf4" else tile._replace(ahead=tile.ahead // 2)


class GroupCache:
    """decode.py's cache, keys before heads: prompt (L, N, Lp, K, D), own (L, R, S, K, D)."""

    def __init__(self, model, lengths: list[int], G: int, S: int):
        config, weight = model.config, model.head_weight
        N, L, K, D = len(lengths), config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.Lp, self.S = round_up(max(lengths), PROMPT_BUCKET), S
        like = {"device": weight.device, "dtype": weight.dtype}
        self.prompt_k, self.prompt_v = (torch.empty(L, N, self.Lp, K, D, **like) for _ in range(2))
        self.own_k, self.own_v = (torch.empty(L, N * G, S, K, D, **like) for _ in range(2))
        slots = torch.cat([n * self.Lp + torch.arange(length) for n, length in enumerate(lengths)])
        self.slots = slots.to(weight.device)  # (T,): where a packed prompt token is kept

    def prefill(self, segments, packed_attention):
        """Attention of the prompt pass: packed, and its keys and values are written down."""

        def attention(layer, q, k, v):
            for cache, x in ((self.prompt_k, k), (self.prompt_v, v)):
                cache[layer].view(-1, *x.shape[1:]).index_copy_(0, self.slots, x)
            return packed_attention(q, k, v, segments)

        return attention


class Step:
    """One token of R = N*G rows: buffers, the order of the kernels, and the graph made of it."""

    def __init__(self, model, N: int, G: int, Lp: int, S: int, mode: str, rank: int, strides: tuple):
        """mode: "race" draws, "greedy" takes the largest, "logits" leaves the choice to the caller. rank: of Adapters.
        strides: of the rows of each stack's weights."""
        config, weight = model.config, model.head_weight
        self.config, self.N, self.G, self.Lp, self.S, self.mode = config, N, G, Lp, S, mode
        self.rank, self.kind = rank, model.base_dtype
        self.strides = dict(zip(STACKS, strides)) | {"head": config.hidden_size}
        self.R, self.H, self.K, self.D = N * G, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.C, self.I, self.V = config.hidden_size, config.intermediate_size, len(weight)
        self.L, self.linears = config.num_hidden_layers, {"qkv": 3, "o": 1, "gate_up": 2, "down": 1, "head": 0}
        self.pdl = torch.cuda.get_device_capability(weight.device) >= (9, 0)
        self.block_m = 16 if self.R <= 16 else 32 if self.R <= 32 else 64
        self.R_pad = round_up(self.R, self.block_m)
        self.queries = min(64, pow2(G * self.H // self.K, 16))
        tiles = -(-G * self.H // self.K // self.queries)
        parts = max(1, min(PARTS // (N * self.K * tiles), Lp // KEYS))
        self.span = round_up(-(-Lp // parts), KEYS)
        self.own_span = 64 if self.R <= 16 else 128  # own keys a program of attention reads
        self.shared_splits, self.own_splits = -(-Lp // self.span), -(-S // self.own_span)
        self.shared_programs = N * self.K * tiles * self.shared_splits
        self.graph = None
        self.make_buffers(weight.device, weight.dtype)
        self.norm = torch.empty_like(model.model.norm.weight)

    def make_buffers(self, device, dtype) -> None:
        R, like, real = self.R, {"device": device, "dtype": dtype}, {"device": device, "dtype": torch.float32}
        whole = {"device": device, "dtype": torch.int64}
        splits, half = self.shared_splits + self.own_splits, self.D // 2
        self.x, self.normed, self.scaled = (torch.empty(R, self.C, **like) for _ in range(3))
        self.rounded, self.x_scale = torch.empty(R, max(self.C, self.I), **like), torch.empty(R, **real)
        self.qkv = torch.empty(R, (self.H + 2 * self.K) * self.D, **like)
        self.mixed, self.inner = torch.empty(R, self.H * self.D, **like), torch.empty(R, self.I, **like)
        self.logits = torch.empty(R, self.V, **like)
        self.part = torch.empty(R, self.H, splits, self.D, **real)
        self.part_lse = torch.empty(R, self.H, splits, **real)
        self.chunks = -(-self.V // (4 * CHOOSE_BLOCK))
        self.best = torch.empty(R, self.chunks, 5, **real)
        self.tiles = {name: tile_for(name, R, self.kind) for name in STACKS} | {"head": tile_for("head", R)}
        self.slots = {name: -(-self.C // self.tiles[name].n) for name in ("o", "down")}
        self.ssq = {name: torch.zeros(n, self.R_pad, **real) for name, n in self.slots.items()}
        outs = {"qkv": self.qkv.shape[1], "o": self.C, "gate_up": self.I, "down": self.C, "head": self.V}
        grids = {n: self.R_pad * round_up(outs[n], t.n) * t.split for n, t in self.tiles.items() if t.split > 1}
        self.partial = torch.empty(max(grids.values(), default=1), **real)
        programs = (self.R_pad // self.block_m * -(-outs[n] // t.n) for n, t in self.tiles.items())
        self.counter = torch.zeros(max(programs), device=device, dtype=torch.int32)
        ranks = 3 * self.rank  # of q, k and v, the most of a stack
        self.h = torch.empty(self.R_pad, ranks, **like)
        self.h_partial = torch.empty(H_SPLIT * self.R_pad * ranks, **real)
        self.h_counter = torch.zeros(self.R_pad // self.block_m * ranks // 16, device=device, dtype=torch.int32)
        self.ready = torch.zeros(pow2(len(STACKS) * self.L), device=device, dtype=torch.int32)
        self.nf4 = pairs(device)
        self.table = torch.zeros(LAYERS + len(STACKS) * CELLS * self.L, **whole)
        self.cos, self.sin = (torch.zeros(self.N, self.S, half, **like) for _ in range(2))
        self.lengths, self.used = (torch.zeros(n, device=device, dtype=torch.int32) for n in (self.N, 1))
        self.ids, self.seed = torch.zeros(R, **whole), torch.zeros(R, **whole)
        self.all_ids, self.all_logp = torch.zeros(R, self.S + 1, **whole), torch.zeros(R, self.S + 1, **real)
        self.inverse, self.hidden = torch.ones(1, **real), torch.zeros(self.V, device=device, dtype=torch.uint8)

    @classmethod
    def fitting(cls, model, N: int, G: int, cache: GroupCache, mode: str, layers: list, rank: int) -> "Step":
        """The model's Step of this size, kept from an earlier call or new. Sizes of N and G are taken as they come, not
        rounded up: padded rows would cost every step, another capture costs once."""
        kept = _steps.setdefault(model, OrderedDict())
        strides = [tuple(row_stride(stack[0].weight) for stack in stacks.values()) for stacks in layers]
        assert len(set(strides)) == 1, f"layers whose weights are laid out in different strides: {set(strides)}"
        key = (N, G, cache.Lp, cache.S, mode, rank, strides[0])
        if key not in kept:
            kept[key] = cls(model, *key)
            if len(kept) > MAX_GRAPHS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    def begin(self, model, layers, adapters, cache: GroupCache, prompts, sampling, banned: Tensor, generator) -> None:
        """Everything that differs between calls goes into the buffers that the graph reads. layers: stacks_of each."""
        self.table.copy_(torch.tensor(self.addresses(model, layers, adapters, cache)))
        biases = [torch.cat([w.bias for w in stacks["qkv"]]) for stacks in layers]
        self.biases = biases if self.graph is None else self.biases
        for mine, new in zip(self.biases, biases):
            mine.copy_(new)
        self.norm.copy_(model.model.norm.weight)
        lengths = prompts.segments.q_lengths
        ends = torch.stack([p.max() for p in prompts.position_ids.split(lengths, dim=1)]) + 1  # (N,)
        position = (ends[:, None] + torch.arange(self.S, device=ends.device)).flatten()  # text: one number for t, h, w
        cos, sin = mrope_tables(position.expand(3, -1), self.config, self.cos.dtype)
        self.cos.copy_(cos.view_as(self.cos))
        self.sin.copy_(sin.view_as(self.sin))
        self.lengths.copy_(torch.tensor(lengths))
        self.used.fill_(-1)
        self.inverse.fill_(1 / (sampling.temperature or 1))
        self.hidden.zero_()[banned] = 1
        own = generator if isinstance(generator, list) else [generator]
        for rows, source in zip(self.seed.chunk(len(own)), own):
            rows.random_(generator=source)

    def addresses(self, model, layers, adapters, cache) -> list[int]:
        """The table: embedding, first norm, caches; then CELLS of the head and of each product of each layer."""
        decoder, table = model.model, []

        def product(weights, A=None, B=None, norm=None):
            stored = [w.codes if isinstance(w, Quantized) else w for w in weights]
            scales = [w.scales if isinstance(w, Quantized) else None for w in weights]
            empty = [None] * (3 - len(weights))
            table.extend([*stored, *empty, *scales, *empty, A, B, norm])

        first = [layer.input_layernorm.weight for layer in decoder.layers]
        table += [decoder.embed_tokens.weight, first[0], cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v]
        product([model.head_weight])
        behind = {"down": [*first[1:], decoder.norm.weight]}  # each layer's
        behind["o"] = [layer.post_attention_layernorm.weight for layer in decoder.layers]
        for i, stacks in enumerate(layers):
            for name in STACKS:
                A, B = (x[name][i] if self.rank else None for x in (adapters.A, adapters.B))
                product([w.weight for w in stacks[name]], A, B, behind[name][i] if name in behind else None)
        addresses = [0 if t is None else t.data_ptr() for t in table]
        wide = [a for i, a in enumerate(addresses[HEAD:]) if i % CELLS in (0, 1, 2, 6, 7)] + addresses[2:HEAD]
        assert all(a % 16 == 0 for a in wide), "weights, A, B and caches are read 16 bytes at a time"
        assert len(addresses) == len(self.table), f"{len(addresses)} addresses for {len(self.table)} cells"
        return addresses

    def linear(self, name: str, number: int, x, out, K: int, N: int, ssq=None, bias=None, residual=None) -> None:
        """number: of the product in this step, the head's is the last."""
        t, kind = self.tiles[name], "bf16" if name == "head" else self.kind
        split, h_split = min(t.split, -(-K // t.k)), max(1, min(H_SPLIT, K // 256))
        ssq_in, ssq_out, dummy = self.ssq.get(ssq), self.ssq.get(name), self.partial
        blocks, ranks = self.R_pad // self.block_m, self.linears[name] * self.rank
        grid = (blocks * -(-N // t.n) * split + blocks * ranks // 16 * h_split,)
        adapted = x
        if kind == "fp8":
            kernels.round_rows_kernel[(self.R,)](
                x, self.rounded, self.x_scale, K=K, BLOCK=pow2(K), PDL=self.pdl, num_warps=8, **self.early
            )
            x = self.rounded
        parts = (self.H * self.D, self.K * self.D) if name == "qkv" else (N, 0)
        linears.linear_kernel[grid](
            x, self.x_scale, adapted, self.table, HEAD if name == "head" else LAYERS + CELLS * number, number,
            bias if bias is not None else x, dummy if ssq is None else ssq_in, out,
            residual if residual is not None else x, dummy if residual is None else ssq_out, self.scaled, self.nf4,
            self.partial, self.counter, self.h, self.h_partial, self.h_counter, self.ready, self.R,
            self.config.rms_norm_eps, N=N, N_0=parts[0], N_1=parts[1], K=K, KIND=linears.KINDS[kind],
            STRIDE=self.strides[name], SLOTS=self.slots.get(ssq, 0), BLOCK_SLOTS=pow2(self.slots.get(ssq, 1)),
            R_PAD=self.R_pad, BIAS=bias is not None, SWIGLU=name == "gate_up", RESIDUAL=residual is not None,
            SPLIT=split, RANK=self.rank if ranks else 0, RANKS=ranks, H_SPLIT=h_split, BLOCK_M=self.block_m,
            BLOCK_N=t.n, BLOCK_K=t.k, AHEAD=t.ahead if K % 128 == 0 else 0, ASM=True, PDL=self.pdl, num_warps=t.warps,
            num_stages=t.stages, **self.early,
        )  # fmt: skip

    @property
    def early(self) -> dict:
        return {"launch_pdl": True} if self.pdl else {}

    def attention(self, layer: int) -> None:
        half, wide, h = pow2(self.D // 2, 16), pow2(self.D, 16), self.H // self.K
        splits = self.shared_splits + self.own_splits
        kernels.attention_kernel[(self.shared_programs + self.R * self.K * self.own_splits,)](
            self.qkv, self.table, 2, layer, self.lengths, self.used, self.cos, self.sin, self.part, self.part_lse,
            self.N, self.G, self.Lp, self.S, self.shared_splits, self.own_splits, self.D**-0.5,
            H=self.H, KV=self.K, D=self.D, HALF=half, WIDE=wide, QUERIES=self.queries, OWN_QUERIES=pow2(h, 16),
            KEYS=KEYS, SPAN=self.span, OWN_SPAN=self.own_span, PDL=self.pdl, **ATTENTION, **self.early,
        )  # fmt: skip
        kernels.combine_kernel[(self.R * self.H,)](
            self.part, self.part_lse, self.mixed, splits, D=self.D, WIDE=wide, BLOCK=pow2(splits), CHUNK=16,
            PDL=self.pdl, num_warps=2, **self.early,
        )  # fmt: skip

    def launch(self) -> None:
        C, W = self.C, self.qkv.shape[1]
        kernels.pick_up_kernel[(self.R,)](
            self.ids, self.table, 0, 1, self.x, self.scaled, self.ssq["down"], self.used, self.ready, C=C,
            SLOTS=self.slots["down"], R_PAD=self.R_pad, BLOCK=pow2(C), BLOCK_SLOTS=pow2(self.slots["down"]),
            READY=len(self.ready), PDL=self.pdl, num_warps=8,
        )  # fmt: skip
        for i in range(self.L):
            qkv, o, gate_up, down = range(4 * i, 4 * i + 4)
            self.linear("qkv", qkv, self.scaled, self.qkv, C, W, "down", bias=self.biases[i])
            self.attention(i)
            self.linear("o", o, self.mixed, self.x, self.H * self.D, C, residual=self.x)
            self.linear("gate_up", gate_up, self.scaled, self.inner, C, self.I, "o")
            self.linear("down", down, self.inner, self.x, self.I, C, residual=self.x)
        kernels.final_norm_kernel[(self.R,)](
            self.x, self.norm, self.normed, self.config.rms_norm_eps, C=C, BLOCK=pow2(C), PDL=self.pdl, num_warps=8,
            **self.early,
        )  # fmt: skip
        self.linear("head", 4 * self.L, self.normed, self.logits, C, self.V)
        if self.mode != "logits":
            self.choose(self.logits)

    def choose(self, logits: Tensor) -> None:
        """logits (R, V) -> ids, and column used + 1 of all_ids and all_logp."""
        kernels.choose_chunk_kernel[(self.R, self.chunks)](
            logits, self.hidden, self.seed, self.used, self.inverse, self.best, self.V, self.chunks,
            GREEDY=self.mode == "greedy", BLOCK=CHOOSE_BLOCK, PDL=self.pdl, num_warps=4, **self.early,
        )  # fmt: skip
        kernels.choose_kernel[(self.R,)](
            self.best, self.ids, self.all_ids, self.all_logp, self.used, self.chunks, self.V, self.S + 1,
            BLOCK=pow2(self.chunks), PDL=self.pdl, num_warps=1, **self.early,
        )  # fmt: skip

    def capture(self) -> None:
        """Run once, which compiles and loads the kernels, then capture."""
        self.launch()
        self.used.fill_(-1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.launch()
        self.graph = graph


class CudaDecoder(Decoder):
    """The Decoder of a GPU: a graph replay a token."""

    look_every = STOP_CHECK

    def __init__(self, model, prompts, sampling, G: int, generator):
        lengths, limit = prompts.segments.q_lengths, sampling.max_new_tokens
        self.sampling, self.generator = sampling, generator
        truncated = 0 < sampling.top_k or sampling.top_p < 1
        mode = "greedy" if sampling.temperature == 0 else "logits" if truncated else "race"
        self.cache = GroupCache(model, lengths, G, round_up(max(1, limit - 1), OWN_BUCKET))
        banned = sorted({*model.config.vision_token_ids, *sampling.banned_ids})
        self.banned = torch.tensor(banned, device=prompts.input_ids.device)
        hidden = model(prompts, self.cache.prefill(prompts.segments, model.ops.attention))
        logits = hidden[prompts.segments.cu_q[1:].long() - 1] @ model.head_weight.T
        self.layers = [stacks_of(layer) for layer in model.model.layers]
        if model.base_dtype == "bf16":
            self.layers = merged(self.layers, model.head_weight)
        self.adapters = Adapters(self.layers, model.head_weight)
        self.step = Step.fitting(model, len(lengths), G, self.cache, mode, self.layers, self.adapters.rank)
        self.step.begin(model, self.layers, self.adapters, self.cache, prompts, sampling, self.banned, generator)
        if self.step.graph is None and limit > 1:
            self.step.capture()
        self.logits = logits.repeat_interleave(G, 0)
        self.ids, self.logprobs = self.step.all_ids, self.step.all_logp

    def draw(self, t: int) -> None:
        step = self.step
        if t:
            step.graph.replay()
            self.logits = step.logits
        if step.mode == "logits":
            ids, step.all_logp[:, t] = sample(self.logits, self.sampling, self.banned, None, self.generator)
            step.ids.copy_(ids)
            step.all_ids[:, t] = ids
        elif t == 0:
            step.choose(self.logits)

    def close(self) -> None:
        self.layers = self.adapters = self.cache = None
        torch.cuda.empty_cache()  # the merged weights' block: what the update keeps for good must not lie in it

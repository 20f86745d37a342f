"""Group decoding on a GPU at the speed of its memory: the fast Decoder of decode.py, for models in bf16.

A token's time has a floor, reading the weights once: 6.2 GB for the 3B model in bf16, 1.5 ms on an H200. So a step is
one captured CUDA graph of hand-written kernels (kernels.py): six a layer, where plain PyTorch launches forty. The
length of the caches and all addresses are read on the device: one graph serves all steps, and later rollouts too.

A bf16 base gets a copy of its weights with the adapters merged, for the length of a rollout: apart they cost a fifth of
a step (dev/LOG.md). Beside low-bit weights, which are read as they are stored, adapters stay apart: the smallest
reaches the sampler, and no copy of the weights exists.

Nothing in the loop waits for the device, except a look every STOP_CHECK steps at whether all rows have ended, and
looking up tokens in an embedding that is in host memory.
"""

import warnings
from collections import OrderedDict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from model.adapters import Weights, weights_of
from model.decode import PlainDecoder, sample
from model.fast import kernels
from model.fast.graphs import pow2, round_up
from model.fast.quantized import has_e4m3, round_rows
from model.quantized import Quantized
from model.rope import mrope_tables

KEYS = 64  # keys that a program of attention looks at at a time
PARTS = 128  # programs of one layer's attention to the prompts that are worth having: one a multiprocessor
MAX_GRAPHS = 8  # kept a model; a graph holds some MB of buffers, and capturing another takes well under a second
LINEARS = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}  # a layer's products in their order, and the linears of each
CELLS = 9  # of a row of the table of addresses: up to three weights, their scales, A, B, the norm's weight behind them
CHOOSE_BLOCK = 1024  # a quarter of the logits that a program of `choose` reads

_steps: WeakKeyDictionary = WeakKeyDictionary()  # model -> {size: Step}, the latest last


class Tile(NamedTuple):
    """How `linear_kernel` cuts a product up. Measured at the 3B shape (dev/LOG.md)."""

    n: int  # rows of W a program
    k: int  # columns at a time
    split: int  # programs that share the columns
    warps: int
    stages: int  # loads in flight
    ahead: int  # columns of W asked for before the input is ready


TILES = {  # for at most 16 rows, and for more
    "qkv": (Tile(16, 256, 2, 4, 5, 256), Tile(32, 128, 1, 4, 5, 256)),
    "o": (Tile(32, 256, 4, 4, 5, 256), Tile(32, 128, 1, 4, 5, 256)),
    "gate_up": (Tile(32, 128, 1, 4, 4, 512), Tile(128, 64, 1, 4, 3, 256)),
    "down": (Tile(64, 128, 8, 4, 5, 256), Tile(64, 128, 4, 4, 5, 256)),
    "head": (Tile(64, 128, 1, 4, 5, 128), Tile(64, 128, 1, 4, 3, 0)),
}
A_TILE = Tile(16, 128, 8, 4, 4, 0)


def make_decoder(model, prompts, sampling, G: int, generator) -> PlainDecoder:
    """CudaDecoder in bf16 where there is room for it, else the plain one."""
    is_fast = model.head_weight.dtype == torch.bfloat16 and kernels.triton and sampling.repetition_penalty == 1
    if is_fast and (model.base_dtype != "fp8" or has_e4m3(model.head_weight.device)):
        try:
            return CudaDecoder(model, prompts, sampling, G, generator)
        except torch.OutOfMemoryError:
            hint = "--offload_optimizer True, or fewer prompts at a time"
            warnings.warn(f"slow decoding: no room for caches and merged weights; try {hint}", stacklevel=4)
    return PlainDecoder(model, prompts, sampling, G, generator)


def stacks_of(layer) -> dict[str, list[Weights]]:
    """A decoder layer's products: the linears that share an input go together."""
    q, k, v, o, gate, up, down = weights_of(layer, *layer.self_attn.values(), *layer.mlp.values())
    return {"qkv": [q, k, v], "o": [o], "gate_up": [gate, up], "down": [down]}


def norms_of(model) -> list[Tensor]:
    """Weights of a model's norms in the order of their use, 2 L + 1."""
    pairs = [(layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in model.model.layers]
    return [weight for pair in pairs for weight in pair] + [model.model.norm.weight]


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
        torch.addmm(w.weight, w.B, w.A, alpha=w.scale, out=out)
        return Weights(out, w.bias)

    return [{name: [merge(w) for w in stack] for name, stack in stacks.items()} for stacks in layers]


def stacked_adapter(stack: list[Weights], rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """A (linears of the stack * rank, in) and B (out, rank), scaled; zeros where a linear has none."""
    A = like.new_zeros(len(stack) * rank, stack[0].weight.shape[1])
    B = like.new_zeros(sum(w.weight.shape[0] for w in stack), rank)
    for own_a, own_b, w in zip(A.split(rank), B.split([w.weight.shape[0] for w in stack]), stack):
        if w.A is not None:
            own_a[: len(w.A)].copy_(w.A)
            own_b[:, : len(w.A)].copy_(w.B).mul_(w.scale)
    return A, B


def stored(weights: list) -> list[Tensor | None]:
    """Where the numbers of up to three weights lie, then where their scales do: cells of the table."""
    empty = [None] * (3 - len(weights))
    numbers = [w.codes if isinstance(w, Quantized) else w for w in weights]
    scales = [w.scales if isinstance(w, Quantized) else None for w in weights]
    return [*numbers, *empty, *scales, *empty]


class Step:
    """One token of R = N*G rows: buffers, the order of the kernels, and the graph made of it."""

    def __init__(self, model, N: int, G: int, Lp: int, S: int, mode: str, rank: int):
        """Lp, S: slots of the caches. mode: "race" draws, "greedy" takes the largest, "logits" leaves the choice to the
        caller. rank: of the adapters apart."""
        c, device = model.config, model.head_weight.device
        self.config, self.N, self.G, self.Lp, self.S, self.mode, self.rank = c, N, G, Lp, S, mode, rank
        self.R, self.H, self.K, self.D = N * G, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.graph, self.device = None, device
        self.kinds = dict.fromkeys(LINEARS, model.base_dtype) | {"head": model.head_dtype}
        self.embed, self.first_norm = model.model.embed_tokens, norms_of(model)[0].data
        self.on_host = model.offload_embedding
        self.pdl = torch.cuda.get_device_capability(device) >= (9, 0)
        self.early = {"launch_pdl": True} if self.pdl else {}
        C, inner, heads, V = c.hidden_size, c.intermediate_size, self.H * self.D, c.vocab_size
        self.shapes = {  # (rows of W, columns) of each product
            "qkv": (heads + 2 * self.K * self.D, C), "o": (C, heads), "gate_up": (inner, C), "down": (C, inner),
            "head": (V, C),
        }  # fmt: skip
        self.block_m = 16 if self.R <= 16 else 32 if self.R <= 32 else 64
        self.R_pad = round_up(self.R, self.block_m)
        self.tiles = {name: few if self.R <= 16 else many for name, (few, many) in TILES.items()}
        for name in [name for name, kind in self.kinds.items() if kind != "bf16"]:
            t, few = self.tiles[name], self.R <= 16
            n, k = min(t.n, 32) if few else t.n, 128 if few or self.kinds[name] == "nf4" else t.k
            self.tiles[name] = t._replace(n=n, k=k, stages=6 if few and name == "gate_up" else t.stages)
        self.queries = min(64, pow2(G * self.H // self.K, 16))
        tiles = -(-G * self.H // self.K // self.queries)
        parts = max(1, min(PARTS // (N * self.K * tiles), Lp // KEYS))
        self.span = round_up(-(-Lp // parts), KEYS)
        self.own_span = 64 if self.R <= 16 else 128  # own keys a program of attention reads
        self.shared_splits, self.own_splits = -(-Lp // self.span), -(-S // self.own_span)
        self.programs = self.K * (N * tiles * self.shared_splits + self.R * self.own_splits)
        self.make_buffers(model.head_weight.dtype, self.shared_splits + self.own_splits)

    def make_buffers(self, dtype, splits: int) -> None:
        R, V, (width, C), inner = self.R, self.shapes["head"][0], self.shapes["qkv"], self.shapes["down"][1]
        make = lambda *shape, dtype=dtype: torch.zeros(*shape, dtype=dtype, device=self.device)
        real, whole = torch.float32, torch.int64
        self.x, self.scaled, self.qkv, self.logits = make(R, C), make(R, C), make(R, width), make(R, V)
        self.mixed, self.inner = make(R, self.H * self.D), make(R, inner)
        self.h = make(R, 3 * self.rank)  # of q, k and v, the most of a product
        self.part, self.part_lse = make(R, self.H, splits, self.D, dtype=real), make(R, self.H, splits, dtype=real)
        self.slots = {name: -(-C // self.tiles[name].n) for name in ("o", "down")}
        self.ssq = {name: make(n, self.R_pad, dtype=real) for name, n in self.slots.items()}
        outs = [(self.shapes[name][0], tile) for name, tile in self.tiles.items()] + [(3 * self.rank, A_TILE)]
        self.partial = make(max(self.R_pad * round_up(N, t.n) * t.split for N, t in outs if t.split > 1), dtype=real)
        self.counter = make(max(self.R_pad // self.block_m * -(-N // t.n) for N, t in outs), dtype=torch.int32)
        self.table = make(2 + 4 * self.config.num_hidden_layers, CELLS, dtype=whole)
        self.biases = make(self.config.num_hidden_layers, width)
        self.cos, self.sin = (make(self.N, self.S, self.D // 2) for _ in range(2))
        self.lengths, self.used = make(self.N, dtype=torch.int32), make(1, dtype=torch.int32)
        self.ids, self.seed, self.all_ids = make(R, dtype=whole), make(R, dtype=whole), make(R, self.S + 1, dtype=whole)
        self.all_logp, self.inverse = make(R, self.S + 1, dtype=real), make(1, dtype=real)
        self.chunks = -(-V // (4 * CHOOSE_BLOCK))
        self.best, self.hidden = make(R, self.chunks, 5, dtype=real), make(V, dtype=torch.uint8)

    @classmethod
    def fitting(cls, model, N: int, G: int, cache, mode: str, rank: int) -> "Step":
        """The model's Step of this size, kept from an earlier call or new. Sizes of N and G are taken as they come, not
        rounded up: padded rows would cost every step, another capture costs once."""
        kept = _steps.setdefault(model, OrderedDict())
        size = (N, G, cache.prompt_k.shape[3], cache.own_k.shape[3], mode, rank)
        fixed = model.model.embed_tokens.weight, norms_of(model)[0]  # a model that moved is another
        key = (*size, *(weight.data_ptr() for weight in fixed))
        if key not in kept:
            kept[key] = cls(model, *size)
            if len(kept) > MAX_GRAPHS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    def begin(self, model, layers, cache, prompts, sampling, banned: Tensor, generator) -> list:
        """Everything that differs between calls goes into the buffers that the graph reads. Returns what has to stay
        alive while they are read."""
        addresses, alive = self.addresses(model, layers, cache)
        self.table.copy_(torch.tensor(addresses))
        self.biases.copy_(torch.stack([torch.cat([w.bias for w in stacks["qkv"]]) for stacks in layers]))
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
        return alive

    def addresses(self, model, layers, cache) -> tuple[list[list[int]], list]:
        """The table: a row of caches, one of the head, one of each product of each layer; and what was made for it."""
        norms, alive = norms_of(model), []
        table = [[cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v], stored([model.head_weight])]
        for i, stacks in enumerate(layers):
            behind = {"o": norms[2 * i + 1], "down": norms[2 * i + 2]}
            for name, stack in stacks.items():
                A, B = stacked_adapter(stack, self.rank, norms[0]) if self.rank else (None, None)
                table.append([*stored([w.weight for w in stack]), A, B, behind.get(name)])
                alive.append((A, B))
        rows = [[0 if t is None else t.data_ptr() for t in row] + [0] * (CELLS - len(row)) for row in table]
        wide = [row[i] for row in rows[1:] for i in (0, 1, 2, 6, 7)] + rows[0]
        assert all(a % 16 == 0 for a in wide), "weights, A, B and caches are read 16 bytes at a time"
        return rows, alive

    def product(self, name: str, i: int, x, out, ssq=None, residual=None) -> None:
        """out = a product of layer i, or of the head, from x and the sums of squares that `ssq` left."""
        (N, K), row, kind, scale = self.shapes[name], 1, self.kinds[name], x
        if name != "head":
            row = 2 + 4 * i + list(LINEARS).index(name)
            if self.rank:
                self.launch_linear(A_TILE, x, scale, self.h, CELLS * row + 6, LINEARS[name] * self.rank, K, ssq=ssq)
            if kind == "fp8":
                x, scale = round_rows(x)
        self.launch_linear(
            self.tiles[name], x, scale, out, CELLS * row, N, K, kind=kind, ssq=ssq, residual=residual,
            bias=self.biases[i] if name == "qkv" else None, swiglu=name == "gate_up", ssq_out=self.ssq.get(name),
            rank=self.rank if name != "head" else 0, linears=LINEARS.get(name, 1),
            parts=(self.H * self.D, self.K * self.D) if name == "qkv" else (N, 0),
        )  # fmt: skip

    def launch_linear(self, t: Tile, x, x_scale, out, cell: int, N: int, K: int, kind="bf16", ssq=None, bias=None,
                      residual=None, ssq_out=None, swiglu=False, rank=0, linears=1, parts=None) -> None:  # fmt: skip
        """The kernel; what it does not take is some tensor that it does not read."""
        split, (N_0, N_1) = min(t.split, -(-K // t.k)), parts or (N, 0)
        given = lambda tensor: self.x if tensor is None else tensor
        kernels.linear_kernel[(self.R_pad // self.block_m * -(-N // t.n) * split,)](
            x, x_scale, self.table, cell, given(bias), given(self.ssq.get(ssq)), self.h, out, given(residual),
            given(ssq_out), self.scaled, self.partial, self.counter, self.R, self.config.rms_norm_eps, N=N, N_0=N_0,
            N_1=N_1, K=K, KIND=kind, SLOTS=self.slots.get(ssq, 0), BLOCK_SLOTS=pow2(self.slots.get(ssq, 1)),
            R_PAD=self.R_pad, BIAS=bias is not None, SWIGLU=swiglu, RESIDUAL=residual is not None, RANK=rank,
            RANKS=linears * rank, SPLIT=split, BLOCK_M=self.block_m, BLOCK_N=t.n, BLOCK_K=t.k,
            AHEAD=t.ahead if K % 128 == 0 else 0, PDL=self.pdl, num_warps=t.warps, num_stages=t.stages, **self.early,
        )  # fmt: skip

    def attention(self, layer: int) -> None:
        wide, splits = pow2(self.D, 16), self.shared_splits + self.own_splits
        kernels.attention_kernel[(self.programs,)](
            self.qkv, self.table, layer, self.lengths, self.used, self.cos, self.sin, self.part, self.part_lse,
            self.N, self.G, self.Lp, self.S, self.shared_splits, self.own_splits, self.D**-0.5,
            H=self.H, KV=self.K, D=self.D, HALF=pow2(self.D // 2, 16), WIDE=wide, QUERIES=self.queries,
            OWN_QUERIES=pow2(self.H // self.K, 16), KEYS=KEYS, SPAN=self.span, OWN_SPAN=self.own_span, PDL=self.pdl,
            num_warps=4, num_stages=2, **self.early,
        )  # fmt: skip
        kernels.combine_kernel[(self.R * self.H,)](
            self.part, self.part_lse, self.mixed, splits, D=self.D, WIDE=wide, BLOCK=pow2(splits), CHUNK=16,
            PDL=self.pdl, num_warps=2, **self.early,
        )  # fmt: skip

    def look_up(self) -> None:
        """Before `launch`: the rows of an embedding in host memory, for which a graph cannot wait."""
        if self.on_host:
            self.x.copy_(self.embed(self.ids))

    def launch(self) -> None:
        self.used += 1
        if not self.on_host:
            torch.index_select(self.embed.weight.data, 0, self.ids, out=self.x)
        torch.mul(self.x, self.first_norm, out=self.scaled)
        self.ssq["down"].zero_()
        self.ssq["down"][0, : self.R] = self.x.float().square().sum(1)
        for i in range(self.config.num_hidden_layers):
            self.product("qkv", i, self.scaled, self.qkv, ssq="down")
            self.attention(i)
            self.product("o", i, self.mixed, self.x, residual=self.x)
            self.product("gate_up", i, self.scaled, self.inner, ssq="o")
            self.product("down", i, self.inner, self.x, residual=self.x)
        self.product("head", 0, self.scaled, self.logits, ssq="down")
        if self.mode != "logits":
            self.choose(self.logits)

    def choose(self, logits: Tensor) -> None:
        """logits (R, V) -> ids, and column used + 1 of all_ids and all_logp."""
        kernels.choose_chunk_kernel[(self.R, self.chunks)](
            logits, self.hidden, self.seed, self.used, self.inverse, self.best, logits.shape[1], self.chunks,
            GREEDY=self.mode == "greedy", BLOCK=CHOOSE_BLOCK, PDL=self.pdl, num_warps=4, **self.early,
        )  # fmt: skip
        kernels.choose_kernel[(self.R,)](
            self.best, self.ids, self.all_ids, self.all_logp, self.used, self.chunks, logits.shape[1], self.S + 1,
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


class CudaDecoder(PlainDecoder):
    """The Decoder of a GPU: a graph replay a token."""

    prompt_bucket, own_bucket = 256, 128  # so that graphs fit again

    def __init__(self, model, prompts, sampling, G: int, generator):
        super().__init__(model, prompts, sampling, G, generator)
        truncated = 0 < sampling.top_k or sampling.top_p < 1
        mode = "greedy" if sampling.temperature == 0 else "logits" if truncated else "race"
        layers = [stacks_of(layer) for layer in model.model.layers]
        if model.base_dtype == "bf16":
            layers = merged(layers, model.model.norm.weight)
        adapters = [w.A for stacks in layers for stack in stacks.values() for w in stack if w.A is not None]
        rank = round_up(max(map(len, adapters), default=0), 16)
        self.fast_step = Step.fitting(model, len(prompts.segments.q_lengths), G, self.cache, mode, rank)
        alive = self.fast_step.begin(model, layers, self.cache, prompts, sampling, self.banned, generator)
        self.alive = layers, alive
        if self.fast_step.graph is None and sampling.max_new_tokens > 1:
            self.fast_step.capture()
        self.ids, self.logprobs = self.fast_step.all_ids, self.fast_step.all_logp

    def draw(self, t: int) -> None:
        step = self.fast_step
        if t:
            step.look_up()
            step.graph.replay()
            self.logits = step.logits
        if step.mode == "logits":
            ids, step.all_logp[:, t] = sample(self.logits, self.sampling, self.banned, None, self.noise)
            step.ids.copy_(ids)
            step.all_ids[:, t] = ids
        elif t == 0:
            step.choose(self.logits)

    def close(self) -> None:
        self.alive = self.cache = None
        free, total = torch.cuda.mem_get_info(self.model.head_weight.device)
        if free < total / 4:  # what the update keeps for good must not lie in the block of the merged weights
            torch.cuda.empty_cache()

"""Group decoding on a GPU at the speed of its memory, in bf16: the fast Decoder of decode.py.

A token's time has a floor, reading the weights once: 6.2 GB for the 3B model, 2.1 ms on an H100. The rest of a step is
kept small:

    SamplingCopy   the decoder layers' weights with adapters merged, fused, for the length of a rollout
    Step           one token of every row as a captured CUDA graph of hand-written kernels (kernels.py): six a layer,
                   where plain PyTorch launches thirty; the length of the caches is read on the device, so one graph
                   serves all steps, and addresses too, so it serves later rollouts
    GroupCache     a prompt's keys and values once for its whole group, as in decode.py

Nothing in the loop waits for the device, except a look every STOP_CHECK steps at whether all rows have ended.
"""

import warnings
from collections import OrderedDict
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import Weights, weights_of
from model.decode import STOP_CHECK, Decoder, PlainDecoder, sample
from model.fast import gpu, kernels
from model.fast.graphs import pow2, round_up
from model.rope import mrope_tables

KEYS = 64  # prompt and own keys a program looks at at a time
PARTS = 128  # programs of one layer's attention to the prompts that are worth having: one a multiprocessor
PROMPT_BUCKET, OWN_BUCKET = 256, 128  # cache lengths are rounded up to these, so that graphs fit again
ATTENTION = dict(num_warps=4, num_stages=2)
MAX_GRAPHS = 8  # kept a model; a graph holds some MB of buffers, and capturing another takes well under a second
MARGIN = 1 << 29  # bytes of GPU memory that a rollout leaves free, beside copy and caches, for logits and activations
CHOOSE_BLOCK = 1024  # a quarter of the logits that a program of `choose` reads

_steps: WeakKeyDictionary = WeakKeyDictionary()  # model -> {bucket: Step}, the latest last


def make_decoder(model, prompts, sampling, G: int, generator) -> Decoder:
    """CudaDecoder for bf16 weights where its copy and caches have room, else the plain one."""
    is_fast = model.head_weight.dtype == torch.bfloat16 and kernels.triton and sampling.repetition_penalty == 1
    decoder = CudaDecoder if is_fast and has_room(model, prompts, sampling, G) else PlainDecoder
    return decoder(model, prompts, sampling, G, generator)


def has_room(model, prompts, sampling, G: int) -> bool:
    """Whether the copy of the weights, keys and values fit. Warns where they do not."""
    device, layers = model.head_weight.device, model.model.layers
    need = 2 * sum(p.numel() for layer in layers for n, p in layer.named_parameters() if n.endswith("proj.weight"))
    reserved, (free, total) = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)
    free = min(free, torch.cuda.get_per_process_memory_fraction(device) * total - reserved)
    free += reserved - torch.cuda.memory_allocated(device)
    config, lengths = model.config, prompts.segments.q_lengths
    slots = len(lengths) * (round_up(max(lengths), PROMPT_BUCKET) + G * round_up(sampling.max_new_tokens, OWN_BUCKET))
    need += 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * slots  # keys and values
    if free < need + MARGIN:
        shortage = f"weights merged for sampling and caches take {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        hint = "--offload_optimizer True frees the optimizer's, fewer prompts at a time the caches'"
        warnings.warn(f"slow decoding: {shortage}; {hint}", stacklevel=4)
        return False
    return True


def merge(layers: list[Weights], outs: list[Tensor], norms: list[Tensor] | None = None) -> None:
    """outs[i] (N, K) = (W + scale B A) * norm of layers[i], summed in float32, rounded once: one launch for all of
    them, which are alike: one linear of several layers. Their adapters have one rank and dtype, or none has one."""
    A, weight, rows = layers[0].A, layers[0].weight, []
    N, K = weight.shape
    for i, (w, out) in enumerate(zip(layers, outs)):
        assert A is None or (w.A.is_contiguous() and w.B.is_contiguous()), "an adapter is laid out in strides"
        pair = (w.weight, w.weight) if A is None else (w.A, w.B)
        rows.append([t.data_ptr() for t in (w.weight, *pair, norms[i] if norms else out, out)])
    align = 16 if all(address % 16 == 0 for row in rows for address in row) else weight.element_size()
    table = torch.tensor(rows).to(weight.device, non_blocking=True)
    scales = torch.tensor([float(w.scale) for w in layers]).to(weight.device, non_blocking=True)
    grid = (-(-K // 128), -(-N // 64), len(layers))
    kernels.merge_kernel[grid](
        table, scales, weight, weight if A is None else A, N, K, weight.stride(0), 0 if A is None else len(A),
        ADAPTER=A is not None, NORM=norms is not None, ALIGN=align, BLOCK_N=64, BLOCK_K=128, BLOCK_R=64, num_warps=8,
    )  # fmt: skip


def empty_matrices(shapes: list, like: Tensor, allocate) -> list[Tensor]:
    """Empty matrices of these shapes, 16-byte aligned, the largest first: where `allocate` (graphs.py) finds room, and
    those that find none in one block. allocate: None where there are no pools."""
    made, size = [None] * len(shapes), [rows * columns for rows, columns in shapes]
    for i in sorted(range(len(shapes)), key=lambda i: -size[i]):
        pool = allocate and allocate(size[i] * like.element_size())
        if pool:
            with pool:
                made[i] = like.new_empty(shapes[i])
    rest = [i for i, matrix in enumerate(made) if matrix is None]
    rooms = [round_up(size[i], 128) for i in rest]
    for i, room in zip(rest, like.new_empty(sum(rooms)).split(rooms)):
        made[i] = room[: size[i]].view(shapes[i])
    return made


class SamplingCopy:
    """The decoder layers' weights as sampling reads them: q, k and v in one, gate and up in one, adapters merged, the
    norm before a product folded into it. Costs its bytes (5.2 GiB for 3B) and some milliseconds; drop it after the
    rollout. What finds room in the pools of the CUDA graphs lies there, the rest in one block: pieces that the update
    can use once it is free."""

    NAMES = ("qkv", "o", "gate_up", "down")

    @torch.no_grad()
    def __init__(self, model):
        self.eps, layers = model.config.rms_norm_eps, model.model.layers
        weights = [weights_of(layer, *layer.self_attn.values(), *layer.mlp.values()) for layer in layers]
        q, k, v, o, gate, up, down = zip(*weights)  # each of every layer
        stacks = dict(zip(self.NAMES, ((q, k, v), (o,), (gate, up), (down,))))
        norms = {
            "qkv": [layer.input_layernorm.weight for layer in layers],
            "gate_up": [layer.post_attention_layernorm.weight for layer in layers],
        }
        shapes = [(sum(len(p[0].weight) for p in stack), stack[0][0].weight.shape[1]) for stack in stacks.values()]
        allocate = model.ops.graphs and model.ops.graphs.scratch()
        made = iter(empty_matrices(shapes * len(layers), model.head_weight, allocate))
        self.layers = [{name: next(made) for name in self.NAMES} for _ in layers]
        self.biases = [torch.cat([w.bias for w in qkv]) for qkv in zip(q, k, v)]
        for name, stack in stacks.items():
            outs = [layer[name].split([len(p[0].weight) for p in stack]) for layer in self.layers]
            for linear, out in zip(stack, zip(*outs)):
                self.merge_alike(linear, out, norms.get(name))

    def merge_alike(self, linear, outs, norms) -> None:
        """One linear of every layer: some layers may have no adapter, or another."""
        kinds = [(w.weight.stride(), None if w.A is None else (len(w.A), w.A.dtype)) for w in linear]
        for kind in set(kinds):
            which = [n for n, k in enumerate(kinds) if k == kind]
            merge([linear[n] for n in which], [outs[n] for n in which], norms and [norms[n] for n in which])

    def prefill(self, model, prompts, x: Tensor, cache) -> Tensor:
        """The prompts through the copy, keys and values into the GroupCache: logits of each one's last token, (N, V).
        x: (T, C), their embeddings; it is written over."""
        config, (T, C) = model.config, x.shape
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        cos, sin = mrope_tables(prompts.position_ids, config, x.dtype)
        for number, (w, bias) in enumerate(zip(self.layers, self.biases)):
            qkv = F.linear(F.rms_norm(x, (C,), None, self.eps), w["qkv"], bias).view(T, H + 2 * K, D)
            q, k = gpu.turn(qkv[:, : H + K], cos, sin, 1.0).split([H, K], dim=1)
            v = qkv[:, H + K :]
            cache.prompt_k[number].view(-1, K, D).index_copy_(0, cache.slots, k)
            cache.prompt_v[number].view(-1, K, D).index_copy_(0, cache.slots, v)
            x.addmm_(gpu.attention(q, k, v, prompts.segments).reshape(T, H * D), w["o"].T)
            h = F.rms_norm(x, (C,), None, self.eps)
            gate, up = w["gate_up"].chunk(2)
            x.addmm_(gpu.SwiGLU.apply(F.linear(h, gate), F.linear(h, up)), w["down"].T)
        last = prompts.segments.cu_q[1:].long() - 1
        return model.model.norm(x[last]) @ model.head_weight.T


class Tile(NamedTuple):
    """How `linear_kernel` cuts a product up."""

    n: int  # rows of W a program
    k: int  # columns at a time
    split: int  # programs that share the columns
    warps: int
    stages: int  # loads in flight
    ahead: int  # bytes of each row of W asked for before the input is ready


def tile_for(name: str, rows: int) -> Tile:
    """Measured on an H100 at the 3B shape (dev/LOG.md)."""
    few = {
        "qkv": Tile(16, 256, 2, 4, 5, 512), "o": Tile(32, 256, 4, 4, 5, 512), "gate_up": Tile(32, 128, 1, 4, 4, 1024),
        "down": Tile(64, 128, 8, 4, 5, 512), "head": Tile(64, 128, 1, 4, 5, 256),
    }  # fmt: skip
    many = {
        "qkv": Tile(32, 128, 1, 4, 5, 512), "o": Tile(32, 128, 1, 4, 5, 512), "gate_up": Tile(128, 64, 1, 4, 3, 512),
        "down": Tile(64, 128, 4, 4, 5, 512), "head": Tile(64, 128, 1, 4, 3, 0),
    }  # fmt: skip
    return (few if rows <= 16 else many)[name]


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


class Step:
    """One token of R = N*G rows: buffers, the order of the kernels, and the graph made of it."""

    def __init__(self, model, N: int, G: int, Lp: int, S: int, mode: str):
        """mode: "race" draws, "greedy" takes the largest, "logits" leaves the choice to the caller."""
        config, weight = model.config, model.head_weight
        self.config, self.N, self.G, self.Lp, self.S, self.mode = config, N, G, Lp, S, mode
        self.R, self.H, self.K, self.D = N * G, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.C, self.I, self.V = config.hidden_size, config.intermediate_size, len(weight)
        self.L = config.num_hidden_layers
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
        self.x, self.normed = torch.empty(R, self.C, **like), torch.empty(R, self.C, **like)
        self.qkv = torch.empty(R, (self.H + 2 * self.K) * self.D, **like)
        self.mixed, self.inner = torch.empty(R, self.H * self.D, **like), torch.empty(R, self.I, **like)
        self.logits = torch.empty(R, self.V, **like)
        self.part = torch.empty(R, self.H, splits, self.D, **real)
        self.part_lse = torch.empty(R, self.H, splits, **real)
        self.chunks = -(-self.V // (4 * CHOOSE_BLOCK))
        self.best = torch.empty(R, self.chunks, 5, **real)
        self.tiles = {name: tile_for(name, R) for name in (*SamplingCopy.NAMES, "head")}
        self.slots = {name: -(-self.C // self.tiles[name].n) for name in ("o", "down")}
        self.ssq = {name: torch.zeros(n, self.R_pad, **real) for name, n in self.slots.items()}
        outs = {"qkv": self.qkv.shape[1], "o": self.C, "gate_up": self.I, "down": self.C, "head": self.V}
        grids = {n: self.R_pad * round_up(outs[n], t.n) * t.split for n, t in self.tiles.items() if t.split > 1}
        self.partial = torch.empty(max(grids.values(), default=1), **real)
        programs = (self.R_pad // self.block_m * -(-outs[n] // t.n) for n, t in self.tiles.items())
        self.counter = torch.zeros(max(programs), device=device, dtype=torch.int32)
        self.table = torch.zeros(6 + 4 * self.L, **whole)
        self.cos, self.sin = (torch.zeros(self.N, self.S, half, **like) for _ in range(2))
        self.lengths, self.used = (torch.zeros(n, device=device, dtype=torch.int32) for n in (self.N, 1))
        self.ids, self.seed = torch.zeros(R, **whole), torch.zeros(R, **whole)
        self.all_ids, self.all_logp = torch.zeros(R, self.S + 1, **whole), torch.zeros(R, self.S + 1, **real)
        self.inverse, self.hidden = torch.ones(1, **real), torch.zeros(self.V, device=device, dtype=torch.uint8)

    @classmethod
    def fitting(cls, model, N: int, G: int, cache: GroupCache, mode: str) -> "Step":
        """The model's Step of this size, kept from an earlier call or new. Sizes of N and G are taken as they come, not
        rounded up: padded rows would cost every step, another capture costs once."""
        kept = _steps.setdefault(model, OrderedDict())
        key = (N, G, cache.Lp, cache.S, mode)
        if key not in kept:
            kept[key] = cls(model, *key)
            if len(kept) > MAX_GRAPHS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    def begin(self, model, copy: SamplingCopy, cache: GroupCache, prompts, sampling, banned: Tensor, generator) -> None:
        """Everything that differs between calls goes into the buffers that the graph reads."""
        tensors = [model.head_weight, model.model.embed_tokens.weight]
        tensors += [cache.prompt_k, cache.prompt_v, cache.own_k, cache.own_v]
        tensors += [layer[name] for layer in copy.layers for name in copy.NAMES]
        addresses = [t.data_ptr() for t in tensors]
        assert all(a % 16 == 0 for a in addresses), "the kernels read 16 bytes at a time"
        self.table.copy_(torch.tensor(addresses))
        self.biases = copy.biases if self.graph is None else self.biases
        for mine, new in zip(self.biases, copy.biases):
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

    def linear(self, name: str, cell: int, x: Tensor, out: Tensor, K: int, N: int, ssq=None, bias=None, residual=None):
        t = self.tiles[name]
        split = min(t.split, -(-K // t.k))
        ssq_in, ssq_out, dummy = self.ssq.get(ssq), self.ssq.get(name), self.partial
        grid = (self.R_pad // self.block_m, -(-N // t.n), split)
        kernels.linear_kernel[grid](
            x, self.table, cell, bias if bias is not None else x, dummy if ssq is None else ssq_in, out,
            residual if residual is not None else x, dummy if residual is None else ssq_out, self.partial, self.counter,
            self.R, self.config.rms_norm_eps, N=N, K=K, SLOTS=self.slots.get(ssq, 0),
            BLOCK_SLOTS=pow2(self.slots.get(ssq, 1)), R_PAD=self.R_pad, BIAS=bias is not None, SWIGLU=name == "gate_up",
            RESIDUAL=residual is not None, SPLIT=split, STEPS=-(-K // (t.k * split)), BLOCK_M=self.block_m, BLOCK_N=t.n,
            BLOCK_K=t.k, AHEAD=t.ahead if K % 64 == 0 else 0, PDL=self.pdl, num_warps=t.warps, num_stages=t.stages,
            **self.early,
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
            self.ids, self.table, 1, self.x, self.ssq["down"], self.used, C=C, SLOTS=self.slots["down"],
            R_PAD=self.R_pad, BLOCK=pow2(C), BLOCK_SLOTS=pow2(self.slots["down"]), PDL=self.pdl, num_warps=8,
        )  # fmt: skip
        for i in range(self.L):
            qkv, o, gate_up, down = range(6 + 4 * i, 10 + 4 * i)
            self.linear("qkv", qkv, self.x, self.qkv, C, W, "down", bias=self.biases[i])
            self.attention(i)
            self.linear("o", o, self.mixed, self.x, self.H * self.D, C, residual=self.x)
            self.linear("gate_up", gate_up, self.x, self.inner, C, self.I, "o")
            self.linear("down", down, self.inner, self.x, self.I, C, residual=self.x)
        kernels.final_norm_kernel[(self.R,)](
            self.x, self.norm, self.normed, self.config.rms_norm_eps, C=C, BLOCK=pow2(C), PDL=self.pdl, num_warps=8,
            **self.early,
        )  # fmt: skip
        self.linear("head", 0, self.normed, self.logits, C, self.V)
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
        x = model.embed(prompts)  # before the copy takes what memory there is
        self.copy = SamplingCopy(model)
        self.cache = GroupCache(model, lengths, G, round_up(max(1, limit - 1), OWN_BUCKET))
        banned = sorted({*model.config.vision_token_ids, *sampling.banned_ids})
        self.banned = torch.tensor(banned, device=prompts.input_ids.device)
        self.step = Step.fitting(model, len(lengths), G, self.cache, mode)
        self.step.begin(model, self.copy, self.cache, prompts, sampling, self.banned, generator)
        logits = self.copy.prefill(model, prompts, x, self.cache)
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
        self.copy = None
        torch.cuda.empty_cache()  # its block goes back whole: what the update keeps for good must not lie in it

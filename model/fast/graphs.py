"""A stack of blocks as CUDA graphs: one launch forward and one back, where plain PyTorch makes thousands.

A batch of a thousand tokens keeps an H100 busy for 60 ms of the 250 that the host needs to launch it. So a batch whose
sizes were seen before runs through graphs made of the very same blocks: it is padded to round sizes, copied into the
buffers that the graphs read, and replayed. A first sight of a size, a big batch, and one whose graphs would hold too
much memory run without.

Intermediates of all sizes of a stack share one pool: of a stack only one forward and its backward are ever under way.
"""

import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from model.adapters import LoRALinear
from model.packed import Segments

ROWS = 8192  # tokens or patches from which on a batch keeps the GPU busy by itself
GRANULE = 256  # rows are padded to a multiple of it
MAX_KEPT = 12  # sizes a stack
SHARE = 0.3  # of the device's memory that the activations of one captured pass may take
HEADROOM = 0.15  # of the device's memory that stays free: the first steps do not show all of the later ones' needs


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def pow2(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def split_into(n: int, most: int) -> list[int]:
    """n cut into numbers of at most `most`."""
    return [min(most, n - i) for i in range(0, n, most)]


def padded(segments: Segments, rows: int, is_prefix=False) -> Segments:
    """Segments of T tokens as such of `rows`, their number and sizes rounded up: what a graph is made for.

    Padding attends to itself, in a prefix to nothing, where its keys have segments without queries: so every key gets
    a gradient.
    """
    max_q = pow2(segments.max_q, 64)
    max_k = pow2(max(segments.max_k, max_q), 64)
    padding = split_into(rows - segments.num_tokens, max_q)
    none = [0] * len(padding)
    q, k = (padding + none, none + padding) if is_prefix else (padding, padding)
    q, k = [*segments.q_lengths, *q], [*segments.k_lengths, *k]
    empty = [0] * (pow2(len(q), 8) - len(q))
    prefix = segments.prefix and padded(segments.prefix, rows, is_prefix=True)
    return replace(Segments.build(q + empty, k + empty, segments.is_causal, prefix), max_q=max_q, max_k=max_k)


def with_prefix(segments: list[Segments]) -> list[Segments]:
    """All that a pass reads: prefixes too."""
    return [each for one in segments for each in (one, one.prefix) if each]


@contextmanager
def fresh_leaves(blocks):
    """Inside, the blocks compute with other leaves over the same storage: {trained parameter: the other}.

    A parameter's own node in autograd belongs to the stream on which it was first used, which a capture may not touch.
    """
    owners = [(module, name, p) for module in blocks.modules() for name, p in module._parameters.items()]
    owners = [(module, name, p) for module, name, p in owners if p is not None and p.requires_grad]
    leaves = {p: torch.nn.Parameter(p.detach()) for _, _, p in owners}
    for module, name, p in owners:
        module._parameters[name] = leaves[p]
    try:
        yield leaves
    finally:
        for module, name, p in owners:
            module._parameters[name] = p


class Capture:
    """One stack at one size: its buffers and graphs."""

    def __init__(self, through, x: Tensor, tables, segments, params, grads, rows: int, stores: bool, pool, stream):
        """params: what gets a gradient beside x; grads: buffers that it is put into. Both empty for inference. stores:
        whether the blocks hand on keys and values, which every size holds for itself."""
        self.forwards, self.stored = 0, []  # (layer, keys, values)
        self.x = x.new_zeros(rows, x.shape[1]).requires_grad_(x.requires_grad)
        self.tables = tuple(t.new_zeros(rows, *t.shape[1:]) for t in tables)
        self.segments = [one.to(x.device) for one in segments]
        self.fill(x, tables, segments)
        self.wanted = [self.x] * (x.requires_grad and torch.is_grad_enabled()) + params
        store = {"store": lambda *one: self.stored.append(one)} if stores else {}
        forward = lambda: through(self.x, self.tables, self.segments, **store)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside of a graph: libraries make their workspaces
            out = forward()
            self.grad = torch.zeros_like(out)
            if self.wanted:
                torch.autograd.grad(out, self.wanted, self.grad)
            del out
        torch.cuda.current_stream().wait_stream(stream)
        self.stored.clear()
        torch.cuda.empty_cache()  # what this took belongs to that stream, and the graphs have memory of their own
        how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
        self.graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, **how):
            out = forward()
        if self.wanted:
            with torch.cuda.graph(self.backward_graph, **how):
                made = torch.autograd.grad(out, self.wanted, self.grad)
                torch._foreach_copy_(grads, made[-len(grads) :] if grads else [])
            self.grads = [*made[: len(made) - len(grads)], *grads]
        self.out = out.detach()

    @torch.no_grad()
    def fill(self, x, tables, segments) -> None:
        for mine, new in zip((self.x, *self.tables), (x, *tables)):
            mine[: len(new)].copy_(new)
        self.x[len(x) :].zero_()
        for mine, new in zip(with_prefix(self.segments), with_prefix(segments)):
            mine.cu_q.copy_(new.cu_q, non_blocking=True)
            mine.cu_k.copy_(new.cu_k, non_blocking=True)

    def forward(self, x, tables, segments) -> Tensor:
        self.forwards += 1
        self.fill(x, tables, segments)
        self.graph.replay()
        return self.out[: len(x)].clone()

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Gradients of x, where it has one, and of params. The next replay writes over those of params: autograd copies
        a gradient that someone else holds too, one parameter at a time, before it becomes `.grad`."""
        self.grad[: len(grad)].copy_(grad)
        self.grad[len(grad) :].zero_()
        self.backward_graph.replay()
        mine = list(self.grads)
        if self.x.requires_grad:
            mine[0] = mine[0][: len(grad)].clone()
        return mine


class Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, capture, tables, segments, x, *params):
        out = capture.forward(x, tables, segments)
        ctx.capture, ctx.number = capture, capture.forwards
        return out

    @staticmethod
    def backward(ctx, grad):
        now = ctx.capture.forwards
        assert ctx.number == now, f"backward of pass {ctx.number}, but pass {now} has written over what it kept"
        grads = ctx.capture.backward(grad)
        return None, None, None, *([] if ctx.needs_input_grad[3] else [None]), *grads


class Stack:
    """The CUDA graphs of one stack of blocks. Adapters are put in before it is made."""

    def __init__(self, blocks, stream, log):
        self.blocks, self.stream, self.log, self.pool = blocks, stream, log, torch.cuda.MemPool()
        self.layers = [m for m in blocks.modules() if isinstance(m, LoRALinear)]
        self.parameters = list(blocks.parameters())
        self.kept, self.seen, self.grads = OrderedDict(), {}, []  # seen: bytes that a size keeps for its backward pass

    def run(self, through, x: Tensor, tables, segments: list[Segments], recompute: int, store=None) -> Tensor:
        """through(x, tables, segments, recompute), which sends x (T, C) through the blocks; as graphs where it pays.
        store: of LanguageModel.through, without gradients."""
        rows, grad, plainly = round_up(len(x), GRANULE), torch.is_grad_enabled(), partial(through, recompute=recompute)
        stored = {"store": store} if store else {}  # the tower's has no such thing
        dropout = any(layer.dropout and layer.training for layer in self.layers)
        if rows > ROWS or (recompute and dropout):  # masks would have to be drawn twice alike
            return plainly(x, tables, segments, **stored)
        params = [p for p in self.parameters if p.requires_grad] if grad else []
        wide = [padded(one, rows) for one in segments]
        sizes = [(s.is_causal, s.max_q, s.max_k, len(s.cu_q)) for s in with_prefix(wide)]
        key = (
            rows, *sizes, grad, x.requires_grad, recompute, dropout, store is None,
            *(p.data_ptr() for p in self.parameters), *(layer.enabled for layer in self.layers),
        )  # fmt: skip
        if key not in self.kept and not (key in self.seen and fits(self.seen[key], x.device)):
            before, held = torch.cuda.memory_allocated(x.device), []  # held: bytes of keys and values

            def counted(layer, k, v):
                held.append(k.nbytes + v.nbytes)
                store(layer, k, v)

            out = plainly(x, tables, segments, **({"store": counted} if store else {}))
            if not any(one.dense for one in segments):  # a plan of this batch's lengths, which a graph would freeze
                self.seen[key] = torch.cuda.memory_allocated(x.device) - before + sum(held)
            return out
        if key not in self.kept:
            began = time.perf_counter()
            self.grads = self.grads or [torch.empty_like(p) for p in params]
            with fresh_leaves(self.blocks) as leaves:
                wanted, grads = [leaves[p] for p in params], self.grads if params else []
                how = wanted, grads, rows, store is not None, self.pool.id, self.stream
                self.kept[key] = Capture(plainly, x, tables, wide, *how)
            kind, seconds = type(self.blocks[0]).__name__, time.perf_counter() - began
            self.log(f"CUDA graphs of {len(self.blocks)} {kind}s for {rows} rows: made in {seconds:.1f} s")
            if len(self.kept) > MAX_KEPT:
                del self.seen[self.kept.popitem(last=False)[0]]  # to be made again it has to come twice again
        self.kept.move_to_end(key)
        if self.kept[key].wanted:
            return Replay.apply(self.kept[key], tables, wide, x, *params)
        out = self.kept[key].forward(x, tables, wide)
        for layer, k, v in self.kept[key].stored:
            store(layer, k[: len(x)], v[: len(x)])
        return out


def fits(needed: int, device) -> bool:
    """Whether a size's graphs fit beside the highest peak so far: their memory is theirs alone. needed: bytes that they
    keep for the backward pass; what they take on the way is a third of it."""
    total = torch.cuda.get_device_properties(device).total_memory
    total *= torch.cuda.get_per_process_memory_fraction(device)
    peak = torch.cuda.max_memory_allocated(device)
    return needed < SHARE * total and peak + 1.33 * needed < (1 - HEADROOM) * total


class GraphCache:
    """The CUDA graphs of a model's stacks. log(text): called with one line whenever something was captured. wait: until
    `ready` is set, after the first update, for AdamW's moments must have their memory first."""

    def __init__(self, log=lambda text: None, wait: bool = False):
        self.log, self.stacks, self.stream, self.ready = log, {}, torch.cuda.Stream(), not wait

    def run(self, blocks, through, *args, **store) -> Tensor:
        """Stack.run of these blocks."""
        if not self.ready:
            return through(*args, **store)
        if blocks not in self.stacks:
            self.stacks[blocks] = Stack(blocks, self.stream, self.log)
        return self.stacks[blocks].run(through, *args, **store)

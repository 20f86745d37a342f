"""One packed attention: many sequences laid end to end, each query segment with its own list of keys.

A `Segments` says who attends to whom. Segment s owns a contiguous run of queries and a run of keys; causal segments are
aligned at their ends (the last query sees every key), as in FlashAttention 2.1 and later. Keys normally are the packed
tokens themselves; with `kv_index` they are gathered, so that G completions can attend to one stored prompt:

    packed tokens   p0 p1 p2 | a0 a1 | b0 b1          (one prompt, completions a and b)
    segment 0       queries p0 p1 p2    keys p0 p1 p2
    segment 1       queries a0 a1       keys p0 p1 p2 a0 a1
    segment 2       queries b0 b1       keys p0 p1 p2 b0 b1

`attend` is the one entry. `attend_reference` is its slow twin: a loop over segments, explicit softmax, float32.
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Mean length from which on. No smaller than captured.ROWS: these lengths are the host's, which a graph would freeze.
LONG, LONG_STEP = 8192, 512


@dataclass(eq=False)
class Segments:
    """Who attends to whom in a packed batch. Lengths are plain ints (made in data workers); tensors follow `.to`."""

    q_lengths: list[int]  # S query lengths; their sum is T
    k_lengths: list[int]  # S key lengths
    is_causal: bool
    cu_q: Tensor  # (S+1,) int32, cumulative query lengths
    cu_k: Tensor  # (S+1,) int32, cumulative key lengths
    kv_index: Tensor | None = None  # (sum(k_lengths),) int64: the packed token behind each key; None = keys are queries
    max_q: int = 0  # the longest of each
    max_k: int = 0
    num_tokens: int = 0  # T
    _buckets: list | None = field(default=None, repr=False)  # cache of the dense path

    @classmethod
    def build(cls, q_lengths, k_lengths, is_causal: bool, kv_index: Tensor | None = None) -> "Segments":
        cu_q = torch.tensor([0, *accumulate(q_lengths)], dtype=torch.int32)
        cu_k = torch.tensor([0, *accumulate(k_lengths)], dtype=torch.int32)
        sizes = {"max_q": max(q_lengths, default=0), "max_k": max(k_lengths, default=0), "num_tokens": sum(q_lengths)}
        return cls(list(q_lengths), list(k_lengths), is_causal, cu_q, cu_k, kv_index, **sizes)

    @classmethod
    def causal(cls, lengths: list[int]) -> "Segments":
        """Sequences that never see each other, each causal within itself."""
        return cls.build(lengths, lengths, True)

    @classmethod
    def full(cls, lengths: list[int]) -> "Segments":
        """Blocks with full attention inside: windows and time slices of the vision tower."""
        return cls.build(lengths, lengths, False)

    @classmethod
    def shared_prompt(cls, prompt_lengths: list[int], completion_lengths: list[list[int]]) -> "Segments":
        """Prompt n, then its completions, in packed order; each completion sees its prompt and itself."""
        assert len(prompt_lengths) == len(completion_lengths), (len(prompt_lengths), len(completion_lengths))
        q_lengths, k_lengths, index, start = [], [], [], 0
        for prompt, completions in zip(prompt_lengths, completion_lengths):
            shared = torch.arange(start, start + prompt)
            q_lengths.append(prompt)
            k_lengths.append(prompt)
            index.append(shared)
            start += prompt
            for n in completions:
                q_lengths.append(n)
                k_lengths.append(prompt + n)
                index += [shared, torch.arange(start, start + n)]
                start += n
        return cls.build(q_lengths, k_lengths, True, torch.cat(index))

    def to(self, device) -> "Segments":
        index = None if self.kv_index is None else self.kv_index.to(device, non_blocking=True)
        cu_q, cu_k = self.cu_q.to(device, non_blocking=True), self.cu_k.to(device, non_blocking=True)
        return replace(self, cu_q=cu_q, cu_k=cu_k, kv_index=index, _buckets=None)

    def tails(self, rows: Tensor) -> tuple["Segments", Tensor, Tensor]:
        """Queries only from the first of `rows` (sorted packed tokens) in each segment on, the keys all the same: what
        a last layer has to compute. Returns the segments, the packed tokens that are left as queries, (n,), and where
        among these the rows stand."""
        assert self.is_causal, "the last queries of a segment see all its keys only in causal attention"
        start, end = self.cu_q[:-1].long(), self.cu_q[1:].long()
        owner = torch.arange(len(end), device=rows.device).repeat_interleave(end - start)  # segment of each token
        lengths = torch.zeros_like(end).scatter_reduce(0, owner[rows], end[owner[rows]] - rows, "amax")
        left = (end - lengths)[owner] <= torch.arange(len(owner), device=rows.device)
        tails = Segments.build(lengths.tolist(), self.k_lengths, True, self.kv_index)
        return tails, left.nonzero()[:, 0], (left.cumsum(0) - 1)[rows]

    def buckets(self, device) -> list["Bucket"]:
        """The dense plan: segments of similar length side by side, padded. Made once, used by every layer."""
        if self._buckets is None:
            self._buckets = [Bucket.build(self, members, device) for members in similar_lengths(self)]
        return self._buckets


def similar_lengths(segments: Segments) -> list[list[int]]:
    """Segment numbers in groups of nearly equal size, so that padding at most doubles a group's query-key area."""
    sizes = list(zip(segments.q_lengths, segments.k_lengths))
    groups: list[list[int]] = []
    area = max_q = max_k = 0
    for s in sorted(range(len(sizes)), key=sizes.__getitem__):
        q, k = sizes[s]
        if q == 0:
            continue
        padded = max(max_q, q) * max(max_k, k)
        if groups and padded * (len(groups[-1]) + 1) <= 2 * (area + q * k):
            groups[-1].append(s)
            area, max_q, max_k = area + q * k, max(max_q, q), max(max_k, k)
        else:
            groups.append([s])
            area, max_q, max_k = q * k, q, k
    return groups


@dataclass(eq=False)
class Bucket:
    """A group of segments as one dense attention: (b, H, q, D) against (b, K, k, D)."""

    q_index: Tensor | None  # (b, q) int64 packed query of each slot (padding repeats token 0); None = all of T in order
    k_index: Tensor | None  # (b, k) int64 packed key of each slot, likewise
    mask: Tensor | None  # (b, 1, q, k) bool, True = may attend; None = everything
    valid: Tensor | None  # (b * q,) bool, which slots are real queries; None = all
    shape: tuple[int, int, int]  # b, q, k
    is_causal: bool  # plain square causal mask, told to SDPA by flag instead of by mask

    @classmethod
    def build(cls, segments: Segments, members: list[int], device) -> "Bucket":
        q_start = [0, *accumulate(segments.q_lengths)]
        k_start = [0, *accumulate(segments.k_lengths)]
        q_len = torch.tensor([segments.q_lengths[s] for s in members])
        k_len = torch.tensor([segments.k_lengths[s] for s in members])
        q, k = int(q_len.max()), int(k_len.max())
        uniform = bool((q_len == q).all()) and bool((k_len == k).all())
        q_slot, k_slot = torch.arange(q), torch.arange(k)
        q_valid = q_slot < q_len[:, None]  # (b, q)
        k_valid = k_slot < k_len[:, None]  # (b, k)
        q_index = (torch.tensor([q_start[s] for s in members])[:, None] + q_slot) * q_valid
        k_index = (torch.tensor([k_start[s] for s in members])[:, None] + k_slot) * k_valid
        if segments.kv_index is not None:
            k_index = segments.kv_index.cpu()[k_index]
        square_causal = segments.is_causal and uniform and q == k
        mask = None
        if not uniform or (segments.is_causal and not square_causal):
            mask = k_valid[:, None, :].expand(-1, q, -1)
            if segments.is_causal:  # aligned at the ends: query i of n sees keys up to k_len - n + i
                last = q_slot[None, :] + (k_len - q_len)[:, None]  # (b, q)
                mask = mask & (k_slot <= last[..., None])
            mask = mask[:, None].to(device)  # (b, 1, q, k)
        whole = uniform and members == list(range(len(segments.q_lengths)))  # packed order is already the dense order
        keep = None if uniform else q_valid.flatten().to(device)
        return cls(
            None if whole else q_index.to(device),
            None if whole and segments.kv_index is None else k_index.to(device),
            mask, keep, (len(members), q, k), square_causal,
        )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Packed attention, scaled by D^-0.5.

    q: (T, H, D); k, v: (T, K, D), K divides H (grouped-query attention). Returns (T, H, D) in q's dtype.
    bf16/fp16 on CUDA goes through FlashAttention's variable-length kernel, everything else through dense buckets.
    """
    assert q.shape[0] == segments.num_tokens, f"{q.shape[0]} queries, but segments of {segments.num_tokens}"
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return attend_flash(q, k, v, segments)
    return attend_dense(q, k, v, segments)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attend` by FlashAttention 2 (Dao, 2023; arXiv 2307.08691) as it ships with torch: no padding, no mask."""
    if is_long(q, segments):
        return attend_long(q, k, v, segments)
    if segments.kv_index is not None:
        k, v = k.index_select(0, segments.kv_index), v.index_select(0, segments.kv_index)
    return FlashVarlen.apply(q, k, v, segments)


def is_long(q: Tensor, segments: Segments) -> bool:
    """Whether cuDNN's kernels are worth a call for each segment: on Hopper cards alone they outrun FlashAttention 2."""
    square = segments.is_causal and segments.kv_index is None and segments.q_lengths == segments.k_lengths
    if not square or segments.num_tokens <= LONG * len(segments.q_lengths):
        return False
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    return hopper and not torch.are_deterministic_algorithms_enabled()  # its backward pass adds up in any order


def attend_long(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attend` of few long causal segments by cuDNN, one after the other. Each is padded at its end, which nothing
    before it sees: cuDNN plans its kernels anew for every length."""
    outs = []
    for n, *parts in zip(segments.q_lengths, *(x.split(segments.q_lengths) for x in (q, k, v))):
        padded = (F.pad(x, (0, 0, 0, 0, 0, -n % LONG_STEP)) if n % LONG_STEP else x for x in parts)
        heads = [x.transpose(0, 1)[None] for x in padded]  # (1, H or K, n, D)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outs.append(out[0].transpose(0, 1)[:n])
    return torch.cat(outs) if len(outs) > 1 else outs[0]


class FlashVarlen(torch.autograd.Function):
    """torch's own flash kernels under `torch.nn.attention.varlen`, called below that wrapper because the wrapper of
    torch 2.11 refuses K < H, which the kernels themselves take."""

    @staticmethod
    def forward(ctx, q, k, v, segments):
        sizes = (segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, 0.0, segments.is_causal)
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, False)
        ctx.save_for_backward(q, k, v, out, lse, rng_state, unused)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, rng_state, unused = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, *ctx.sizes, rng_state, unused
        )
        return *grads, None


def attend_dense(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attend` by torch's scaled_dot_product_attention over padded buckets of similar segments."""
    H, D, K = *q.shape[1:], k.shape[1]
    if len(q) == 0:  # no answer in the whole batch: nobody asks
        return q
    if H != K:  # grouped queries: repeat here, because SDPA's own flag keeps the CPU from its fused kernel
        k, v = (x[:, :, None].expand(-1, -1, H // K, -1).reshape(-1, H, D) for x in (k, v))
    buckets = segments.buckets(q.device)

    def take(x: Tensor, rows: Tensor | None) -> Tensor:
        # not x[rows]: on a CPU its gradient adds up a row's many uses in any order, and takes ten times as long
        return x if rows is None else x.index_select(0, rows.flatten())

    pieces, places = [], []
    for bucket in buckets:
        b, n, m = bucket.shape
        qb = take(q, bucket.q_index).view(b, n, H, D).transpose(1, 2)
        kb = take(k, bucket.k_index).view(b, m, H, D).transpose(1, 2)
        vb = take(v, bucket.k_index).view(b, m, H, D).transpose(1, 2)
        out = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=bucket.mask, is_causal=bucket.is_causal)
        out = out.transpose(1, 2).reshape(b * n, H, D)
        if bucket.q_index is None:
            return out
        keep = slice(None) if bucket.valid is None else bucket.valid
        pieces.append(out[keep])
        places.append(bucket.q_index.flatten()[keep])
    return torch.empty_like(q).index_copy(0, torch.cat(places), torch.cat(pieces))


def attend_reference(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The slow twin of `attend`: one segment at a time, explicit softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    if segments.kv_index is not None:
        k, v = k[segments.kv_index], v[segments.kv_index]
    outs = []
    for qs, ks, vs in zip(q.split(segments.q_lengths), k.split(segments.k_lengths), v.split(segments.k_lengths)):
        ks, vs = ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", qs.float(), ks.float()) * q.shape[-1] ** -0.5
        if segments.is_causal:
            n, m = scores.shape[1:]
            scores = scores.masked_fill(torch.ones(n, m, device=q.device).triu(m - n + 1).bool(), float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs.float()).to(q.dtype))
    return torch.cat(outs)

"""A packed batch: sequences laid end to end without padding, and what follows from their lengths and grids alone.

A `Segments` says who attends to whom. Segment s owns a contiguous run of queries and a run of keys; causal segments are
aligned at their ends (the last query sees every key), as in FlashAttention 2.1 and later. Keys normally are the packed
tokens themselves; with `kv_index` they are gathered, so that G completions can attend to one stored prompt:

    packed tokens   p0 p1 p2 | a0 a1 | b0 b1          (one prompt, completions a and b)
    segment 0       queries p0 p1 p2    keys p0 p1 p2
    segment 1       queries a0 a1       keys p0 p1 p2 a0 a1
    segment 2       queries b0 b1       keys p0 p1 p2 b0 b1
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not trained (torch's cross_entropy uses the same number)

# OPENAI_CLIP_MEAN and _STD of transformers/image_utils.py, which Qwen2-VL's preprocessing uses
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(eq=False)
class Packed:
    """One packed batch."""

    input_ids: Tensor  # (T,) int64; a picture's pads are expanded to its M merged tokens
    position_ids: Tensor  # (3, T) int64
    segments: "Segments"  # who attends to whom
    patches: Tensor | None = None  # (P, 1176) uint8 pixels, or floats already normalised
    grid_thw: list[tuple[int, int, int]] = field(default_factory=list)  # in patches, one per image or video, in order
    targets: Tensor | None = None  # (T,) int64, the next token where it is trained, IGNORE elsewhere
    names: list[str] = field(default_factory=list)  # of the samples, for messages

    def to(self, device) -> "Packed":
        """The same batch on another device; copies from pinned memory do not wait."""

        def moved(tensor):
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            segments=self.segments.to(device),
            patches=moved(self.patches),
            targets=moved(self.targets),
        )


def pad_positions(is_pad: Tensor, count: int) -> Tensor:
    """(count,) int64: where the image and video pads of a batch are. is_pad: (T,) bool; count: vision tokens.

    The number of pads is asserted on a CPU. On a GPU that would wait for the device: the batch has to be right.
    """
    if not is_pad.is_cuda:
        assert is_pad.sum() == count, f"{is_pad.sum()} image and video pads, but {count} vision tokens"
    return torch.nonzero_static(is_pad, size=count)[:, 0]


def normalise_patches(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 patch rows -> (x / 255 - mean) / std. patches: (P, 3 * 2 * 14 * 14), channel-major. Same shape, dtype."""
    scale = torch.tensor([1 / (255 * s) for s in STD], device=patches.device)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD)], device=patches.device)
    scale, shift = (x.repeat_interleave(patches.shape[1] // 3) for x in (scale, shift))  # whole rows: no short loops
    return torch.addcmul(shift, patches.float(), scale).to(dtype)


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
    _buckets: list | None = field(default=None, repr=False)  # cache of the dense plan

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
    is_causal: bool  # plain square causal mask, given to SDPA as a flag instead of a mask

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
        valid = None if uniform else q_valid.flatten().to(device)
        return cls(
            None if whole else q_index.to(device),
            None if whole and segments.kv_index is None else k_index.to(device),
            mask, valid, (len(members), q, k), square_causal,
        )  # fmt: skip


@dataclass(eq=False)
class VisionPlan:
    """The vision tower's windows and positions. They follow from the grids alone and are made once a batch."""

    order: Tensor  # (M,) int64: merge cells in window order
    back: Tensor  # (M,) int64: its inverse
    rows: Tensor  # (P,) int64, patch row and column, in window order
    columns: Tensor
    windows: Segments
    steps: Segments  # whole grid steps, in window order: windows never cross one

    @classmethod
    def build(cls, grid_thw: list[tuple[int, int, int]], config, device) -> "VisionPlan":
        """The window rule of get_window_index in transformers' modeling_qwen2_5_vl.py, without its padding."""
        m = config.spatial_merge_size
        side = config.window_size // m // config.patch_size  # merge cells along a window, 4
        orders, rows, columns, windows, steps, first = [], [], [], [], [], 0
        for t, h, w in grid_thw:
            assert h % m == 0 and w % m == 0, f"grid {(t, h, w)} is not a multiple of the merge size {m}"
            cells = np.arange(h // m * (w // m)).reshape(h // m, w // m)
            tiles = [
                cells[i : i + side, j : j + side].ravel()
                for i in range(0, h // m, side) for j in range(0, w // m, side)
            ]  # fmt: skip
            step = np.concatenate(tiles)  # merge cells of one grid step, window by window
            inner_row, inner_col = np.divmod(np.arange(m * m), m)  # the m*m patches of a cell lie side by side
            row, col = np.divmod(step, w // m)
            rows.append(np.tile((row[:, None] * m + inner_row).ravel(), t))
            columns.append(np.tile((col[:, None] * m + inner_col).ravel(), t))
            orders.append((step + np.arange(t)[:, None] * cells.size + first).ravel())
            windows += [len(tile) * m * m for tile in tiles] * t
            steps += [h * w] * t
            first += t * cells.size
        order = torch.from_numpy(np.concatenate(orders))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        rows, columns = (torch.from_numpy(np.concatenate(x)) for x in (rows, columns))
        tensors = (x.to(device, non_blocking=True) for x in (order, back, rows, columns))
        return cls(*tensors, Segments.full(windows).to(device), Segments.full(steps).to(device))

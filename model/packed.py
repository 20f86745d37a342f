"""A packed batch: sequences laid end to end without padding, and what follows from their lengths and grids alone.

A `Segments` says who attends to whom. Segment s owns a contiguous run of queries and a run of keys; causal segments are
aligned at their ends (the last query sees every key), as in FlashAttention 2.1 and later. With a `prefix`, other
segments over the same tokens, queries see the keys that these give them too: so G completions attend to one prompt.

    packed tokens   p0 p1 p2 | a0 a1 | b0 b1          (one prompt, completions a and b)
    segments        p0 p1 p2 see themselves; a0 a1 themselves; b0 b1 themselves; each causally
    their prefix    p0 p1 p2 see nothing more; a0 a1 b0 b1 see p0 p1 p2; the last segment has keys a0 a1 b0 b1, no query
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # target of a token that is not trained (torch's cross_entropy uses the same number)


def moved(batch, device) -> dict:
    """The tensors of a dataclass on another device; copies from pinned memory do not wait."""
    return {n: x.to(device, non_blocking=True) for n, x in vars(batch).items() if isinstance(x, Tensor)}


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
        return replace(self, segments=self.segments.to(device), **moved(self, device))


@dataclass(eq=False)
class Segments:
    """Who attends to whom in a packed batch. Lengths are plain ints (made in data workers); tensors follow `.to`."""

    q_lengths: list[int]  # S query lengths; their sum is T
    k_lengths: list[int]  # S key lengths
    is_causal: bool
    cu_q: Tensor  # (S+1,) int32, cumulative query lengths
    cu_k: Tensor  # (S+1,) int32, cumulative key lengths
    prefix: "Segments | None" = None  # what the same queries see beside, before the keys of their own segment
    max_q: int = 0  # the longest of each
    max_k: int = 0
    num_tokens: int = 0  # T
    before: list[slice] = field(default_factory=list)  # of each segment the prefix's keys that its queries see
    dense: tuple | None = field(default=None, repr=False)  # fast/portable.py's plan, made once, used by every layer
    recurs: bool | None = field(default=None, repr=False)  # whether fast/attention.py has met this shape before

    @classmethod
    def build(cls, q_lengths, k_lengths, is_causal: bool, prefix: "Segments | None" = None) -> "Segments":
        cu_q, cu_k = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (q_lengths, k_lengths))
        sizes = {"max_q": max(q_lengths, default=0), "max_k": max(k_lengths, default=0), "num_tokens": sum(q_lengths)}
        before = [slice(0, 0)] * len(q_lengths)
        if prefix:
            ends, starts = list(accumulate(prefix.q_lengths[:-1])), list(accumulate(prefix.k_lengths, initial=0))
            owners = (bisect_right(ends, first) for first in accumulate(q_lengths[:-1], initial=0))
            before = [slice(*starts[i : i + 2]) for i in owners]
        return cls(list(q_lengths), list(k_lengths), is_causal, cu_q, cu_k, prefix, before=before, **sizes)

    @classmethod
    def causal(cls, lengths: list[int]) -> "Segments":
        """Sequences that never see each other, each causal within itself."""
        return cls.build(lengths, lengths, True)

    @classmethod
    def full(cls, lengths: list[int]) -> "Segments":
        """Full attention inside each: windows and grid steps of the vision tower."""
        return cls.build(lengths, lengths, False)

    @classmethod
    def shared_prompt(cls, prompt_lengths: list[int], completion_lengths: list[list[int]]) -> "Segments":
        """Prompt n, then its completions, in packed order; each completion sees its prompt and itself."""
        lengths, q_lengths, k_lengths = [], [], []
        for prompt, completions in zip(prompt_lengths, completion_lengths, strict=True):
            lengths += [prompt, *completions]
            q_lengths += [prompt, sum(completions), 0]
            k_lengths += [0, prompt, sum(completions)]
        return cls.build(lengths, lengths, True, cls.build(q_lengths, k_lengths, False))

    def to(self, device) -> "Segments":
        return replace(
            self, dense=None, recurs=None, prefix=self.prefix and self.prefix.to(device), **moved(self, device)
        )

    def tails(self, rows: Tensor) -> tuple["Segments", Tensor, Tensor]:
        """Queries only from the first of `rows` (sorted packed tokens) in each segment on, the keys all the same: what
        a last layer has to compute. Returns the segments, the packed tokens that are left as queries, (n,), and where
        among these the rows stand. rows: on the host, as all of it, so that nothing waits for a GPU."""
        assert self.is_causal, "the last queries of a segment see all its keys only in causal attention"
        lengths = torch.tensor(self.q_lengths)
        end = lengths.cumsum(0)
        owner = torch.arange(len(end)).repeat_interleave(lengths)  # segment of each token
        lengths = torch.zeros_like(end).scatter_reduce(0, owner[rows], end[owner[rows]] - rows, "amax")
        left = (end - lengths)[owner] <= torch.arange(len(owner))
        prefix = self.prefix
        if prefix:
            counts = [int(part.sum()) for part in left.split(prefix.q_lengths)]
            prefix = Segments.build(counts, prefix.k_lengths, False)
        tails = Segments.build(lengths.tolist(), self.k_lengths, True, prefix)
        return tails, left.nonzero()[:, 0], (left.cumsum(0) - 1)[rows]


@dataclass(eq=False)
class VisionPlan:
    """The vision tower's windows and positions. They follow from the grids alone."""

    order: Tensor  # (M,) int64: merge cells in window order
    inverse: Tensor  # (M,) int64: of order
    tables: tuple[Tensor, Tensor]  # rotary cos and sin, (P, 1, D/2) each, in window order
    windows: Segments
    steps: Segments  # whole grid steps, in window order: windows never cross one

    @classmethod
    def build(cls, grid_thw: list[tuple[int, int, int]], config, device, dtype=torch.float32) -> "VisionPlan":
        """The window rule of get_window_index in transformers' modeling_qwen2_5_vl.py, without its padding.

        config: VisionConfig. dtype: of the rotary tables."""
        m = config.spatial_merge_size
        side = config.window_size // m // config.patch_size  # merge cells along a window, 4
        orders, positions, windows, steps, first = [], [], [], [], 0
        for t, h, w in grid_thw:
            assert h % m == 0 and w % m == 0, f"grid {(t, h, w)} is not a multiple of the merge size {m}"
            cells = np.arange(h // m * (w // m)).reshape(h // m, w // m)
            corners = [(i, j) for i in range(0, h // m, side) for j in range(0, w // m, side)]
            tiles = [cells[i : i + side, j : j + side].ravel() for i, j in corners]
            step = np.concatenate(tiles)  # merge cells of one grid step, window by window
            inner = np.divmod(np.arange(m * m), m)  # row and column in a cell: its m*m patches lie side by side
            outer = np.divmod(step, w // m)
            positions.append(np.stack([np.tile((o[:, None] * m + i).ravel(), t) for o, i in zip(outer, inner)]))
            orders.append((step + np.arange(t)[:, None] * cells.size + first).ravel())
            windows += [len(tile) * m * m for tile in tiles] * t
            steps += [h * w] * t
            first += t * cells.size
        order = torch.from_numpy(np.concatenate(orders))
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        positions = torch.from_numpy(np.concatenate(positions, axis=1))  # rows and columns, (2, P)
        order, inverse, positions = (x.to(device, non_blocking=True) for x in (order, inverse, positions))
        segments = Segments.full(windows).to(device), Segments.full(steps).to(device)
        return cls(order, inverse, vision_tables(positions, config.hidden_size // config.num_heads, dtype), *segments)


def vision_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the tower's rotary angles: rows and columns (2, P) -> two (P, 1, D/2), row half, column half."""
    quarter = head_dim // 4
    exponent = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
    inv_freq = 1.0 / 10000.0**exponent  # theta of Qwen2_5_VisionRotaryEmbedding, transformers modeling_qwen2_5_vl.py
    angles = torch.cat([x.float()[:, None] * inv_freq for x in positions], dim=-1)  # (P, D/2)
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)

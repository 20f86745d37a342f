"""The vision tower: patches of images and videos -> one token for every 2x2 patches.

Nearly all blocks attend within windows of 112 x 112 pixels of one grid step; a few (7, 15, 23, 31 in the released
models) within the whole grid step. No block looks across grid steps: motion is seen only inside a patch, which spans
two frames, and by the language model. All windows of all clips of a batch go through one attention call.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import cpu
from model.attention import Segments, attend
from model.language import MLP, RMSNorm, draws, recomputed
from model.linear import project, stack
from model.rope import rotate, vision_tables

# OPENAI_CLIP_MEAN and _STD of transformers/image_utils.py, which Qwen2-VL's preprocessing uses
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LONG, PART = 65_536, 16_384  # patches; of so many, the blocks' inputs take 5.4 and 1.3 GB
CPU_PATCHES = 128  # as float32 0.6 MB, which stays in a core's cache


def normalise_patches(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 patch rows -> (x / 255 - mean) / std. patches: (P, 3 * 2 * 14 * 14), channel-major. Same shape, dtype."""
    scale = torch.tensor([1 / (255 * s) for s in STD], device=patches.device)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD)], device=patches.device)
    scale, shift = (x.repeat_interleave(patches.shape[1] // 3) for x in (scale, shift))  # whole rows: no short loops
    return torch.addcmul(shift, patches.float(), scale).to(dtype)


@dataclass(eq=False)
class VisionPlan:
    """Everything that follows from the grids alone, so that it can be made once a batch."""

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


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, 1176) uint8 pixels or normalised floats -> (P, width)"""
        weight = self.proj.weight.flatten(1)
        patches = normalise_patches(patches, weight.dtype) if patches.dtype == torch.uint8 else patches.to(weight.dtype)
        # a convolution whose stride is its kernel is a matrix product; as Conv3d it is far slower on some GPUs
        if cpu.handles(patches):
            return cpu.Merged.apply(patches, [0.0], weight, None, None, None)[0]
        return F.linear(patches, weight)


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H, self.D = config.num_heads, config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, tables, segments: Segments) -> Tensor:
        P = x.shape[0]
        qk, v = project(x, self.qkv)[0].view(P, 3 * self.H, self.D).split([2 * self.H, self.H], dim=1)
        q, k = rotate(qk, tables).chunk(2, dim=1)  # (P, H, D)
        return project(attend(q, k, v, segments).reshape(P, -1), self.proj)[0]


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=1e-6)
        self.norm2 = RMSNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, tables, segments: Segments) -> Tensor:  # x: (P, width)
        x = x + self.attn(self.norm1(x), tables, segments)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches -> one token of the language model's width."""

    def __init__(self, config):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:  # (P, width) -> (M, out_hidden_size)
        inner = self.mlp[1](project(self.ln_q(x).view(-1, self.width), self.mlp[0])[0])
        return project(inner, self.mlp[2])[0]


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grid_thw, recompute: bool = False, captures=None) -> Tensor:
        """patches: (P, 1176) uint8 pixels or normalised floats, in 2x2-block order. Returns (M, out_hidden_size) in
        the same order. grid_thw: [(t, h, w)]. recompute: keep only each block's input for the backward pass."""
        P = patches.shape[0]
        assert P == sum(t * h * w for t, h, w in grid_thw), f"{P} patches, but grids {grid_thw}"
        if recompute and P > LONG:
            return self.in_parts(patches, grid_thw)
        return self.whole(patches, grid_thw, recompute, captures)

    def whole(self, patches: Tensor, grid_thw, recompute: bool, captures=None) -> Tensor:
        config, P = self.config, patches.shape[0]
        plan = VisionPlan.build(grid_thw, config, patches.device)
        cell = config.spatial_merge_size**2
        # on a CPU few at a time: as floats the patches of a batch would go through memory, not the cache
        parts = patches.split(CPU_PATCHES) if patches.device.type == "cpu" else [patches]
        x = stack([self.patch_embed(part) for part in parts])  # (P, width)
        x = x.view(P // cell, -1).index_select(0, plan.order).view(P, -1)  # in window order
        tables = vision_tables(plan.rows, plan.columns, config.hidden_size // config.num_heads, x.dtype)
        segments = [plan.windows, plan.steps]
        if captures:
            x = captures.run(self.blocks, self.through, x, tables, segments, recompute)
        else:
            x = self.through(x, tables, segments, recompute)
        return self.merger(x).index_select(0, plan.back)

    def in_parts(self, patches: Tensor, grid_thw) -> Tensor:
        """forward() of a long video, a few grid steps at a time: exact, for no block looks across them. Of each part
        only the patches are kept; the backward pass makes it again."""
        steps = [(max(1, PART // (h * w)), t, h, w) for t, h, w in grid_thw]  # grid steps of a part
        parts = [(min(n, t - i), h, w) for n, t, h, w in steps for i in range(0, t, n)]
        sizes = [t * h * w for t, h, w in parts]
        again = {"use_reentrant": False, "preserve_rng_state": draws(self)}
        pieces = zip(patches.split(sizes), parts, strict=True)
        return torch.cat([checkpoint(self.whole, piece, [part], True, **again) for piece, part in pieces])

    def through(self, x: Tensor, tables, segments, recompute: bool) -> Tensor:
        """(P, width) through the blocks. segments: [windows, whole grid steps]."""
        for i, block in enumerate(self.blocks):
            own = segments[i in self.config.fullatt_block_indexes]
            x = recomputed(block, x, tables, own) if recompute else block(x, tables, own)
        return x

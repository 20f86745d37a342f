"""Where a token of the language model stands, and how that turns queries and keys. (The tower's: packed.VisionPlan.)

Three position ids a token, (t, h, w). Text counts up in all three at once; a vision token carries its grid step's time,
row and column.

The rule for the language model is that of transformers 4.51.1 (`get_rope_index`), QwenLM's own `rope2d.py` and verl:
time is `floor(k * seconds_per_grid_step * tokens_per_second)`, cut *after* the product, and text goes on at the
maximum over t, h and w plus one. Other transformers releases differ (4.52-4.57 cut too early, 5.3 and later ignore
time when text goes on), so tests hold this rule against written-out tables, not against the installed library.
"""

from itertools import groupby

import numpy as np
import torch
from torch import Tensor


def mrope_position_ids(ids, grid_thw, second_per_grid, config) -> np.ndarray:
    """Position ids of one sequence, (3, L) int64.

    ids: L token ids with every image/video pad already expanded to its merged tokens. grid_thw: (t, h, w) in patches,
    one per image or video, in order. second_per_grid: seconds a grid step lasts, for each of them (an image has one
    step, at 0). config: ModelConfig.
    """
    merge, pads = config.vision.spatial_merge_size, (config.image_token_id, config.video_token_id)
    rate = np.float32(config.vision.tokens_per_second)
    parts, start, items = [np.zeros((3, 0), np.int64)], 0, iter(zip(grid_thw, second_per_grid, strict=True))
    for is_pad, run in groupby(ids, key=pads.__contains__):
        left = len(list(run))
        if not is_pad:
            parts.append(np.broadcast_to(np.arange(start, start + left), (3, left)))
            start += left
            continue
        while left > 0:  # two items may stand next to each other
            (t, h, w), seconds = next(items)
            h, w = h // merge, w // merge
            # in float32, as torch's int64 range times a number is: at a boundary float64 falls on the other side
            times = (np.arange(t, dtype=np.float32) * np.float32(seconds) * rate).astype(np.int64)
            grid = np.stack([
                np.repeat(times, h * w), np.tile(np.repeat(np.arange(h), w), t), np.tile(np.arange(w), t * h)
            ])  # fmt: skip  # (3, t*h*w)
            parts.append(grid + start)
            start, left = start + int(grid.max()) + 1, left - t * h * w
        assert left == 0, f"a grid of {t} x {h} x {w} tokens ends {-left} behind its pads"
    assert next(items, None) is None, f"more grids than pads: {grid_thw}"
    return np.concatenate(parts, axis=1).astype(np.int64)


def mrope_tables(position_ids: Tensor, config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the language model's rotary angles: position_ids (3, T) -> two (T, 1, D/2) in dtype.

    `mrope_section` splits the D/2 frequencies among t, h and w, in this order, without interleaving.
    """
    half = config.head_dim // 2
    exponent = torch.arange(half, device=position_ids.device, dtype=torch.float32) / half
    inv_freq = 1.0 / config.rope_theta**exponent  # (D/2,)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(config.mrope_section)).to(position_ids.device)
    angles = (position_ids.float()[axis].T * inv_freq).contiguous()  # (T, D/2); rows side by side, the kernel needs it
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)

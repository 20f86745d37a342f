"""Qwen2.5-VL's released shapes, the sizes of the work that benchmarks measure, and made-up samples.

S       the smallest real use: a 2x4x4 grid (8 video tokens), 72 prompt tokens, 128 answer tokens
R       a real clip: 16 frames of 252x420, grid 8x18x30 (1,080 video tokens), 82 prompt tokens, 256 answer tokens
longN   N frames of 364x644, which the pixel budget leaves of 360x640; text as in R
tiny    the tiny model's own: 8 frames of 56x56, grid 4x4x4 (16 video tokens), 101 prompt tokens, 80 answer tokens
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from data import Example
from model.loading import ModelConfig
from model.packed import IGNORE
from model.rope import mrope_position_ids

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"

# hidden, MLP, layers, heads, kv heads, rows of the embedding, tied, merger's output; config.json of each hub repository
SIZES = {
    "3b": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7b": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32b": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72b": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}


def config_dict(size: str) -> dict:
    """config.json of Qwen2.5-VL-{size.upper()}-Instruct, as far as the model reads it."""
    C, inner, L, H, K, V, tied, vision_inner = SIZES[size.lower()]
    vision = dict(
        model_type="qwen2_5_vl", depth=32, hidden_size=1280, num_heads=16, intermediate_size=vision_inner,
        out_hidden_size=C, in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2,
    )  # fmt: skip
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_size=C,
        intermediate_size=inner, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K, vocab_size=V,
        rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        hidden_act="silu", max_position_embeddings=128000, tie_word_embeddings=tied, vision_config=vision,
        vision_start_token_id=151652, vision_end_token_id=151653, image_token_id=151655, video_token_id=151656,
        bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip


def model_config(size: str = "3b") -> ModelConfig:
    """A released size, or `tiny`: the shape of assets/tiny."""
    return ModelConfig.from_folder(TINY) if size == "tiny" else ModelConfig.from_dict(config_dict(size))


@dataclass
class Workload:
    """One sample's size."""

    grid: tuple[int, int, int]  # of its clip, in patches
    prompt: int  # text tokens of the prompt, vision start and end included
    completion: int  # tokens to be answered

    @property
    def prompt_tokens(self) -> int:
        return self.prompt + self.grid[0] * self.grid[1] * self.grid[2] // 4


R = Workload((8, 18, 30), 82, 256)
NAMED = {"S": Workload((2, 4, 4), 72, 128), "R": R, "tiny": Workload((4, 4, 4), 101, 80)}


def workload(name: str) -> Workload:
    """S, R, tiny, longN, or FRAMESxHEIGHTxWIDTH in pixels with +PROMPT+ANSWER in tokens behind it if they are not R's,
    such as 32x448x448 or 8x56x56+100+16. ValueError for another name."""
    if name in NAMED:
        return NAMED[name]
    name = re.sub(r"^long(\d+)$", r"\1x364x644", name)
    own = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:\+(\d+)\+(\d+))?", name)
    if not own:
        raise ValueError(f"{name!r}, expected S, R, tiny, long64, 32x448x448 or 32x448x448+80+256")
    frames, height, width = map(int, own.groups()[:3])
    grid = max(1, frames // 2), height // 28 * 2, width // 28 * 2
    return Workload(grid, int(own[4] or R.prompt), int(own[5] or R.completion))


def example(config: ModelConfig, work: Workload, number: int, answer: bool = False) -> Example:
    """Example `number` of random words around one clip, as data.Processor makes them: a prompt, or with an answer that
    is to be learned."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(0, min(150_000, config.vision_start_token_id), (work.prompt,), generator=generator).tolist()
    pads = [config.video_token_id] * (work.prompt_tokens - work.prompt)
    ids = words[:20] + [config.vision_start_token_id] + pads + [config.vision_end_token_id] + words[22:]
    common = 1000 if config.vocab_size > 1000 else 200
    own = torch.randint(0, common, (work.completion if answer else 0,), generator=generator).tolist()
    targets = np.full(len(ids + own), IGNORE)
    targets[len(ids) - 1 : -1] = own
    t, h, w = work.grid
    return Example(
        f"example {number}", ids=np.array(ids + own), targets=targets, num_vision_tokens=len(pads),
        position_ids=mrope_position_ids(ids + own, [work.grid], [1.0], config), grid_thw=[work.grid],
        patches=torch.randint(0, 256, (t * h * w, 1176), generator=generator, dtype=torch.uint8),
        second_per_grid=[1.0], frame_indices=[], frame_times=[], record={},
    )  # fmt: skip

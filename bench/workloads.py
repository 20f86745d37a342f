"""Qwen2.5-VL's released shapes, the sizes of the work that benchmarks measure, made-up samples, and what a step costs
by its shapes alone."""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from data import Example, pack
from model.loading import ModelConfig
from model.packed import IGNORE
from model.quantized import quantized_weights
from model.rope import mrope_position_ids

# hidden, MLP, layers, heads, kv heads, rows of the embedding, tied, merger's output; config.json of each hub repository
SIZES = {
    "3b": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7b": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32b": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72b": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}


def model_config(size: str = "3b") -> ModelConfig:
    """A released size, what its config.json has beside the defaults of such models, or `tiny`: that of assets/tiny."""
    if size == "tiny":
        return ModelConfig.from_folder(ROOT / "assets" / "tiny")
    C, inner, L, H, K, V, tied, vision_inner = SIZES[size]
    vision = dict(hidden_size=1280, intermediate_size=vision_inner, out_hidden_size=C, tokens_per_second=2)
    return ModelConfig.from_dict(dict(
        model_type="qwen2_5_vl", hidden_size=C, intermediate_size=inner, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=K, vocab_size=V, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=tied,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), max_position_embeddings=128000,
        vision_start_token_id=151652, vision_end_token_id=151653, image_token_id=151655, video_token_id=151656,
        vision_config=vision,
    ))  # fmt: skip


class Workload(NamedTuple):
    """One sample's size."""

    name: str
    grid: tuple[int, int, int]  # of its clip, in patches
    text: int  # tokens of the prompt, vision start and end included
    completion: int  # tokens to be answered

    @property
    def prompt(self) -> int:
        return self.text + self.grid[0] * self.grid[1] * self.grid[2] // 4


NAMED = {
    "S": Workload("S", (2, 4, 4), 72, 128),  # the smallest real use: 8 video tokens
    "R": Workload("R", (8, 18, 30), 82, 256),  # a real clip: 16 frames of 252x420, 1,080 video tokens
    "tiny": Workload("tiny", (4, 4, 4), 101, 80),  # the tiny model's own: 8 frames of 56x56, 16 video tokens
}


def workload(name: str) -> Workload:
    """One of NAMED, longN: N frames of 364x644, which the pixel budget leaves of 360x640, or FRAMESxHEIGHTxWIDTH in
    pixels such as 32x448x448, with +PROMPT+ANSWER in tokens if they are not R's. ValueError for another name."""
    if name in NAMED:
        return NAMED[name]
    shape = f"{name[4:]}x364x644" if name.startswith("long") else name
    size, *text = shape.split("+")
    frames, height, width = map(int, size.split("x"))
    text, completion = map(int, text or (82, 256))
    return Workload(name, (max(1, frames // 2), height // 28 * 2, width // 28 * 2), text, completion)


def packed_samples(bench, work: Workload, count: int, answer: bool = False):
    """On the device of `bench`: prompts, or with an answer to be learned."""
    return pack([example(bench.config, work, number, answer) for number in range(count)]).to(bench.device)


def example(config: ModelConfig, work: Workload, number: int, answer: bool = False) -> Example:
    """Random words around one clip, as data.Processor makes them."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(0, min(150_000, config.vision_start_token_id), (work.text,), generator=generator).tolist()
    pads = [config.video_token_id] * (work.prompt - work.text)
    ids = words[:20] + [config.vision_start_token_id] + pads + [config.vision_end_token_id] + words[22:]
    common = 1000 if config.vocab_size > 1000 else 200
    own = torch.randint(0, common, (work.completion if answer else 0,), generator=generator).tolist()
    targets = np.full(len(ids + own), IGNORE)
    targets[len(ids) - 1 : -1] = own
    t, h, w = work.grid
    return Example(
        f"example {number}", ids=np.array(ids + own), targets=targets,
        position_ids=mrope_position_ids(ids + own, [work.grid], [1.0], config), grid_thw=[work.grid],
        patches=torch.randint(0, 256, (t * h * w, 1176), generator=generator, dtype=torch.uint8),
        second_per_grid=[1.0], frame_indices=[], frame_times=[], record={},
    )  # fmt: skip


# -- Floors: a multiplication and its addition are two operations; adapters and everything elementwise are left out.
# With frozen weights a product's backward pass is one more product, the gradient to its input. FlashAttention's is

ATTENTION_BACKWARD = 2.5  # times its forward: five products instead of two (Dao, 2023)


def step_flops(config, grid, prompt: int, completions=(), head: int = 0, train=False, recompute=False) -> float:
    """One clip of this (t, h, w) in patches, its prompt once, completions of these lengths, `head` tokens through the
    head: a forward pass, or with its backward pass, adapters on frozen weights. The head's logits are made again there;
    recompute: the blocks' forward too."""
    v, (t, h, w) = config.vision, grid
    cell = v.spatial_merge_size**2 * v.hidden_size
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    merger = (cell * cell + cell * v.out_hidden_size) / v.spatial_merge_size**2
    # the tower attends within windows, in a few blocks within whole grid steps
    side, whole = v.window_size // v.patch_size, len(v.fullatt_block_indexes)
    area = [n // side * side**2 + (n % side) ** 2 for n in (h, w)]  # patches x patches of the windows along each side
    pairs = t * (whole * (h * w) ** 2 + (v.depth - whole) * area[0] * area[1])  # queries x keys
    products, attention = 2 * t * h * w * (block * v.depth + embed + merger), 4 * pairs * v.hidden_size

    C, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = 2 * C * C + 2 * C * config.num_key_value_heads * config.head_dim + 3 * C * inner
    pairs = prompt * prompt / 2 + sum(own * (prompt + own / 2) for own in completions)  # causal
    products += layers * 2 * (prompt + sum(completions)) * weights
    attention += layers * 4 * pairs * C
    logits = 2 * head * C * config.vocab_size
    if not train:
        return products + attention + logits
    again = products + attention if recompute else 0.0
    return 2 * products + (1 + ATTENTION_BACKWARD) * attention + again + 3 * logits


def decode_bytes(model, prompt: int, own: float, N: int, G: int) -> float:
    """Fewest bytes of a decoding step of N prompts and G rows each: every weight of layers and head once, a prompt's
    keys and values once, those of the row's `own` tokens once."""
    config, size = model.config, model.model.norm.weight.element_size()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    low_bit = sum(w.codes.nbytes + w.scales.nbytes for w in quantized_weights(model).values())
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    head = model.head_weight.numel() if model.head_dtype == "bf16" else 0  # else it is among low_bit
    return low_bit + size * (layers + head + token * N * (prompt + G * own))

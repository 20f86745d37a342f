"""Shapes and workloads that the benchmarks share: Qwen2.5-VL at its released sizes with random weights, packed batches
of made-up clips, the machine's measured ceilings, and medians.

    S   the smallest real use: a 2x4x4 grid (8 video tokens), 72 prompt tokens, 128 answer tokens
    R   a real clip: 16 frames of 252x420, grid 8x18x30 (1,080 video tokens), 82 prompt tokens, 256 completion tokens
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.attention import Segments
from model.loss import IGNORE
from model.qwen2_5_vl import ModelConfig, Packed
from model.rope import mrope_position_ids

# hidden, MLP, layers, heads, kv heads, rows of the embedding, tied, merger's output; config.json of each hub repository
SIZES = {
    "3B": (2048, 11008, 36, 16, 2, 151_936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152_064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152_064, False, 3456),
}


def config_dict(size: str) -> dict:
    """config.json of Qwen2.5-VL-{size}-Instruct, as far as the model reads it."""
    C, inner, L, H, K, V, tied, vision_inner = SIZES[size]
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


def model_config(size: str = "3B") -> ModelConfig:
    return ModelConfig.from_dict(config_dict(size))


@dataclass
class Workload:
    """One sample's size: its clip's grid (patches), text tokens around it, tokens to be answered."""

    grid: tuple[int, int, int]
    prompt: int  # text tokens of the prompt, vision start and end included
    completion: int

    @property
    def video_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] // 4

    @property
    def prompt_tokens(self) -> int:
        return self.prompt + self.video_tokens


S = Workload((2, 4, 4), 72, 128)
R = Workload((8, 18, 30), 82, 256)


def random_prompt(config: ModelConfig, work: Workload, generator: torch.Generator):
    """-> (ids list, positions (3, Lp), patches (P, 1176) uint8)."""
    words = torch.randint(0, min(150_000, config.vision_start_token_id), (work.prompt,), generator=generator).tolist()
    ids = words[:20] + [config.vision_start_token_id] + [config.video_token_id] * work.video_tokens
    ids += [config.vision_end_token_id] + words[22:]
    positions = torch.from_numpy(mrope_position_ids(ids, [work.grid], [1.0], config))
    t, h, w = work.grid
    return ids, positions, torch.randint(0, 256, (t * h * w, 1176), generator=generator, dtype=torch.uint8)


def sft_batch(config: ModelConfig, work: Workload, batch: int, seed: int = 0) -> Packed:
    """`batch` samples packed; targets on the answer only."""
    generator = torch.Generator().manual_seed(seed)
    ids, positions, patches, targets = [], [], [], []
    for _ in range(batch):
        prompt, place, pixels = random_prompt(config, work, generator)
        answer = torch.randint(0, 1000 if config.vocab_size > 1000 else 200, (work.completion,), generator=generator)
        ids.append(torch.cat([torch.tensor(prompt), answer]))
        after = place.max() + 1 + torch.arange(work.completion)
        positions.append(torch.cat([place, after.expand(3, -1)], dim=1))
        target = torch.full_like(ids[-1], IGNORE)
        target[len(prompt) - 1 : -1] = answer
        targets.append(target)
        patches.append(pixels)
    return Packed(
        torch.cat(ids), torch.cat(positions, 1), Segments.causal([len(i) for i in ids]), torch.cat(patches),
        [work.grid] * batch, torch.cat(targets),
    )  # fmt: skip


def prompt_batch(config: ModelConfig, work: Workload, prompts: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    made = [random_prompt(config, work, generator) for _ in range(prompts)]
    return Packed(
        torch.tensor([i for m in made for i in m[0]]), torch.cat([m[1] for m in made], 1),
        Segments.causal([len(m[0]) for m in made]), torch.cat([m[2] for m in made]), [work.grid] * prompts,
    )  # fmt: skip


def sync(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(function, device, repeats: int = 5, warmup: int = 2) -> tuple[float, float, float]:
    """(median, min, max) seconds of function(), the device waited for."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        sync(device)
        start = time.perf_counter()
        function()
        sync(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def ceilings(device) -> tuple[float, float]:
    """This machine's measured matrix rate (FLOP/s) and copy rate (bytes/s, read + write)."""
    cuda = torch.device(device).type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matrix = 2 * n**3 / timed(lambda: a @ b, device)[0]
    x = torch.empty((4 << 30) if cuda else (64 << 20), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return matrix, 2 * x.numel() / timed(lambda: y.copy_(x), device)[0]


def linear_flops(config: ModelConfig, work: Workload, head_tokens: int, recompute: bool) -> float:
    """Arithmetic floor of one sample's SFT step: products with frozen weights (forward, gradient to the input, and
    forward again under recomputation), attention's products; adapters and everything elementwise left out."""
    C, inner, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = config.num_key_value_heads * config.head_dim
    T = work.prompt_tokens + work.completion
    layer = 2 * C * C + 2 * C * kv + 3 * C * inner
    v = config.vision
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    P, cell = 4 * work.video_tokens, v.spatial_merge_size**2 * v.hidden_size
    merger = (cell * cell + cell * v.out_hidden_size) * P // 4
    attention = L * 2 * T * T * C / 2  # causal: half the square; two products
    passes = 3 if recompute else 2
    forward = 2 * (T * layer * L + P * block * v.depth + merger) + 2 * attention
    return passes * forward + 3 * 2 * head_tokens * C * config.vocab_size

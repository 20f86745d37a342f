"""What several test files share: tiny random checkpoints in four shapes, transformers as oracle, drawn clips."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are many small products; threads only fight
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "GPU_TESTS" not in os.environ:  # whole runs are compared with numbers of a CPU
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

import lora
from model import UserError, loading
from model.loading import ModelConfig, save_model
from model.qwen import Packed, Qwen2_5_VL, Segments
from model.rope import mrope_position_ids


def cases(name):
    """The lines of a file in tests/cases."""
    text = Path(__file__).with_name("cases").joinpath(f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def refused(function, *args, **options):
    """The one line that a user's mistake is answered with."""
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    message = str(caught.value)
    del caught  # its traceback holds this frame, and a run with its lock
    assert "\n" not in message
    return message


def write(path, content):
    """A file and its folder: bytes, text, or anything else as JSON. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def python(*words, cwd=ROOT, **env):
    """python WORDS, to its end."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


# hidden, layers, heads, kv heads, tied, vision width/depth/heads, window, full-attention blocks, mrope_section
SHAPES = {
    "tied": dict(C=64, L=2, H=2, K=1, tied=True, VC=48, VD=2, VH=2, window=112, full=(1,), section=(4, 6, 6)),
    "untied": dict(C=96, L=3, H=3, K=3, tied=False, VC=64, VD=3, VH=4, window=56, full=(1,), section=(4, 6, 6)),
    "grouped": dict(C=128, L=2, H=4, K=2, tied=False, VC=32, VD=4, VH=2, window=112, full=(1, 3), section=(4, 6, 6)),
    "small_window": dict(C=64, L=2, H=4, K=2, tied=True, VC=40, VD=3, VH=1, window=28, full=(2,), section=(2, 3, 3)),
}
IDS = dict(vision_start_token_id=250, vision_end_token_id=251, image_token_id=253, video_token_id=254)


def config_dict(shape: str) -> dict:
    """A flat config.json, as hub files are, of one of SHAPES."""
    s = SHAPES[shape]
    vision = dict(
        model_type="qwen2_5_vl", hidden_size=s["VC"], out_hidden_size=s["C"], intermediate_size=2 * s["VC"] + 12,
        depth=s["VD"], num_heads=s["VH"], in_chans=3, patch_size=14, temporal_patch_size=2, spatial_merge_size=2,
        tokens_per_second=2, window_size=s["window"], fullatt_block_indexes=list(s["full"]),
        initializer_range=0.2,
    )  # fmt: skip
    return dict(
        architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", hidden_size=s["C"],
        intermediate_size=2 * s["C"] + 20, num_hidden_layers=s["L"], num_attention_heads=s["H"],
        num_key_value_heads=s["K"], vocab_size=260, rms_norm_eps=1e-6, rope_theta=1e6, hidden_act="silu",
        max_position_embeddings=4096, initializer_range=0.2, tie_word_embeddings=s["tied"], vision_config=vision,
        rope_scaling=dict(type="mrope", mrope_section=list(s["section"])), bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **IDS,
    )  # fmt: skip


def random_model(shape: str = "tied", seed: int = 0) -> Qwen2_5_VL:
    """A random model; norms and biases are random too, so that a forgotten one shows."""
    model = loading.random_model(ModelConfig.from_dict(config_dict(shape)), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def move_adapters(model, size=0.1, seed=2):
    """As after training: every adapter and every other trained tensor moves."""
    generator = torch.Generator().manual_seed(seed)
    moved = [tensor for name, tensor in lora.trainable_parameters(model) if not name.endswith(lora.FLAT)]
    for tensor in moved + [view for _, layer in lora.lora_layers(model) for view in (layer.lora_A, layer.lora_B)]:
        tensor.add_(size * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """shape -> (our model, the same weights in transformers), made once a shape."""
    made = {}

    def make(shape: str):
        if shape not in made:
            from transformers import Qwen2_5_VLForConditionalGeneration

            folder = tmp_path_factory.mktemp(shape)
            ours = random_model(shape)
            save_model(ours, folder)
            theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            made[shape] = (ours, theirs.eval(), folder)
        return made[shape]

    return make


class Sequence:
    """One random sequence: text, images and videos; for our model and for transformers."""

    def __init__(self, config: ModelConfig, parts: list, seed: int = 0):
        """parts: an int (that many text tokens), ("image", h, w), or ("video", t, h, w, second_per_grid)."""
        rng = np.random.default_rng(seed)
        self.ids, self.grids, self.seconds, rows, self.is_video = [], [], [], 0, []
        for part in parts:
            if isinstance(part, int):
                self.ids += rng.integers(3, 240, part).tolist()
                continue
            t, h, w = (1, *part[1:]) if part[0] == "image" else part[1:4]
            pad = config.image_token_id if part[0] == "image" else config.video_token_id
            self.ids += [config.vision_start_token_id] + [pad] * (t * h * w // 4) + [config.vision_end_token_id]
            self.grids.append((t, h, w))
            self.seconds.append(part[4] if part[0] == "video" else 0.0)
            self.is_video.append(part[0] == "video")
            rows += t * h * w
        self.patches = torch.from_numpy(rng.standard_normal((rows, 1176), dtype=np.float32)) if rows else None
        self.positions = mrope_position_ids(self.ids, self.grids, self.seconds, config)
        self.config = config

    def for_transformers(self, positions: bool = True) -> dict:
        """Keyword arguments of one unbatched transformers forward. positions: hand over ours, for where its own are
        known to be wrong."""
        ids = torch.tensor([self.ids])
        types = (ids == self.config.image_token_id).int() + 2 * (ids == self.config.video_token_id).int()
        out = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types)
        if positions:
            out["position_ids"] = torch.from_numpy(self.positions)[:, None]
        sizes = [t * h * w for t, h, w in self.grids]
        chunks = self.patches.split(sizes) if sizes else []
        clips = list(zip(self.is_video, chunks, self.grids))
        names = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")
        for video, (name, grid) in enumerate(names):
            if video in self.is_video:
                out[name] = torch.cat([patches for kind, patches, _ in clips if kind == video])
                out[grid] = torch.tensor([thw for kind, _, thw in clips if kind == video])
        if any(self.is_video):
            out["second_per_grid_ts"] = torch.tensor([s for s, v in zip(self.seconds, self.is_video) if v])
        return out


def pack_sequences(sequences: list[Sequence]) -> Packed:
    patches = [s.patches for s in sequences if s.patches is not None]
    return Packed(
        input_ids=torch.tensor([i for s in sequences for i in s.ids]),
        position_ids=torch.from_numpy(np.concatenate([s.positions for s in sequences], axis=1)),
        segments=Segments.causal([len(s.ids) for s in sequences]),
        patches=torch.cat(patches) if patches else None,
        grid_thw=[g for s in sequences for g in s.grids],
    )

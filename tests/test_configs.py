"""Every file in configs/ is read by its script, has no option without effect, and fits the cards that it names."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from workloads import model_config

import lora
import memory
from config import GRPO, SFT, ignored_options, parse
from model.qwen import Qwen2_5_VL

CONFIGS = {path: path.read_text() for path in sorted((ROOT / "configs").glob("*.py"))}
CARDS = [(path, int(size)) for path, text in CONFIGS.items() for size in sorted(set(re.findall(r"(\d+) GB: ", text)))]


def classes(path):
    """The dataclasses of the scripts that the docstring's first sentence names."""
    scripts = {"train_sft.py": SFT, "train_grpo.py": GRPO}
    return [cls for name, cls in scripts.items() if name in CONFIGS[path].split(" for ")[0]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_script_reads_it(path):
    assert classes(path), "the docstring begins with the script that the file is for"
    for cls in classes(path):
        cfg = parse(cls, ["--config", str(path)])
        assert cfg.given and not [line for line in ignored_options(cfg) if "no effect" in line]


@pytest.mark.parametrize("path, gigabytes", CARDS, ids=lambda value: getattr(value, "stem", value))
def test_it_fits_the_cards_it_names(path, gigabytes):
    """Clips of 16 frames, 82 prompt tokens, answers of 256, by the formula of --dry_run on the released shape."""
    (cls,), text, size = classes(path), CONFIGS[path], path.stem.split("_")[0].upper()
    alternatives = re.findall(rf"(?m)^(\w+) = .*#.*\b{gigabytes} GB: ([\w.]+)", text)  # `# 16 GB: 2` behind a value
    cfg = parse(cls, ["--config", str(path), *(f"--{name}={value}" for name, value in alternatives)])
    assert cfg.model_id == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    if cls is GRPO:
        cfg.lora_rank = 64  # of the adapter that it continues
    with torch.device("meta"):
        model = Qwen2_5_VL(model_config(size.lower()))
        lora.inject(model, cfg)
    patches = 16 // 2 * cfg.video_max_pixels // 14**2
    tokens = patches // 4 + (82 if cls is GRPO else 82 + 256)
    world = int(match[1]) if (match := re.search(r"--num_gpus (\d)", text.split(" for ")[0])) else 1
    peak = max(memory.estimate(model, cfg, [(tokens, patches)], world).values()) / memory.GIB
    assert peak < 0.95 * gigabytes, f"{peak:.1f} GiB"
    assert cfg.pack_tokens == cfg.gradient_checkpointing == "auto"  # the peak is the least; auto takes what is free
    stated = re.search(rf"\b{gigabytes} GB: ([\d.]+)", text.split('"""')[1])
    assert 0.7 * peak < float(stated[1]) < 1.05 * peak, f"the docstring says {stated[1]} GiB, the formula {peak:.1f}"

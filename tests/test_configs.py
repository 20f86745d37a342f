"""Every file in configs/ is read by its script, says nothing that has no effect, and its arithmetic is right."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from workloads import model_config

import lora
from cli import read_config
from config import GRPO, SFT, ignored_options, parse
from model.qwen import Qwen2_5_VL

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
SCRIPTS = {"train_sft.py": SFT, "train_grpo.py": GRPO}
QWEN = [path for path in CONFIGS if path.name.startswith("qwen_")]


def text_of(path):
    """Its docstring."""
    return path.read_text(encoding="utf-8").split('"""')[1]


def scripts(path):
    """The dataclasses of the scripts that the first sentence names."""
    return [cls for name, cls in SCRIPTS.items() if name in text_of(path).split(" for ")[0]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_script_reads_it(path):
    assert scripts(path), "the docstring begins with the script that the file is for"
    for cls in scripts(path):
        cfg = parse(cls, ["--config", str(path)])
        assert cfg.given == set(read_config(cls, path)) and cfg.given
        assert not [line for line in ignored_options(cfg) if "no effect" in line]


def test_every_size_and_memory_has_one():
    names = {path.stem for path in CONFIGS}
    wanted = "3b_sft_16gb 3b_sft_24gb 3b_sft_80gb 3b_grpo_24gb 3b_grpo_80gb 7b_sft_24gb 7b_sft_80gb 7b_grpo_80gb"
    several = "32b_sft_2x80gb 7b_grpo_4x80gb"
    assert {f"qwen_{name}" for name in f"{wanted} {several}".split()} | {"cpu"} <= names


@pytest.mark.parametrize("path", QWEN, ids=lambda path: path.stem)
def test_its_arithmetic_is_right(path):
    """Parameters and adapters counted on the released shape; the lines add up; it says whether it was measured."""
    text, (cls,) = text_of(path), scripts(path)
    cfg = parse(cls, ["--config", str(path)])
    size = path.stem.split("_")[1].upper()
    assert cfg.model_id == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    with torch.device("meta"):
        model = Qwen2_5_VL(model_config(size))
    told = re.search(r"adapter of\s+rank (\d+)", text)  # GRPO goes on with an adapter that has its own
    modules, rank = dict(model.named_modules()), int(told[1] if told else 64) if cls is GRPO else cfg.lora_rank
    layers = [modules[name] for name in lora.targets(model, cfg)]
    weights = sum(parameter.numel() for parameter in model.parameters())
    adapters = sum(rank * (layer.in_features + layer.out_features) for layer in layers)
    assert f"{weights:,} x 2 B" in text and f"{adapters:,} x " in text
    lines = [(line, float(found[1])) for line in text.splitlines() if (found := re.search(r"  ([\d.]+) GiB$", line))]
    *parts, (_, together) = lines
    assert abs(sum(part for _, part in parts) - together) < 0.15
    of = {line.split()[0]: part for line, part in parts}
    cards = int(found[1]) if (found := re.search(r"_(\d)x\d+gb$", path.stem)) else 1
    assert (f"deepspeed --num_gpus {cards} " in text) == (cards > 1)
    assert abs(of["weights"] - 2 * weights / 2**30) < 0.1
    # 6 B stand on the card whatever happens; 12 are AdamW's: shared by the ranks, or in CPU memory
    ranks = re.search(r"12 B / (\d+) ranks", text)
    each = 6 + (0 if cfg.offload_optimizer else 12 / int(ranks[1]) if ranks else 12)
    told = parts[1][1]  # the figure is not always on the line that begins with the word
    assert not ranks or int(ranks[1]) == cards
    assert abs(told - each * adapters / 2**30) < 0.1
    room = re.search(r"_(?:\dx)?(\d+)gb$", path.stem)[1]
    assert together < 0.95 * int(room)
    assert re.search(r"together, estimated|[Mm]easured", text)
    assert cls is SFT or cfg.pack_tokens >= 1162 + cfg.max_completion_length

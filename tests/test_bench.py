"""bench/step.py and bench/learn.py run on a CPU, and the arithmetic behind a floor is that of the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import workloads

from data import pack
from model.qwen import Qwen2_5_VL

SMALL = ["--shape", "8x56x56+40+8", "--batch", "2", "--prompts", "1", "--group", "2", "--repeats", "1"]


def step(*flags):
    done = subprocess.run([sys.executable, "bench/step.py", *flags, *SMALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_each_kind_of_step():
    lines = step("--peer")
    rows = json.loads(lines[-1])["results"]
    assert [row["who"] for row in rows] == ["ours", "peer"] * 4 + ["ours"] * 4  # GRPO: the whole and three parts
    assert all(0 < row["min"] <= row["seconds"] <= row["max"] and row["floor"] > 0 for row in rows)
    whole, *parts = (row["seconds"] for row in rows[-4:])
    assert whole == pytest.approx(sum(parts))
    assert any(line.startswith("peer: transformers + PEFT") for line in lines)


def test_the_same_seed_twice():
    assert step("sft", "grpo", "--twice")[-1] == "the same seed twice: equal bit for bit"


def test_floor_counts_the_products():
    """Products and the head, against torch's own counter over the plain model; attention is counted apart."""
    torch.manual_seed(0)
    config, work = workloads.model_config("tiny"), workloads.workload("tiny")
    packed = pack([workloads.example(config, work, 0, answer=True)])
    model = Qwen2_5_VL(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(packed) @ model.head_weight.T
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    tokens = work.prompt + work.completion
    expected = workloads.vision_flops(config, work.grid)[0] + workloads.language_flops(config, tokens)[0]
    assert counted == pytest.approx(expected + workloads.head_flops(config, tokens), rel=0.01)

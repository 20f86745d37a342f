"""bench/step.py runs on a CPU; its floors by hand."""

import json
import sys

import pytest
from conftest import ROOT, config_dict, python, random_model

from model.loading import ModelConfig

sys.path.insert(0, str(ROOT / "bench"))

from workloads import decode_bytes, step_flops  # noqa: E402

SMALL = ["--shape", "8x56x56+40+8", "--batch", "2", "--prompts", "1", "--group", "2", "--repeats", "1"]


def test_each_kind_of_step():
    done = python("bench/step.py", "--peer", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = json.loads(lines[-1])["results"]
    assert [row["who"] for row in rows] == ["ours", "peer"] * 4 + ["ours"] * 4  # GRPO: the whole and three parts
    assert all(0 < row["min"] <= row["seconds"] <= row["max"] and row["floor"] > 0 for row in rows)
    whole, *parts = (row["seconds"] for row in rows[-4:])
    assert whole == pytest.approx(sum(parts))
    assert any(line.startswith("peer: transformers + PEFT") for line in lines)


def test_floors_by_hand():
    """conftest's "tied": two layers of width 64, MLP 148, 2 heads, 1 kv head; a tower of two blocks of width 48, MLP
    108, windows of 8 x 8 patches in the first. A clip of 2 x 12 x 8 patches has windows of 8 x 8 and of 4 x 8."""
    config, prompt, own = ModelConfig.from_dict(config_dict("tied")), 100, 10
    patch = 1176 * 48 + 2 * (4 * 48 * 48 + 3 * 48 * 108) + (192 * 192 + 192 * 64) / 4
    clip = 2 * 192 * patch
    clip_attention = 4 * 48 * 2 * (64**2 + 32**2 + 96**2)
    token = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 148)
    text = 2 * (prompt + 2 * own) * token
    text_attention = 2 * 4 * 64 * (prompt**2 / 2 + 2 * (own * prompt + own**2 / 2))
    head = 2 * 20 * 64 * 260
    products, attention = clip + text, clip_attention + text_attention
    flops = lambda **options: step_flops(config, (2, 12, 8), prompt, [own, own], head=20, **options)
    assert flops() == products + attention + head
    assert flops(train=True) == 2 * products + 3.5 * attention + 3 * head
    assert flops(train=True, recompute=True) == 3 * products + 4.5 * attention + 3 * head

    model = random_model("tied")  # fp32
    layers = 2 * (token // 2 + 64 + 2 * 32 + 2 * 64)  # biases of q, k and v; two norms
    keys_and_values = 2 * 2 * 1 * 32 * (3 * prompt + 3 * 5 * own)  # three prompts, five rows each
    assert decode_bytes(model, prompt, own, 3, 5) == 4 * (layers + 260 * 64 + keys_and_values)

"""bench/step.py and bench/real.py run on a CPU; floors by hand."""

import importlib
import json
import sys

import chaos
import numpy as np
import pytest
from conftest import ROOT, TINY, config_dict, python, random_model, write

from clips import draw_clip, render, write_mp4
from config import cli
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


def test_released_weights_on_the_tiny_checkpoint(tmp_path, monkeypatch, capsys):
    """bench/real.py on a checkpoint in the hub's form and two questions of MVBench's layout. Its four scripts are
    forked from this process, which has everything imported."""
    import real  # it imports transformers

    clip = write(tmp_path / "video/clevrer/video_validation/a.mp4", "")
    write_mp4(clip, render(draw_clip(np.random.default_rng(0), "Left to Right", 64, 30)))
    question = {"video": clip.name, "candidates": ["Left", "Right"], "answer": "Right"}
    write(tmp_path / "json/moving_direction.json", [question | {"question": f"Which way, {i}?"} for i in range(2)])
    turns = [{"from": "human", "value": "<video>\nWhere to?\n(A) up\n(B) down"}, {"from": "gpt", "value": "(A) up"}]
    train = write(tmp_path / "train.json", [{"id": i, "video": f"{clip}", "conversations": turns} for i in range(8)])

    def run(script, *flags):
        def main():
            sys.stdout, sys.argv = sys.__stdout__, [script, *map(str, flags)]
            cli(importlib.import_module(script.removesuffix(".py")).main)

        log = tmp_path / f"log{len(list(tmp_path.glob('log*')))}"
        code, text = chaos.end_of(chaos.fork(main, log)), log.read_text()
        assert code == 0, text
        return text.splitlines()[-1]

    words = ["--model_id", TINY, "--benchmark", "mvbench", tmp_path, "--train", train, "--questions", 2, "--steps", 2]
    monkeypatch.setattr(real, "run", run)
    monkeypatch.setattr(sys, "argv", ["real.py", *map(str, words), "--output_dir", f"{tmp_path}/out"])
    real.main()
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"model_id", "logits", "before", "after_sft", "rewards"}
    logits, before, after = result["logits"], result["before"], result["after_sft"]
    assert logits["tokens"] > 100 and 0 <= logits["largest"] < 1e-4 and logits["same_first"] == 1
    tables = [each["benchmark"]["table"]["accuracy"] for each in (before, after)]
    assert all(row["asked"] == 2 and {row["ours"], row["official"]} <= {0, 0.5, 1} for row in tables)
    assert (before["adapter"], after["adapter"]) == (None, f"{tmp_path}/out/sft/checkpoint-2")
    steps = [json.loads(line) for line in (tmp_path / "out/grpo/metrics.jsonl").read_text().splitlines()]
    rewards = [step["reward"] for step in steps if "reward" in step]
    assert len(rewards) == 2 and result["rewards"] == [pytest.approx(sum(rewards) / 2)] * 2

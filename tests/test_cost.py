"""Floating-point operations counted from shapes, against those that torch counts while the model runs."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

from workloads import E, R, Workload, model_config, sft_batch

from model.attention import attend_reference
from model.cost import head_flops, language_flops, vision_flops
from model.qwen2_5_vl import Qwen2_5_VL


@pytest.mark.parametrize("work", [E, R, Workload((2, 4, 4), 900, 300)])
def test_against_torch(work, monkeypatch):
    monkeypatch.setattr("model.cpu.handles", lambda x: False)  # torch does not count what its own functions do,
    for module in ("model.language", "model.vision"):  # nor its fused attention on a CPU
        monkeypatch.setattr(f"{module}.attend", attend_reference)
    config = model_config("tiny")
    model = Qwen2_5_VL.random(config).eval()
    packed = sft_batch(config, work, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.logits(packed)
    tokens = work.prompt_tokens + work.completion
    ours = vision_flops(config, work.grid) + language_flops(config, tokens) + head_flops(config, tokens)
    masked = config.num_hidden_layers * 4 * config.hidden_size * tokens**2 / 2  # that half is computed there, too
    assert ours + masked == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_parts_add_up():
    config = model_config("3B")
    whole = language_flops(config, 0, [1000])
    assert language_flops(config, 1000) == pytest.approx(whole)
    assert language_flops(config, 600, [400]) == pytest.approx(whole)  # cut in two, it is as much
    assert language_flops(config, 600, [400, 400]) < 2 * whole
    assert vision_flops(config, (8, 18, 30)) == pytest.approx(2 * vision_flops(config, (4, 18, 30)))

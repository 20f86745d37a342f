"""The examples of CONTRIBUTING.md work as they stand there."""

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import workloads

from model.qwen import Qwen2_5_VL
from rewards import Sample, load_rewards

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {name: text for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", TEXT, re.S)}


def test_it_is_one_page():
    assert len(TEXT.splitlines()) <= 50 and list(BLOCKS) == ["my_rewards.py", "bench/workloads.py"]


def test_the_reward(tmp_path):
    (tmp_path / "my_rewards.py").write_text(BLOCKS["my_rewards.py"])
    _, reward = load_rewards(f"accuracy,{tmp_path / 'my_rewards.py'}:shortness")
    sample = lambda n: Sample(question="", answer="", options={}, n_tokens=n, max_tokens=128, truncated=False)
    assert (reward("a", sample(10)), reward("a", sample(100))) == (1.0, 0.0)


def test_the_model_size(monkeypatch):
    before, after = BLOCKS["bench/workloads.py"].splitlines()
    assert before.strip() in (ROOT / "bench" / "workloads.py").read_text(encoding="utf-8")
    monkeypatch.setitem(workloads.SIZES, "14B", eval("{" + after.removeprefix("+") + "}")["14B"])
    with torch.device("meta"):
        model = Qwen2_5_VL(workloads.model_config("14B"))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("visual"))
    assert count == 14_770_033_664  # Qwen2.5-14B

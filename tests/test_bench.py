"""bench/step.py runs on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


SMALL = ["--shape", "8x56x56+40+8", "--batch", "2", "--prompts", "1", "--group", "2", "--repeats", "1"]


def test_each_kind_of_step():
    command = [sys.executable, "bench/step.py", "--peer", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = json.loads(lines[-1])["results"]
    assert [row["who"] for row in rows] == ["ours", "peer"] * 4 + ["ours"] * 4  # GRPO: the whole and three parts
    assert all(0 < row["min"] <= row["seconds"] <= row["max"] and row["floor"] > 0 for row in rows)
    whole, *parts = (row["seconds"] for row in rows[-4:])
    assert whole == pytest.approx(sum(parts))
    assert any(line.startswith("peer: transformers + PEFT") for line in lines)

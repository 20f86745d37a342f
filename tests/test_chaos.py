"""A small part of tests/chaos.py: a kill of each kind, 20 broken files and datasets; it sees a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).with_name("chaos.py")


def test_killed_runs_and_broken_files():
    command = [sys.executable, TOOL, "--kills", "1", "--files", "20", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == 8 and all(int(tried) == int(held) > 0 for _, tried, held in rows), done.stdout


@pytest.fixture(scope="module")
def chaos():
    sys.path.insert(0, str(TOOL.parent))
    import chaos

    return chaos


def test_a_crash_and_a_hang_are_seen(chaos, tmp_path):
    def raises():
        raise KeyError("no such thing")

    assert chaos.end_of(chaos.fork(raises, tmp_path / "log")) == 1
    assert chaos.end_of(chaos.fork(lambda: os.kill(os.getpid(), 9), tmp_path / "log")) == -9
    assert chaos.end_of(chaos.fork(lambda: chaos.time.sleep(60), tmp_path / "log"), seconds=0.2) is None


def test_a_difference_is_seen(chaos, tmp_path):
    for name, loss in (("one", 1.0), ("same", 1.0), ("other", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss}, "eval_seconds": {hash(name)}}}\n')
    assert chaos.differences(tmp_path / "one", tmp_path / "same") == []
    assert chaos.differences(tmp_path / "one", tmp_path / "other") == ["metrics.jsonl"]
    (tmp_path / "same" / "more").write_text("")
    assert chaos.differences(tmp_path / "one", tmp_path / "same") == ["only in one: more"]

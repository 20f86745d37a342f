"""A small part of tests/chaos.py: kills, 20 broken files and datasets; it sees a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).with_name("chaos.py")


@pytest.fixture(scope="module")
def chaos():
    sys.path.insert(0, str(TOOL.parent))
    import chaos

    return chaos


SOME = """
import sys, tempfile
from itertools import islice
from pathlib import Path
sys.path.insert(0, "tests")
import chaos
with tempfile.TemporaryDirectory() as folder:
    lab = chaos.Lab(Path(folder), 1)
    for script in chaos.SCRIPTS:
        print(script, list(islice(chaos.before_each_change(lab, script), 1)))
    for kind in ("files", "datasets"):
        print(kind, sum(fault == "" for fault in islice(chaos.mutated(lab, kind), 20)))
"""


def test_kills_before_changes_of_files_and_broken_files():
    """What does not depend on how fast this machine is; random moments are left to `make chaos`."""
    command = [sys.executable, "-c", SOME]
    done = subprocess.run(command, cwd=TOOL.parents[1], capture_output=True, text=True, timeout=900)
    results = "train_sft ['']", "train_grpo ['']", "files 20", "datasets 20"
    assert done.returncode == 0 and all(line in done.stdout for line in results), done.stdout + done.stderr


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

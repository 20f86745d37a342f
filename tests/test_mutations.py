"""A fast part of tests/mutations.py: 60 files and 60 datasets; and that it would see a crash and a hang."""

import json
import subprocess
import sys
import time
from pathlib import Path

import mutations
import pytest

TOOL = Path(__file__).with_name("mutations.py")


def test_mutated_files_and_datasets():
    found = subprocess.run(
        [sys.executable, TOOL, "--cases", "60", "--seed", "1"], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout + found.stderr
    facts = json.loads(found.stdout.splitlines()[-1])
    for kind in ("file", "dataset"):
        counts = facts[kind]["counts"]
        assert sum(counts.values()) == 60 and counts["skipped"] > 5 and counts["taken"] > 2, counts
        assert facts[kind]["most_mib"] < 1024


def test_the_same_case_is_the_same_file(tmp_path):
    originals = mutations.write_originals(tmp_path)
    for case in range(20):
        assert mutations.mutated_file(3, case, originals) == mutations.mutated_file(3, case, originals)
        assert mutations.mutated_dataset(3, case) == mutations.mutated_dataset(3, case)
    assert len({mutations.mutated_file(3, case, originals)[1] for case in range(50)}) > 45


def crash(pipe, folder):
    pipe.recv()
    sys.exit(139)


def hang(pipe, folder):
    pipe.recv()
    time.sleep(60)


@pytest.mark.parametrize("work, outcome, seconds", [(crash, "died", 100), (hang, "hung", 1)])
def test_a_crash_and_a_hang_are_seen(monkeypatch, tmp_path, work, outcome, seconds):
    monkeypatch.setattr(mutations, "work", work)
    worker = mutations.Worker(tmp_path)
    worker.warm = True
    assert worker.ask("file", tmp_path / "a", seconds)[0] == outcome
    assert worker.process is None

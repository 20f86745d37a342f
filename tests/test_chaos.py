"""A small part of tests/chaos.py, what does not depend on how fast the machine is: kills, broken files and datasets."""

from conftest import ROOT, python

SOME = """
import sys, tempfile
from itertools import islice
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import chaos
with tempfile.TemporaryDirectory() as folder:
    chaos.prepare(Path(folder), 1)
    for script in chaos.SCRIPTS:
        print(script, list(chaos.before_changes(script, 40)))
    for kind in ("files", "datasets"):
        print(kind, sum(fault == "" for fault in islice(chaos.mutated(kind), 20)))
"""


def test_kills_before_changes_of_files_and_broken_files():
    done = python("-c", SOME, ROOT / "tests")
    results = "train_sft ['', '', '']", "train_grpo ['', '', '']", "files 20", "datasets 20"
    assert done.returncode == 0 and all(line in done.stdout for line in results), done.stdout + done.stderr

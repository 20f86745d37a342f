"""Compares the runs that dev/compare.sh made: metrics.jsonl, rollouts.jsonl and the last weights, value by value.

python dev/compare.py FOLDER RUN...     FOLDER/old/RUN against FOLDER/new/RUN; exit code 1 where a value differs
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file

RENAMED: dict[str, str] = {}  # key of the old metrics.jsonl or rollouts.jsonl -> key of the new one
CLOCKS = ("seconds", "wait", "tokens_per_second", "tokens_per_s", "idle", "traffic", "memory", "time", "eta")


def is_clock(key):
    return any(word in key for word in CLOCKS)


def flat(value, prefix=""):
    """{path: leaf} of nested objects and lists, clocks left out."""
    if isinstance(value, dict):
        items = ((f"{prefix}/{RENAMED.get(k, k)}", v) for k, v in value.items() if not is_clock(k))
    elif isinstance(value, list):
        items = ((f"{prefix}/{i}", v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    return {path: leaf for name, v in items for path, leaf in flat(v, name).items()}


def lines(path):
    return [flat(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


class Difference:
    """Largest relative difference of each key, and keys that only one side has."""

    def __init__(self):
        self.largest, self.only = {}, {}

    def add(self, old, new):
        for key in old.keys() ^ new.keys():
            self.only[key.split("/", 2)[1]] = "old" if key in old else "new"
        for key in old.keys() & new.keys():
            a, b = old[key], new[key]
            if a == b:
                continue
            numbers = isinstance(a, (int, float)) and isinstance(b, (int, float))
            gap = abs(a - b) / max(abs(a), abs(b)) if numbers else float("inf")
            name = key.split("/", 2)[1]
            self.largest[name] = max(gap, self.largest.get(name, 0.0))

    def show(self, what):
        for name, side in sorted(self.only.items()):
            print(f"  {what}: {name} only in {side}")
        for name, gap in sorted(self.largest.items()):
            print(f"  {what}: {name} differs by up to {gap:.2g}")
        if not self.largest:
            print(f"  {what}: equal")
        return bool(self.largest)


def compare_lines(name, old, new):
    difference = Difference()
    rows = lines(old / name), lines(new / name)
    if len(rows[0]) != len(rows[1]):
        print(f"  {name}: {len(rows[0])} and {len(rows[1])} lines")
    for a, b in zip(*rows):
        difference.add(a, b)
    return difference.show(name) if rows[0] else False


def compare_weights(old, new):
    def tensors(run):
        last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
        files = [f for f in last.glob("*.safetensors") if not f.name.startswith("optimizer")]
        return {name: t for file in files for name, t in load_file(file).items()}

    a, b = tensors(old), tensors(new)
    if a.keys() != b.keys():
        print(f"  weights: {len(a.keys() ^ b.keys())} names differ")
        return True
    largest = max(float(abs(a[name].astype("f8") - b[name].astype("f8")).max()) for name in a)
    print(f"  weights: {'equal' if largest == 0 else f'differ by up to {largest:.2g}'} ({len(a)} tensors)")
    return largest > 0


def main():
    folder, differs = Path(sys.argv[1]), False
    for run in sys.argv[2:]:
        print(run)
        old, new = folder / "old" / run, folder / "new" / run
        differs |= compare_lines("metrics.jsonl", old, new)
        differs |= compare_lines("rollouts.jsonl", old, new)
        differs |= compare_weights(old, new)
    raise SystemExit(differs)


if __name__ == "__main__":
    main()

"""How long a dataset of a million records takes to open, and what it keeps in memory.

    python bench/index.py                          # 100,000 and 1,000,000 records, as json and as jsonl
    python bench/index.py --records 5000000

A process of its own opens each file, makes the loader of training and takes its first global batch of record numbers.
The file is in the page cache. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

QUESTION = "<video>\nIn which direction is the ball moving?\nOptions:\n(A) Left to Right\n(B) Right to Left"
ANSWER = "<think>Over time x grows, y stays the same: to the right.</think><answer>(A) Left to Right</answer>"


def write(path, count):
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    lines = path.suffix == ".jsonl"
    with path.open("w") as file:
        file.write("" if lines else "[\n")
        for i in range(count):
            end = "\n" if lines or i == count - 1 else ",\n"
            file.write(json.dumps({"id": i, "video": f"videos/{i:07d}.mp4", "conversations": turns}) + end)
        file.write("" if lines else "]\n")


def resident():
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(path):
    from config import SFT
    from data import Loader, read_records

    before, began = resident(), time.perf_counter()
    records = read_records(path)
    opened = time.perf_counter() - began
    loader = Loader(records, None, SFT())
    first = [records[i]["id"] for i in loader.batch(0)]
    seconds = time.perf_counter() - began
    assert first == loader.batch(0), "records are not where they should be"
    print(json.dumps({"open_s": opened, "first_batch_s": seconds, "mib": resident() - before, "records": len(records)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    rows = []
    print(f"{'records':>10}  {'file':<6}  {'MiB':>6}  {'open, s':>8}  {'first batch, s':>14}  {'memory, MiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.records:
            for suffix in (".json", ".jsonl"):
                path = Path(folder) / f"a{suffix}"
                write(path, count)
                told = subprocess.run([sys.executable, __file__, "--measure", path], check=True, capture_output=True)
                row = json.loads(told.stdout) | {"file": suffix[1:], "file_mib": path.stat().st_size / 2**20}
                told = f"{row['open_s']:>8.2f}  {row['first_batch_s']:>14.2f}  {row['mib']:>11.1f}"
                print(f"{count:>10,}  {row['file']:<6}  {row['file_mib']:>6.0f}  {told}", flush=True)
                rows.append(row)
    print(json.dumps({"bench": "index", "results": rows}))


if __name__ == "__main__":
    main()

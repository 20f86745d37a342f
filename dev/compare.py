"""Whether two commits train alike: python dev/compare.py OLD NEW

Both are cloned, the same fixed runs are made by each on this machine (a CPU, fp32), and metrics.jsonl, rollouts.jsonl
and the last weights are compared value by value, clocks excepted; exit code 1 where one differs. Stored results would
be worthless: bits differ between processors. --runs chooses.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
CLOCK = re.compile("seconds|^ms$|^wait$|^gib$|tokens_per_second")
COMMON = "--dataloader_num_workers 1 --eval_samples 8 --eval_controls 0 --max_new_tokens 48 --save_steps 1000"
COT = "--cot --cot_source trajectory --cot_coordinates 0"
SFT = "train_sft.py --per_device_train_batch_size 8"
GRPO = "train_grpo.py --max_completion_length 48 --learning_rate 1e-3 --max_steps 10 --per_device_train_batch_size"
RUNS = {  # name: (dataset, ranks, script and flags, the old commit's run that it continues)
    "sft": ("plain", 1, f"{SFT} --max_steps 40", ""),
    "sft_cot": ("cot", 1, f"{SFT} --max_steps 40", ""),
    "sft_2ranks": ("plain", 2, f"{SFT} --max_steps 20", ""),
    "full": ("plain", 1, f"{SFT} --max_steps 5 --lora_enable False --freeze_llm False --learning_rate 1e-4", ""),
    "grpo": ("plain", 1, f"{GRPO} 32", "sft"),
    "grpo_cot": ("cot", 1, f"{GRPO} 32", "sft_cot"),
    "grpo_2ranks": ("plain", 2, f"{GRPO} 16", "sft"),
    "sft_span": ("span", 1, f"{SFT} --max_steps 120 --learning_rate 1e-3", ""),
    "grpo_span": ("span", 1, f"{GRPO} 32 --rewards accuracy", "sft_span"),
    "grpo_cot_int8": ("cot", 1, f"{GRPO} 32 --base_dtype int8", "sft_cot"),
}


def python(words: str, where: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, *words.split()], cwd=where, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{where}: python {words}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


def train(folder: Path, side: str, name: str) -> None:
    data, ranks, command, start = RUNS[name]
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}" if ranks > 1 else ""
    flags = f"{COMMON} --data_path {folder}/{data}/train.json --output_dir {folder}/runs/{side}/{name}"
    flags += f" --model_ckpt {folder}/runs/old/{start}" if start else ""
    python(f"{launcher} {command} {flags}", folder / side)


def leaves(value, path: str):
    """(path, leaf) of nested objects and lists, clocks and the places in lists left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not CLOCK.search(key):
                yield from leaves(inner, f"{path} {key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path)
    else:
        yield path, value


def contents(run: Path) -> dict[str, list]:
    """{what: its values in order}"""
    result = defaultdict(list)
    for file in (run / "metrics.jsonl", run / "rollouts.jsonl"):
        for line in file.read_text().splitlines() if file.exists() else ():
            for path, leaf in leaves(json.loads(line), file.name):
                result[path].append(leaf)
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    for file in last.glob("*model*.safetensors"):
        result |= {f"weight {name}": tensor.flatten().tolist() for name, tensor in load_file(file).items()}
    return result


def difference(a: list, b: list) -> str:
    if len(a) != len(b):
        return f"{len(a)} and {len(b)} values"
    pairs = [(x, y) for x, y in zip(a, b) if x != y]
    if any(isinstance(value, str | type(None)) for pair in pairs for value in pair):
        return f"{len(pairs)} of {len(a)} values differ"
    return f"differs by up to {max(abs(x - y) / max(abs(x), abs(y)) for x, y in pairs):.2g}, relatively"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=RUNS, help="those that continue sft need it too")
    args = parser.parse_args()
    folder, code = Path(tempfile.mkdtemp()), 0
    print(f"all is kept in {folder}")
    for side, commit in zip(("old", "new"), args.commits):
        commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", commit], text=True).strip()
        subprocess.run(["git", "clone", "-q", ROOT, folder / side], check=True)
        subprocess.run(["git", "-C", folder / side, "checkout", "-q", "--detach", commit], check=True)
    for data, flags in {"plain": "", "cot": COT, "span": "--task time_span"}.items():
        python(f"generate.py --output_dir {folder}/{data} --num_samples 80 --split 0.8 {flags}", folder / "old")
    for name in args.runs:
        for side in ("old", "new"):
            train(folder, side, name)
        old, new = (contents(folder / "runs" / side / name) for side in ("old", "new"))
        different = [key for key in sorted(old.keys() | new.keys()) if old[key] != new[key]]
        print(f"{name}: {len(old)} kinds of values, {len(different)} differ", flush=True)
        for key in different:
            print(f"  {key}: {difference(old[key], new[key])}")
        code |= bool(different)
    return code


if __name__ == "__main__":
    sys.exit(main())

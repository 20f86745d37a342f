"""Whether two commits train alike: python dev/compare.py OLD NEW

Both are cloned, the same fixed runs are made by each on this machine (a CPU, fp32), and metrics.jsonl, rollouts.jsonl
and the last weights are compared value by value, clocks excepted; exit code 1 where one differs. Stored results would
be worthless: bits differ between processors. --folder keeps all, --runs chooses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
RENAMED: dict[str, str] = {}  # key of the old metrics.jsonl or rollouts.jsonl -> key of the new one
CLOCKS = ("seconds", "wait", "tokens_per_s", "idle", "traffic", "memory", "time", "eta")
COMMON = "--overwrite --dataloader_num_workers 1 --eval_samples 8 --eval_controls 0 --save_steps 1000 --eval_steps 1000"
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
}


def python(words: str, where: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, *words.split()], cwd=where, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{where}: python {words}\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


def train(folder: Path, side: str, name: str) -> None:
    data, ranks, command, start = RUNS[name]
    out, launcher = folder / "runs" / side / name, f"-m torch.distributed.run --standalone --nproc_per_node {ranks} "
    if side == "old" and (out / "report.html").exists():
        return
    flags = f"{COMMON} --max_new_tokens 48 --data_path {folder}/data_{data}/train.json --output_dir {out}"
    flags += f" --model_ckpt {folder}/runs/old/{start}" if start else ""
    python(f"{launcher if ranks > 1 else ''}{command} {flags}", folder / side)


def leaves(value, path: str):
    """(path, leaf) of nested objects and lists, clocks and the places in lists left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not any(clock in key for clock in CLOCKS):
                yield from leaves(inner, f"{path} {RENAMED.get(key, key)}")
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


def gap(a, b) -> float:
    """Relative, of numbers."""
    if a == b:
        return 0.0
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return abs(a - b) / max(abs(a), abs(b)) if numbers else float("inf")


def differences(old: dict[str, list], new: dict[str, list]):
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, []), new.get(key, [])
        if len(a) != len(b):
            yield f"{key}: {len(a)} and {len(b)} values"
        elif a != b:
            yield f"{key}: differs by up to {max(map(gap, a, b)):.2g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar=("OLD", "NEW"))
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--runs", nargs="+", default=[*RUNS], choices=RUNS)
    args = parser.parse_args()
    folder = (args.folder or Path(tempfile.mkdtemp())).resolve()
    for side, commit in zip(("old", "new"), args.commits):
        commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", commit], text=True).strip()
        if not (folder / side).exists():
            subprocess.run(["git", "clone", "-q", ROOT, folder / side], check=True)
        subprocess.run(["git", "-C", folder / side, "fetch", "-q"], check=True)
        subprocess.run(["git", "-C", folder / side, "checkout", "-q", "--detach", commit], check=True)
    for kind, flags in {"plain": "", "cot": COT}.items():
        if not (folder / f"data_{kind}/val.json").exists():
            out = folder / f"data_{kind}"
            python(f"generate.py --output_dir {out} --num_samples 80 --split 0.8 {flags}", folder / "old")
    found = False
    for name in args.runs:
        for side in ("old", "new"):
            train(folder, side, name)
        lines = list(differences(*(contents(folder / "runs" / side / name) for side in ("old", "new"))))
        print(f"{name}: {'equal' if not lines else ''}", *lines, sep="\n  ", flush=True)
        found |= bool(lines)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

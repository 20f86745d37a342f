"""The same seed twice: is it the same run? SFT and GRPO on the embedded model, in fresh processes.

    python bench/same_seed.py                          on a CPU: bit for bit
    python bench/same_seed.py --bf16 True              on a GPU: what differs and by how much, then with --deterministic
    python bench/same_seed.py --model_id FOLDER …      another model; further flags go to both trainers

Prints a row a setting and one JSON object: the largest difference of a weight and of a loss, how many completions are
the same tokens. Exit code 1 where bit for bit is promised (on a CPU, and with --deterministic) and not found.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_file

OUT = ROOT / "output" / "same_seed"
COMMON = ["--eval_data_path", "none", "--save_total_limit", "1", "--logging_steps", "100", "--overwrite"]
STEPS = {
    "train_sft.py": [*COMMON, "--max_steps", "20"],
    "train_grpo.py": [*COMMON, "--max_steps", "8", "--model_ckpt", "none", "--per_device_train_batch_size", "64",
                      "--max_completion_length", "32", "--log_completions", "0"],
}  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(script: str, name: str, flags: list[str]) -> tuple[Path, float]:
    """(the run's folder, seconds)"""
    folder, began = OUT / name, time.perf_counter()
    command = [sys.executable, script, *STEPS[script], "--data_path", str(OUT / "data/train.json"), *flags]
    with (OUT / f"{name}.log").open("w") as log:
        code = subprocess.run([*command, "--output_dir", str(folder)], cwd=ROOT, stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"{script} {' '.join(flags)} ended with {code}:\n{(OUT / f'{name}.log').read_text()[-3000:]}")
    return folder, time.perf_counter() - began


def weights(folder: Path) -> dict:
    (last,) = folder.glob("checkpoint-*")
    return {n: t for file in last.glob("optimizer-*.safetensors") for n, t in load_file(file).items()}


def compare(one: Path, two: Path) -> dict:
    """Largest differences between two runs."""
    mine, theirs = weights(one), weights(two)
    kinds = {kind: [n for n in mine if n.startswith(f"{kind}/")] for kind in ("weight", "exp_avg", "exp_avg_sq")}
    found = {kind: max(float((mine[n] - theirs[n]).abs().max()) for n in names) for kind, names in kinds.items()}
    losses = ([row["loss"] for row in lines(f / "metrics.jsonl") if row.get("loss") is not None] for f in (one, two))
    found["loss"] = max(abs(a - b) for a, b in zip(*losses))
    ids = [[row["ids"] for row in lines(f / "rollouts.jsonl")] for f in (one, two)]
    same = sum(a == b for a, b in zip(*ids))
    return found | {"completions": len(ids[0]), "completions_equal": same}


def main() -> int:
    flags, cuda = sys.argv[1:], torch.cuda.is_available()
    OUT.mkdir(parents=True, exist_ok=True)
    made = ["--num_samples", "300", "--split", "0.9", "--overwrite", "--output_dir", str(OUT / "data")]
    subprocess.run([sys.executable, "generate.py", *made], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{where}, torch {torch.__version__}; largest difference between two runs of one seed; flags {flags}")
    print("script         deterministic   weight    exp_avg   loss      completions   seconds")
    rows, code = [], 0
    for script in STEPS:
        for deterministic in (False, True) if cuda else (False,):
            given = [*flags, "--deterministic", str(deterministic)]
            (one, _), (two, seconds) = (run(script, f"{Path(script).stem}_{k}", given) for k in "ab")
            row = {"script": script, "deterministic": deterministic, **compare(one, two), "seconds": seconds}
            equal = not any(row[k] for k in ("weight", "exp_avg", "exp_avg_sq", "loss"))
            equal = equal and row["completions"] == row["completions_equal"]
            code |= not equal and (deterministic or not cuda)
            told = f"{row['completions_equal']} of {row['completions']}"
            numbers = "  ".join(f"{row[k]:8.1e}" for k in ("weight", "exp_avg", "loss"))
            print(f"{script:<14} {deterministic!s:<15} {numbers}  {told:<12}  {seconds:.1f}", flush=True)
            rows.append(row)
    print(json.dumps({"device": where, "torch": torch.__version__, "rows": rows}))
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The whole way on the embedded model, by the same commands that a user types: clips -> SFT -> GRPO -> an answer.

`make quickstart` runs it. The last line it prints is one JSON object with the accuracies, the report and the seconds.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

DATA, OUT = Path("data/quickstart"), Path("output/quickstart")
CLIPS = ["--num_samples", "1400", "--split", "0.7143"]  # 1,000 to train on, 400 held out: +-1.4 % at 98 %
COT = ["--cot", "--cot_source", "trajectory", "--cot_coordinates", "0"]  # what changes and what stays: some 30 tokens
SAMPLED = ["--controls", "none", "--temperature", "1", "--max_new_tokens", "64"]
SHORT = ["--max_completion_length", "64", "--max_new_tokens", "64"]  # twice what an answer takes
HALF = 0.5  # GRPO starts from the first SFT checkpoint that is right so often when it samples


def run(stage: str, *command: str) -> str:
    """Run one command of this repository, showing what it prints. Returns its last line; ends with it if it fails."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    began, last = time.perf_counter(), ""
    process = subprocess.Popen([sys.executable, "-u", *command], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line.strip() or last
    except KeyboardInterrupt:
        process.wait()
        raise
    if process.wait():
        raise SystemExit(process.returncode)
    seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - began, 1)
    return last


def accuracy(stage: str, *flags: str) -> float:
    return json.loads(run(stage, "infer.py", "--data_path", str(DATA / "val.json"), "--json", *flags))["accuracy"]


def half_right(folder: Path) -> tuple[Path, float]:
    """The first checkpoint that is right half of the time, greedy by the run's own metrics and then sampled here."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if (row.get("eval_accuracy") or 0) >= HALF:
            checkpoint = folder / f"checkpoint-{row['step']}"
            found = accuracy("grpo_start_eval", "--model_ckpt", str(checkpoint), *SAMPLED)
            if found >= HALF:
                return checkpoint, found
    raise SystemExit(f"no checkpoint of {folder} is right half of the time: SFT failed")


def last(folder: Path) -> str:
    """The checkpoint at a run's end: not its best, which was chosen by clips that are also in the final evaluation."""
    return str(max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))))


seconds: dict[str, float] = {}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    train = ["--data_path", str(DATA / "train.json"), "--overwrite"]
    sft, grpo = OUT / "sft", OUT / "grpo"

    run("generate", "generate.py", "--output_dir", str(DATA), "--overwrite", *COT, *CLIPS)
    print(f"look at them: {DATA / 'videos'}")
    base = accuracy("base_eval", "--model_ckpt", "none", "--controls", "none", "--max_new_tokens", "64")
    often = [
        "--save_steps",
        "10",
        "--save_total_limit",
        "none",
        "--eval_steps",
        "10",
        "--eval_samples",
        "200",
        "--max_new_tokens",
        "64",
    ]
    run("sft", "train_sft.py", *train, "--output_dir", str(sft), *often)
    after_sft = accuracy("sft_eval", "--model_ckpt", last(sft))
    start, before = half_right(sft)
    run("grpo", "train_grpo.py", *train, "--model_ckpt", str(start), "--output_dir", str(grpo), *SHORT)
    after_grpo = accuracy("grpo_eval", "--model_ckpt", last(grpo), *SAMPLED)
    report = OUT / "report.html"
    run("report", "report.py", str(sft), str(grpo), "--output", str(report))
    clip = str(DATA / "videos" / json.loads((DATA / "val.json").read_text())[0]["video"])
    for when, adapter in (("before GRPO", str(start)), ("after GRPO", last(grpo))):
        print(f"\nOne clip, {when}:")
        run("answer", "infer.py", clip, "--model_ckpt", adapter, "--max_new_tokens", "64")

    result = {
        "base_accuracy": base, "sft_accuracy": after_sft, "grpo_start_accuracy": before, "grpo_accuracy": after_grpo,
        "report": str(report), "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) > 1:  # --help, say: it takes nothing, and begins by removing output/quickstart
        print(__doc__)
        raise SystemExit(0)
    try:
        main()
    except KeyboardInterrupt:  # the command that was running has told so
        raise SystemExit(130) from None

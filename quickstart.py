"""The whole way on the tiny model, by the commands that a user types: clips -> SFT -> GRPO -> an answer.

`make quickstart` runs it. It ends with a table and a clip that GRPO got right; its last line is one JSON object.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from checkpoint import checkpoints
from config import cli

DATA, OUT = Path("data/quickstart"), Path("output/quickstart")
# 1,000 clips to train on, 400 held out: +-1.4 % at 98 %; what changes and what stays: chains of some 30 tokens
CLIPS = "--num_samples 1400 --split 0.7143 --cot --cot_source trajectory --cot_coordinates 0"
# Every checkpoint is kept, for GRPO starts from an early one; 64 tokens are twice what an answer takes
SFT = "--save_steps 10 --save_total_limit none --eval_steps 10 --eval_samples 200 --max_new_tokens 64"
GRPO = "--max_completion_length 64 --max_new_tokens 64"
SAMPLED = "--controls none --temperature 1 --max_new_tokens 64"
STAGES = {"generate": "", "base": "greedy", "sft": "greedy", "grpo_start": "sampled", "grpo": "sampled"}  # decoding
HALF = 0.5  # GRPO starts from the first SFT checkpoint that is right so often when it samples

result, seconds = {}, {}  # of the last line: accuracies, and how long each stage took


def run(stage: str, command: str) -> None:
    print(f"\n$ python {command}", flush=True)
    began, pipe = time.perf_counter(), {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-u", *command.split()], **pipe) as script:
        for line in script.stdout:
            if not line.lstrip().startswith("next"):  # what comes next is decided here
                print(line, end="", flush=True)
    if script.returncode:
        raise SystemExit(script.returncode)
    seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - began, 1)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracy(stage: str, checkpoint, flags: str = "") -> float:
    """Its share of right answers, which OUT/{stage}.jsonl has."""
    answers = OUT / f"{stage}.jsonl"
    answers.unlink(missing_ok=True)
    run(f"{stage}_eval", f"infer.py --data_path {DATA}/val.json --model_ckpt {checkpoint} --output {answers} {flags}")
    rows = read(answers)
    result[f"{stage}_accuracy"] = sum(row["right"] for row in rows) / len(rows)
    return result[f"{stage}_accuracy"]


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Eight commands or a few more, some 7 minutes on two idle CPU cores. All is written to {DATA} and {OUT}.")
    train = f"--data_path {DATA}/train.json --overwrite"
    run("generate", f"generate.py --output_dir {DATA} --overwrite {CLIPS}")
    accuracy("base", "none", "--controls none --max_new_tokens 64")
    run("sft", f"train_sft.py {train} --output_dir {OUT}/sft {SFT}")
    # the last checkpoint: the best one was chosen by clips that are also in the final evaluation
    accuracy("sft", checkpoints(OUT / "sft")[-1])
    early = [row["step"] for row in read(OUT / "sft/metrics.jsonl") if (row.get("eval_accuracy") or 0) >= HALF]
    starts = (f"{OUT}/sft/checkpoint-{step}" for step in early)
    start = next((start for start in starts if accuracy("grpo_start", start, SAMPLED) >= HALF), None)
    if start is None:
        raise SystemExit("no checkpoint is right half of the time: SFT failed")
    run("grpo", f"train_grpo.py {train} --model_ckpt {start} --output_dir {OUT}/grpo {GRPO}")
    accuracy("grpo", checkpoints(OUT / "grpo")[-1], SAMPLED)
    run("report", f"report.py {OUT}/sft {OUT}/grpo --output {OUT}/report.html")
    seconds["total"] = round(sum(seconds.values()), 1)
    show_stages()
    print(json.dumps(result | {"report": f"{OUT}/report.html", "seconds": seconds}))


def show_stages() -> None:
    """Their table; and a clip that GRPO's start got wrong and GRPO gets right."""
    print(f"\n{'stage':<12}{'accuracy':>10}{'decoding':>10}{'seconds':>9}")
    for stage, decoding in STAGES.items():
        share = f"{result[f'{stage}_accuracy']:.1%}" if decoding else ""
        print(f"{stage:<12}{share:>10}{decoding:>10}{seconds.get(stage, 0) + seconds.get(f'{stage}_eval', 0):>9.0f}")
    print(f"\nThe report, curves and clips, for a browser: {OUT}/report.html")
    for wrong, right in zip(read(OUT / "grpo_start.jsonl"), read(OUT / "grpo.jsonl")):
        if right["right"] > wrong["right"]:
            clip = DATA / "videos" / json.loads((DATA / "val.json").read_text())[right["number"]]["video"]
            print(f"\nGRPO got this one right: {clip}{right['prompt'].removeprefix('<video>')}")
            print(f"  at its start: {wrong['text']}\n  after GRPO:   {right['text']}")
            print(f"next: python infer.py {clip} --model_ckpt {OUT}/grpo")
            break


if __name__ == "__main__":
    if len(sys.argv) > 1:  # --help, say: it takes nothing, and begins by removing output/quickstart
        print(__doc__)
    else:
        cli(main)

"""The whole way on the tiny model, by the commands that a user types: clips -> SFT -> GRPO -> an answer.

`make quickstart` runs it. It ends with a table and a clip that GRPO got right; its last line is one JSON object.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from config import cli

DATA, OUT = Path("data/quickstart"), Path("output/quickstart")
# 1,000 clips to train on, 400 held out: +-1.4 % at 98 %; what changes and what stays: chains of some 30 tokens
CLIPS = "--num_samples 1400 --split 0.7143 --cot --cot_source trajectory --cot_coordinates 0"
# Every checkpoint is kept, for GRPO starts from an early one; 64 tokens are twice what an answer takes
SFT = "--save_steps 10 --save_total_limit none --eval_steps 10 --eval_samples 200 --max_new_tokens 64"
GRPO = "--max_completion_length 64 --max_new_tokens 64"
SAMPLED = "--controls none --temperature 1 --max_new_tokens 64"
HALF = 0.5  # GRPO starts from the first SFT checkpoint that is right so often when it samples
STAGES = {  # of the table at the end
    "generate": "1,400 clips, 400 of them held out", "base": "base model: it answers other questions",
    "sft": "after SFT", "grpo_start": "start of GRPO: an early SFT checkpoint, sampled", "grpo": "after GRPO, sampled",
}  # fmt: skip

seconds: dict[str, float] = {}


def run(stage: str, script: str, *args, flags: str = "") -> str:
    """Run a script of this repository, showing what it prints. Returns its last line; ends with it if it fails."""
    command = [script, *map(str, args), *flags.split()]
    print(f"\n$ python {' '.join(command)}", flush=True)
    began, last_line = time.perf_counter(), ""
    with subprocess.Popen([sys.executable, "-u", *command], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not line.startswith(("{", "next:", "  next ")):  # what comes next is done here
                print(line, end="", flush=True)
            last_line = line.strip() or last_line
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - began, 1)
    return last_line


def accuracy(stage: str, checkpoint, *args, flags: str = "") -> float:
    args = ["--data_path", DATA / "val.json", "--json", "--model_ckpt", checkpoint, *args]
    return json.loads(run(stage, "infer.py", *args, flags=flags))["accuracy"]


def predictions(checkpoint) -> Path:
    return OUT / f"answers_{checkpoint.parent.name}_{checkpoint.name}.jsonl"


def half_right(folder: Path) -> tuple[Path, float]:
    """The first checkpoint that is right half of the time, greedy by the run's own metrics and then sampled here."""
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if (row.get("eval_accuracy") or 0) >= HALF:
            checkpoint = folder / f"checkpoint-{row['step']}"
            sampled = accuracy("grpo_start_eval", checkpoint, "--output", predictions(checkpoint), flags=SAMPLED)
            if sampled >= HALF:
                return checkpoint, sampled
    raise SystemExit(f"no checkpoint of {folder} is right half of the time: SFT failed")


def last(folder: Path) -> Path:
    """The checkpoint at a run's end: not its best, which was chosen by clips that are also in the final evaluation."""
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def summary(result: dict, start: Path, end: Path):
    """Lines: the table of the stages, and a clip that the start got wrong and GRPO gets right, with both answers."""
    yield f"\n{'stage':<50}{'accuracy':>10}{'seconds':>9}"
    for stage, what in STAGES.items():
        share = f"{result[f'{stage}_accuracy']:.1%}" if f"{stage}_accuracy" in result else ""
        yield f"{what:<50}{share:>10}{seconds.get(stage, 0) + seconds.get(f'{stage}_eval', 0):>9.0f}"
    before, after = ([*map(json.loads, predictions(each).read_text().splitlines())] for each in (start, end))
    right = {row["number"]: row for row in after if row["right"]}
    wrong = next((row for row in before if not row["right"] and row["number"] in right), None)
    if wrong:
        video = json.loads((DATA / "val.json").read_text())[wrong["number"]]["video"]
        yield f"\nGRPO got this one right: {DATA / 'videos' / video}{wrong['prompt'].removeprefix('<video>')}"
        yield f"  at its start: {wrong['text']}\n  after GRPO:   {right[wrong['number']]['text']}"
    yield f"\nThe report, curves and clips, for a browser: {result['report']}"
    if wrong:
        yield f"next: python infer.py {DATA / 'videos' / video} --model_ckpt {OUT / 'grpo'}"


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Eight commands or a few more, some 7 minutes on two idle CPU cores. All is written to {DATA} and {OUT}.")
    sft, grpo, report = OUT / "sft", OUT / "grpo", OUT / "report.html"
    train = ["--data_path", DATA / "train.json", "--overwrite"]
    run("generate", "generate.py", "--output_dir", DATA, "--overwrite", flags=CLIPS)
    result = {"base_accuracy": accuracy("base_eval", "none", flags="--controls none --max_new_tokens 64")}
    run("sft", "train_sft.py", *train, "--output_dir", sft, flags=SFT)
    result["sft_accuracy"] = accuracy("sft_eval", last(sft))
    start, result["grpo_start_accuracy"] = half_right(sft)
    run("grpo", "train_grpo.py", *train, "--model_ckpt", start, "--output_dir", grpo, flags=GRPO)
    end = last(grpo)
    result["grpo_accuracy"] = accuracy("grpo_eval", end, "--output", predictions(end), flags=SAMPLED)
    run("report", "report.py", sft, grpo, "--output", report)
    result |= {"report": str(report), "seconds": seconds | {"total": round(sum(seconds.values()), 1)}}
    print(*summary(result, start, end), sep="\n")
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) > 1:  # --help, say: it takes nothing, and begins by removing output/quickstart
        print(__doc__)
    else:
        cli(main)

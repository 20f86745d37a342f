"""Does it learn? Seeds of SFT and GRPO on the tiny model by the commands that a user types: one markdown table.

    python bench/learn.py                             the quickstart's data and settings, five seeds
    python bench/learn.py --plain --far               plain answers; and clips outside the training ranges
    python bench/learn.py --grpo "--beta 0"           further flags of train_grpo.py; --sft: of train_sft.py
    python bench/learn.py --name format --grpo "--rewards format --max_steps 40"
    python bench/learn.py --task time_span --seeds 0 1 2      a typed record: when the ball moves; or distance: how far

GRPO starts from the first SFT checkpoint that is right half of the time, chosen on 400 held-out clips; the accuracies
are those on 400 others, with Wilson's 95 % interval; over seeds: the mean with Student's. output/learn/NAME keeps all.
Of a typed record, accuracy is the mean reward: its variance is less than that of a share, so the interval is too wide.
There GRPO starts from the first checkpoint with a mean reward of 0.6 (greedy); the best constant answer has 0.50.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

import numpy as np
from figures import STUDENT, mean

from checkpoint import checkpoints
from clips import OPTIONS, draw_clip, render, write_mp4
from quickstart import GRPO, HALF, SAMPLED, SFT

CLIPS = "--num_samples 1800 --split 0.5556 --overwrite"  # 1,000 to train on, 400 to choose by, 400 to report
COT = "--cot --cot_source trajectory --cot_coordinates 0"
# Answers such as "<answer>0.2 to 0.7</answer>" take 14 tokens; they have no reasoning for the format reward
TYPED_SFT, TYPED_GRPO = "--max_steps 400 --max_new_tokens 24", "--rewards accuracy --max_completion_length 24"
TYPED_START = 0.6
FAR = ("speed", "radius", "ball", "background")


def run(script: str, *flags) -> str:
    """The last line that one of the repository's scripts prints. Its failure ends everything."""
    command = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command[1:])}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def accuracy(adapter: Path, data: Path, flags: str = "") -> dict:
    """{"accuracy", "interval", …} on all clips of a dataset, greedy if no flags say otherwise."""
    common = ["--data_path", data, "--model_ckpt", adapter, "--controls", "none", "--max_new_tokens", 64, "--json"]
    return json.loads(run("infer.py", *common, *flags.split()))


def early(folder: Path, data: Path, typed: bool) -> Path:
    """The checkpoint that GRPO starts from: the first that is right half of the time, greedy by the run's metrics and
    sampled on the clips to choose by; of typed records the first with TYPED_START, greedy."""
    least = TYPED_START if typed else HALF
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if (row.get("eval_accuracy") or 0) >= least:
            checkpoint = folder / f"checkpoint-{row['step']}"
            if typed or accuracy(checkpoint, data, SAMPLED)["accuracy"] >= HALF:
                return checkpoint
    raise SystemExit(f"{folder}: no checkpoint reaches {least}")


def make_data(folder: Path, args, typed: bool) -> None:
    if not (folder / "report.json").exists():
        chains = "" if args.plain or typed else COT
        run("generate.py", "--output_dir", folder, "--task", args.task, *CLIPS.split(), *chains.split())
        held_out = json.loads((folder / "val.json").read_text())
        (folder / "choose.json").write_text(json.dumps(held_out[:400]))
        (folder / "report.json").write_text(json.dumps(held_out[400:]))
    if args.far and not (folder / "background.json").exists():
        far_clips(folder, json.loads((folder / "val.json").read_text()))


def far_clips(folder: Path, records: list[dict]) -> None:
    """100 clips of each kind in FAR, with this one thing outside the training ranges, on records of the same labels."""
    rng = np.random.default_rng(7)
    for kind in FAR:
        rows = []
        for i in range(100):
            label, odd = [*OPTIONS][i % 4], i % 2
            clip = draw_clip(rng, label, 64, 30)
            if kind == "speed":  # trained: 1.5 to 2.8 px a frame
                factor = rng.uniform(3.2, 4.5) / max(map(abs, clip.velocity))
                clip = replace(clip, velocity=tuple(v * factor for v in clip.velocity))
            elif kind == "radius":  # trained: 4 to 20 px
                clip = replace(clip, radius=float(rng.uniform(2, 3) if odd else rng.uniform(22, 26)))
            elif kind == "ball":  # trained: six other colours
                clip = replace(clip, ball_rgb=(255.0, 140.0, 0.0) if odd else (0.0, 220.0, 220.0))
            else:  # trained: bright balls on four dark ones
                light = (200.0, 170.0, 190.0) if odd else (150.0, 190.0, 150.0)
                clip = replace(clip, background_rgb=light, ball_rgb=(20.0, 20.0, 30.0))
            write_mp4(folder / "videos" / f"{kind}{i}.mp4", render(clip))
            alike = next(record for record in records if OPTIONS[label] in record["conversations"][1]["value"])
            rows.append(alike | {"id": f"{kind}{i}", "video": f"{kind}{i}.mp4"})
        (folder / f"{kind}.json").write_text(json.dumps(rows))


def learn(seed: int, data: Path, out: Path, args) -> dict[str, dict]:
    """{run: {column: result of accuracy}} of one seed."""
    sft, grpo = out / f"sft{seed}", out / f"grpo{seed}"
    common = ["--data_path", data / "train.json", "--eval_data_path", data / "choose.json"]
    common += ["--seed", seed, "--overwrite"]
    clock = [time.perf_counter()]
    run("train_sft.py", *common, "--output_dir", sft, *SFT.split(), *shlex.split(args.sft))
    clock.append(time.perf_counter())
    start = early(sft, data / "choose.json", args.task != "direction")
    clock.append(time.perf_counter())
    flags = ["--model_ckpt", start, "--output_dir", grpo, *GRPO.split(), *shlex.split(args.grpo)]
    run("train_grpo.py", *common, *flags)
    clock.append(time.perf_counter())
    rows = {"SFT": checkpoints(sft)[-1], "start of GRPO": start, "GRPO": checkpoints(grpo)[-1]}
    columns = {"greedy": ("report", ""), "sampled": ("report", SAMPLED)}
    columns |= {kind: (kind, "") for kind in FAR if args.far}
    for (name, adapter), began, end in zip(rows.items(), clock, clock[1:]):
        rows[name] = {key: accuracy(adapter, data / f"{file}.json", how) for key, (file, how) in columns.items()}
        rows[name]["seconds"] = end - began
    return rows


def table(results: dict[int, dict]) -> str:
    """results: {seed: what learn returns}."""
    runs = next(iter(results.values()))
    columns = [key for key in runs["SFT"] if key != "seconds"]
    lines = [["run", "seed", *columns, "seconds"], ["---"] * (len(columns) + 3)]
    for name in runs:
        for seed, rows in results.items():
            cells = [rows[name][key] for key in columns]
            shares = [f"{c['accuracy']:.1%} ({c['interval'][0]:.1%} to {c['interval'][1]:.1%})" for c in cells]
            lines.append([name, str(seed), *shares, f"{rows[name]['seconds']:.0f}"])
        if len(results) in STUDENT:
            means = [mean([rows[name][key]["accuracy"] for rows in results.values()]) for key in columns]
            lines.append([name, "mean", *means, ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--name", default="learn", help="folder under output/learn")
    parser.add_argument("--task", default="direction", choices=("direction", "time_span", "distance"))
    parser.add_argument("--plain", action="store_true", help="answers without chains of thought")
    parser.add_argument("--far", action="store_true", help="also clips outside the training ranges")
    parser.add_argument("--sft", default="", help="further flags of train_sft.py, in quotes")
    parser.add_argument("--grpo", default="", help="further flags of train_grpo.py, in quotes")
    args = parser.parse_args()
    typed = args.task != "direction"
    if typed:
        args.sft, args.grpo = f"{TYPED_SFT} {args.sft}", f"{TYPED_GRPO} {args.grpo}"
    kind = f"learn_{args.task}" if typed else "learn_plain" if args.plain else "learn"
    data, out, results = ROOT / "data" / kind, ROOT / "output" / "learn" / args.name, {}
    make_data(data, args, typed)
    for seed in args.seeds:
        results[seed] = learn(seed, data, out, args)
        (out / "table.md").write_text(table(results))
        print(table(results), flush=True)


if __name__ == "__main__":
    main()

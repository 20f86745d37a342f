"""Does it learn? Seeds of SFT and GRPO on the tiny model by the commands that a user types: one markdown table.

    python bench/learn.py                             the quickstart's data and settings, five seeds
    python bench/learn.py --plain --far               plain answers; and clips outside the training ranges
    python bench/learn.py --grpo "--beta 0"           further flags of train_grpo.py; --sft: of train_sft.py
    python bench/learn.py --task time_span --seeds 0 1 2      a typed record: when the ball moves; or distance: how far

GRPO starts from the first SFT checkpoint that is right half of the time, greedy by the run's metrics and sampled on the
400 held-out clips to choose by; accuracies are those on 400 others, with Wilson's 95 % interval; over seeds: the mean
with Student's. output/learn/NAME keeps all. Of a typed record, accuracy is the mean reward, which varies less than a
share does: the interval is too wide. There GRPO starts from a mean reward of 0.6 (greedy); the best constant has 0.50.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

import numpy as np
from figures import STUDENT, mean, table

from checkpoint import checkpoints
from clips import OPTIONS, draw_clip, render, write_mp4
from quickstart import GRPO, HALF, SAMPLED, SFT, read

CLIPS = "--num_samples 1800 --split 0.5556 --overwrite"  # 1,000 to train on, 400 to choose by, 400 to report
COT = "--cot --cot_source trajectory --cot_coordinates 0"
# Answers such as "<answer>0.2 to 0.7</answer>" take 14 tokens; they have no reasoning for the format reward
TYPED_SFT, TYPED_GRPO = "--max_steps 400 --max_new_tokens 24", "--rewards accuracy --max_completion_length 24"
TYPED_START = 0.6
DARK = (20.0, 20.0, 30.0)
FAR = {  # clip, random numbers, whether its number is odd -> what is changed; behind it what is trained
    "speed": lambda clip, rng, odd: {  # 1.5 to 2.8 px a frame
        "velocity": tuple(np.array(clip.velocity) * (rng.uniform(3.2, 4.5) / max(map(abs, clip.velocity))))
    },
    "radius": lambda clip, rng, odd: {"radius": float(rng.uniform(2, 3) if odd else rng.uniform(22, 26))},  # 4 to 20 px
    "ball": lambda clip, rng, odd: {"ball_rgb": (255.0, 140.0, 0.0) if odd else (0.0, 220.0, 220.0)},  # six others
    "background": lambda clip, rng, odd: {  # bright balls on four dark ones
        "background_rgb": (200.0, 170.0, 190.0) if odd else (150.0, 190.0, 150.0), "ball_rgb": DARK
    },
}  # fmt: skip


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


def make_data(folder: Path, args) -> None:
    """Training and held-out clips; with --far 100 clips of each kind in FAR too, on records of the same labels."""
    if not (folder / "report.json").exists():
        chains = "" if args.plain or args.typed else COT
        run("generate.py", "--output_dir", folder, "--task", args.task, *CLIPS.split(), *chains.split())
        held_out = json.loads((folder / "val.json").read_text())
        (folder / "choose.json").write_text(json.dumps(held_out[:400]))
        (folder / "report.json").write_text(json.dumps(held_out[400:]))
    if not args.far or (folder / "background.json").exists():
        return
    records, rng = json.loads((folder / "val.json").read_text()), np.random.default_rng(7)
    for kind, change in FAR.items():
        rows = []
        for i in range(100):
            label = [*OPTIONS][i % 4]
            clip = draw_clip(rng, label, 64, 30)
            write_mp4(folder / "videos" / f"{kind}{i}.mp4", render(replace(clip, **change(clip, rng, i % 2))))
            alike = next(record for record in records if OPTIONS[label] in record["conversations"][1]["value"])
            rows.append(alike | {"id": f"{kind}{i}", "video": f"{kind}{i}.mp4"})
        (folder / f"{kind}.json").write_text(json.dumps(rows))


def learn(seed: int, data: Path, out: Path, args) -> dict[str, dict]:
    """{run: {column: result of accuracy}} of one seed."""
    sft, grpo, choose = out / f"sft{seed}", out / f"grpo{seed}", data / "choose.json"
    common = ["--data_path", data / "train.json", "--eval_data_path", choose, "--seed", seed, "--overwrite"]
    run("train_sft.py", *common, "--output_dir", sft, *SFT.split(), *shlex.split(args.sft))
    least = TYPED_START if args.typed else HALF
    steps = [row["step"] for row in read(sft / "metrics.jsonl") if (row.get("eval_accuracy") or 0) >= least]
    fits = lambda start: args.typed or accuracy(start, choose, SAMPLED)["accuracy"] >= HALF
    start = next(filter(fits, (sft / f"checkpoint-{step}" for step in steps)), None)
    if start is None:
        raise SystemExit(f"{sft}: no checkpoint reaches {least}")
    flags = ["--model_ckpt", start, "--output_dir", grpo, *GRPO.split(), *shlex.split(args.grpo)]
    run("train_grpo.py", *common, *flags)
    adapters = {"SFT": checkpoints(sft)[-1], "start of GRPO": start, "GRPO": checkpoints(grpo)[-1]}
    columns = {"greedy": ("report", ""), "sampled": ("report", SAMPLED)}
    columns |= {kind: (kind, "") for kind in FAR if args.far}
    judge = lambda adapter: {key: accuracy(adapter, data / f"{file}.json", how) for key, (file, how) in columns.items()}
    return {name: judge(adapter) for name, adapter in adapters.items()}


def table_of(results: dict[int, dict]) -> str:
    """results: {seed: what learn returns}."""
    lines, first = [], next(iter(results.values()))
    columns = [*first["SFT"]]
    for name in first:
        for seed, rows in results.items():
            cells = [(rows[name][key]["accuracy"], *rows[name][key]["interval"]) for key in columns]
            lines.append([name, str(seed), *(f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in cells)])
        if len(results) in STUDENT:
            means = [mean([rows[name][key]["accuracy"] for rows in results.values()]) for key in columns]
            lines.append([name, "mean", *means])
    return table(["run", "seed", *columns], lines) + "\n"


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
    args.typed = args.task != "direction"
    if args.typed:
        args.sft, args.grpo = f"{TYPED_SFT} {args.sft}", f"{TYPED_GRPO} {args.grpo}"
    kind = f"learn_{args.task}" if args.typed else "learn_plain" if args.plain else "learn"
    data, out, results = ROOT / "data" / kind, ROOT / "output" / "learn" / args.name, {}
    make_data(data, args)
    for seed in args.seeds:
        results[seed] = learn(seed, data, out, args)
        (out / "table.md").write_text(table_of(results))
        print(table_of(results), flush=True)


if __name__ == "__main__":
    main()

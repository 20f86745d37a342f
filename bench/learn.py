"""Does GRPO learn? Several seeds on the embedded model, from an SFT start that is right 40-70 % of the time when it
samples, by the scripts a user types. Prints a table and one JSON object; draws assets/grpo_seeds.svg.

    python bench/learn.py                        five seeds, about two minutes each on two cores
    python bench/learn.py --seeds 0 1 2 --extras also: the format reward alone, the KL's weight, clips outside the
                                                 training ranges
"""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
from plot import Panel, draw

from clips import DIRECTIONS, draw_clip, render, write_mp4
from config import QUESTION

FAR = ("speed", "radius", "ball", "background")
DATA, OUT = Path("data/learn"), Path("output/learn")


def run(script: str, *flags) -> str:
    """Run one of the repository's scripts; its last line. A failure ends everything with what it printed."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(map(str, flags))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def accuracy(adapter: Path, data: Path, temperature: float = 0.0) -> tuple[float, list[float]]:
    """(accuracy, 95 % interval) on all clips of a dataset."""
    flags = ["--data_path", data, "--model_ckpt", adapter, "--json", "--controls", "none", "--max_new_tokens", 64]
    found = json.loads(run("infer.py", *flags, "--temperature", temperature))
    return found["accuracy"], found["interval"]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def start(seed: int) -> tuple[Path, float]:
    """The first checkpoint of a short SFT run whose sampled accuracy on all held-out clips is between 40 and 70 %."""
    folder = OUT / f"sft{seed}"
    often = ["--save_steps", 2, "--eval_steps", 2, "--eval_samples", 100, "--save_total_limit", "none"]
    run("train_sft.py", "--data_path", DATA / "train.json", "--output_dir", folder, "--overwrite", "--seed", seed,
        "--max_steps", 80, "--max_new_tokens", 32, *often)  # fmt: skip
    for row in metrics(folder):
        if (row.get("eval_accuracy") or 0) >= 0.4:
            checkpoint = folder / f"checkpoint-{row['step']}"
            found, _ = accuracy(checkpoint, DATA / "val.json", 1.0)
            if 0.4 <= found <= 0.7:
                return checkpoint, found
    raise SystemExit(f"{folder}: no checkpoint between 40 and 70 %")


def learn(seed: int) -> dict:
    checkpoint, before = start(seed)
    folder, began = OUT / f"grpo{seed}", time.perf_counter()
    run("train_grpo.py", "--data_path", DATA / "train.json", "--model_ckpt", checkpoint, "--output_dir", folder,
        "--overwrite", "--seed", seed, "--max_completion_length", 32, "--max_new_tokens", 32)  # fmt: skip
    seconds = time.perf_counter() - began
    sampled, greedy = (accuracy(last(folder), DATA / "val.json", t) for t in (1.0, 0.0))
    kl = sorted(row["kl"] for row in metrics(folder) if "kl" in row)
    kl = {"median": kl[len(kl) // 2], "p90": kl[len(kl) * 9 // 10], "largest": kl[-1]}
    return {"seed": seed, "start": before, "sampled": sampled, "greedy": greedy, "kl": kl, "seconds": seconds}


def format_alone() -> dict:
    """From a start that answers without <think> nine times out of ten: GRPO with the format reward and nothing else."""
    plain = json.loads((DATA / "train.json").read_text())
    run("generate.py", "--output_dir", DATA / "cot", "--num_samples", 1400, "--split", 0.7143, "--seed", 42, "--cot",
        "--cot_source", "trajectory", "--cot_coordinates", 0, "--overwrite")  # fmt: skip
    cot = json.loads((DATA / "cot" / "train.json").read_text())
    for records, folder in ((plain, DATA / "videos"), (cot, DATA / "cot" / "videos")):
        for record in records:
            record["video"] = str((folder / record["video"]).resolve())
    mixed = random.Random(0).sample(plain, 900) + random.Random(0).sample(cot, 100)
    (DATA / "mixed.json").write_text(json.dumps(mixed))
    sft, grpo = OUT / "format_sft", OUT / "format_grpo"
    common = ["--data_path", DATA / "mixed.json", "--eval_data_path", "none", "--overwrite"]
    run("train_sft.py", *common, "--output_dir", sft, "--max_steps", 96)
    run("train_grpo.py", *common, "--output_dir", grpo, "--model_ckpt", sft, "--rewards", "format", "--max_steps", 40,
        "--max_completion_length", 64)  # fmt: skip
    rows = [row for row in metrics(grpo) if "reward/format" in row]
    mean = lambda part: sum(row["reward/format"] for row in part) / len(part)
    return {"first_step": rows[0]["reward/format"], "last_five_steps": mean(rows[-5:])}


def far_clips() -> Path:
    """400 clips, 100 of each kind, with one thing outside the training ranges: speed, radius, ball and background."""
    if (DATA / "far" / "val.json").exists():
        return DATA / "far" / "val.json"
    folder, rng, records = DATA / "far" / "videos", np.random.default_rng(7), []
    folder.mkdir(parents=True, exist_ok=True)
    letters = dict(zip(DIRECTIONS, "ABCD"))
    for i in range(400):
        clip = draw_clip(rng, list(DIRECTIONS)[i % 4], 64, 30)
        kind = FAR[i // 100]
        if kind == "speed":  # trained: 1.5 to 2.8 px a frame
            clip = replace(
                clip, velocity=tuple(v / max(map(abs, clip.velocity)) * rng.uniform(3.2, 4.5) for v in clip.velocity)
            )
        elif kind == "radius":  # trained: 4 to 20 px
            clip = replace(clip, radius=float(rng.uniform(2, 3) if i % 2 else rng.uniform(22, 26)))
        elif kind == "ball":  # trained: six colours
            clip = replace(clip, ball_rgb=(255.0, 140.0, 0.0) if i % 2 else (0.0, 220.0, 220.0))  # orange, cyan
        else:  # trained: four dark ones
            clip = replace(
                clip,
                background_rgb=(200.0, 170.0, 190.0) if i % 2 else (150.0, 190.0, 150.0),
                ball_rgb=(20.0, 20.0, 30.0),
            )
        write_mp4(folder / f"{i}.mp4", render(clip))
        turns = [("human", f"<video>\n{QUESTION}"), ("gpt", f"Answer: ({letters[clip.label]}) {clip.label}")]
        records.append({"video": f"{i}.mp4", "conversations": [{"from": who, "value": text} for who, text in turns]})
    for k, kind in enumerate(FAR):
        (DATA / "far" / f"{kind}.json").write_text(json.dumps(records[100 * k : 100 * (k + 1)]))
    (DATA / "far" / "val.json").write_text(json.dumps(records))
    return DATA / "far" / "val.json"


def outside(seeds: list[int]) -> dict:
    """Accuracy on clips outside the training ranges after GRPO, and after SFT alone with the same 1,000 clips."""
    far_clips()
    found = {}
    for seed in seeds:
        sft = OUT / f"sft_full{seed}"
        flags = ["--output_dir", sft, "--overwrite", "--eval_steps", 0, "--seed", seed]
        run("train_sft.py", "--data_path", DATA / "train.json", *flags)
        for name, folder in (("sft", sft), ("grpo", OUT / f"grpo{seed}")):
            for kind in (*FAR, "val"):
                found[f"{name} seed {seed} {kind}"] = accuracy(last(folder), DATA / "far" / f"{kind}.json")
        found[f"sft seed {seed} inside"] = accuracy(last(sft), DATA / "val.json")
    return found


def betas(seed: int) -> dict:
    """KL to the start with no weight on it, the default, and a large one."""
    found = {}
    for beta in (0.0, 0.02, 1.0, 10.0):
        folder = OUT / f"beta{beta:g}"
        given = ["--reference", "start", "--beta", beta or 1e-12]  # 0 would skip the reference pass, and with it the KL
        run("train_grpo.py", "--data_path", DATA / "train.json", "--model_ckpt", start(seed)[0], "--output_dir", folder,
            "--overwrite", "--max_steps", 40, "--max_completion_length", 32, "--eval_steps", 0, "--max_new_tokens", 32,
            *given)  # fmt: skip
        rows = [row for row in metrics(folder) if "kl" in row]
        kl = sorted(row["kl"] for row in rows[-20:])
        found[f"beta {beta:g}"] = {"kl_median_of_last_20": kl[10], "accuracy": rows[-1]["reward/accuracy"]}
    return found


def draw_seeds(seeds: list[int], path: Path) -> None:
    """Accuracy of the sampled completions and KL to the start, a line a seed."""
    panels = []
    for key, title, top in (
        ("reward/accuracy", "accuracy of what is sampled, training clips", 1.0),
        ("kl", "KL to the start, nats a token", 0.5),
    ):
        runs = [[row[key] for row in metrics(OUT / f"grpo{seed}") if key in row] for seed in seeds]
        steps = max(map(len, runs))
        panels.append(Panel(title, [("", range(len(ys)), ys) for ys in runs], top, f"step {steps}"))
    draw(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--extras", action="store_true")
    args = parser.parse_args()
    run("generate.py", "--output_dir", DATA, "--num_samples", 1400, "--split", 0.7143, "--overwrite")
    print("seed  start  sampled (95 %)          greedy (95 %)           KL median, p90, largest  seconds", flush=True)
    rows = []
    for seed in args.seeds:
        row = learn(seed)
        rows.append(row)
        shown = ["{:6.1%} ({:.1%} to {:.1%})".format(row[k][0], *row[k][1]) for k in ("sampled", "greedy")]
        kl = "{median:.3f} {p90:.3f} {largest:.3f}".format(**row["kl"])
        print(f"{seed:4d}  {row['start']:.1%}  {shown[0]}  {shown[1]}  {kl:>23}  {row['seconds']:7.0f}", flush=True)
    draw_seeds(args.seeds, ROOT / "assets" / "grpo_seeds.svg")
    found = {"seeds": rows}
    if args.extras:
        found |= {"format_alone": format_alone(), "betas": betas(args.seeds[0]), "outside": outside(args.seeds)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""GRPO on several CPU ranks, forked from one warm process: what tests/test_dealing.py looks at; how long ranks wait.

    python tests/grpo_ranks.py JOBS.json    run after run: [{"folder", "world", "flags", and what is done to its ranks}]
    python tests/grpo_ranks.py --idle       how much of a step ranks wait, each with its own prompts, or with a queue

A job's `slow` is {rank: units of a step that the others begin before it does}; `unreadable` a clip whose frames cannot
be decoded; `uneven` the seconds that the longest unit takes; with `static` nobody takes another's prompts. who.jsonl in
the run's folder tells which rank sampled which prompts.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training import dealing
from warm import ROOT, start

import data
import train_grpo
from dataset.batch import log
from model import UserError

PORT = 29710
REWARD = """
def vowels(text, sample):
    return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))
"""


def told(folder: Path, rank: int, held: int):
    """sample_groups that writes down what this rank samples; not before the others have begun `held` units."""
    real, file = train_grpo.sample_groups, folder / "who.jsonl"

    def begun(step):
        lines = file.read_text().splitlines() if file.exists() else []
        return sum(line["step"] == step and line["rank"] != rank for line in map(json.loads, lines))

    def sample_groups(run, model, processor, prompts, seeds, count=None):
        step, end = run.step + 1, time.monotonic() + 60
        while begun(step) < held:
            assert time.monotonic() < end, f"step {step}: {begun(step)} units begun by others, expected {held}"
            time.sleep(0.005)
        line = {"step": step, "rank": rank, "prompts": [prompt.number for prompt in prompts]}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return real(run, model, processor, prompts, seeds, count)

    train_grpo.sample_groups = sample_groups


def unreadable(name: str):
    real = data.read_clip

    def read_clip(plan):
        if name in plan.paths[0]:
            raise UserError(f"{plan.paths[0]}: cannot be decoded")
        return real(plan)

    data.read_clip = read_clip


def uneven(seconds: float):
    """Sampling takes as long as the longest completion of the unit would: their lengths are drawn from the seeds."""
    real = train_grpo.sample_groups

    def sample_groups(run, model, processor, prompts, seeds, count=None):
        longest = max((seed * 2_654_435_761 % 2**32 / 2**32) ** 4 for seed in seeds)  # few are long
        time.sleep(seconds * (0.05 + longest))
        return real(run, model, processor, prompts, seeds, count)

    train_grpo.sample_groups = sample_groups


def ready(job: dict, rank: int):
    """For the child, before main()."""

    def first():
        log.setLevel("ERROR")
        if "unreadable" in job:
            unreadable(job["unreadable"])
        if "uneven" in job:
            uneven(job["uneven"])
        if job.get("static"):
            dealing.to_sample = train_grpo.to_sample = lambda run, loader, step, own, failed: iter(own)
        told(Path(job["folder"]), rank, job.get("slow", {}).get(str(rank), 0))

    return first


def run(job: dict, port: int) -> None:
    """One job, to its end. SystemExit with the log's end where it fails."""
    folder, world = Path(job["folder"]), job["world"]
    flags = job["flags"] | {"output_dir": folder}
    shared = {"WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    envs = [{name: str(value) for name, value in (shared | rank).items()} for rank in own]
    files = [folder.with_suffix(f".{rank}.log") for rank in range(world)]
    lives = [start("train_grpo", flags, files[rank], None, envs[rank], ready(job, rank)) for rank in range(world)]
    codes = []
    for life in lives:
        codes.append(life.wait(120))
        if codes[-1]:
            for other in lives:
                other.kill()
    if any(codes):
        raise SystemExit(f"{folder.name}: {codes}\n" + "\n".join(file.read_text()[-2000:] for file in files))


def idle() -> None:
    """A table: two and four ranks with four units each, of which few take long; dealt for good, and with a queue."""
    with tempfile.TemporaryDirectory(prefix="idle") as scratch:
        place = Path(scratch)
        made = ["--num_samples", "60", "--split", "0.9", "--video_length", "12", "--output_dir", place / "data"]
        subprocess.run([sys.executable, "generate.py", *made], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (place / "rewards.py").write_text(REWARD)
        flags = {"data_path": place / "data/train.json", "eval_data_path": "none", "model_ckpt": "none", "nframes": 4}
        flags |= {"rewards": f"{place}/rewards.py:vowels", "num_generations": 4, "max_completion_length": 8}
        flags |= {"max_steps": 9, "rollout_rows": 4, "oversample": 1, "per_device_train_batch_size": 16}
        print("ranks  prompts  who takes them  rollout idle  seconds a step")
        for world in (2, 4):
            for static in (True, False):
                folder = place / f"{world}{static}"
                job = {"folder": folder, "world": world, "flags": flags, "uneven": 2.0, "static": static}
                run(job, PORT + world + static)
                rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                share = statistics.fmean(row["rollout_idle"] for row in rows if "rollout_idle" in row)
                seconds = statistics.fmean(row["ms"] / 1000 for row in rows[1:] if "ms" in row)
                who = "their own ranks" if static else "whoever is free"
                print(f"{world:>5}  {4 * world:>7}  {who:<14}  {share:>12.1%}  {seconds:>14.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--idle"]:
        idle()
    else:
        for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
            run(job, PORT + number)

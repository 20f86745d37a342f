"""Where trainers are tried to death: a scratch folder with a data set, runs in it, and whether two of them are equal.

"Equal" is bit for bit: weights, AdamW moments, adapter, trainer_state.json, best.json, every number of metrics.jsonl
but the CLOCK's, every byte of rollouts.jsonl, and the names of what lies in the folder.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

from warm import NAMES, ROOT, Life, Watch, start  # it sets the environment, and the paths

from checkpoint import checkpoints, read_json, what_is_broken

CLOCK = ("ms", "tokens_per_second", "gib", "wait", "eval_seconds", "rollout_seconds", "update_seconds")
CLOCK += ("idle", "rollout_idle", "update_idle", "traffic")
# What differs from run to run by what the user typed, not by what became of it
TYPED = ("resume", "output_dir")
COMMON = {"nframes": 4, "eval_steps": 3, "eval_samples": 4, "max_new_tokens": 12, "logging_steps": 1000}
FLAGS = {
    "train_sft": COMMON | {"max_steps": 20, "per_device_train_batch_size": 4, "save_steps": 2, "lora_dropout": 0.1},
    "train_grpo": COMMON | {"max_steps": 12, "per_device_train_batch_size": 8, "num_generations": 4, "save_steps": 1,
                            "max_completion_length": 12, "log_completions": 0, "model_ckpt": "none"},
}  # fmt: skip


# The embedded model is seldom right before it is trained: this one differs within its groups at every step.
REWARD = """
def vowels(text, sample):
    return sum(text.count(letter) for letter in "aeiou") / max(1, len(text))
"""


class Place:
    """A scratch folder with the data set, and the undisturbed run of each trainer."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.watch, self.whole, self.number = folder, random.Random(seed), Watch(), {}, 0
        flags = ["--num_samples", "60", "--split", "0.8", "--video_length", "12", "--overwrite"]
        generate = [sys.executable, "generate.py", "--output_dir", folder / "data", *flags]
        subprocess.run(generate, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (folder / "rewards.py").write_text(REWARD)

    def flags(self, script: str, folder: Path, **more) -> dict:
        data = {"data_path": self.folder / "data/train.json", "output_dir": folder}
        if script == "train_grpo":
            data["rewards"] = f"{self.folder}/rewards.py:vowels"
        return FLAGS[script] | data | more

    def new(self, script: str) -> Path:
        self.number += 1
        return self.folder / f"{script}_{self.number}"

    def start(self, script: str, folder: Path, env=None, first=None, watch=None, **more) -> Life:
        return start(script, self.flags(script, folder, **more), folder.with_suffix(".log"), watch, env, first)

    def ranks(self, script: str, folder: Path, world: int, port: int, first=None, **more) -> list[Life]:
        """The processes of a run on several ranks, as a launcher starts them. GRPO's prompts are units of one: those
        of a step go to whoever is free, so who samples what is another matter in every run."""
        more |= {"rollout_rows": 4} if script == "train_grpo" else {}
        shared = {"WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        envs = [{k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(world)]
        return [self.start(script, folder, env, first, **more) for env in envs]

    def undisturbed(self, script: str) -> Path:
        """Its folder; how long each phase takes is kept."""
        if script not in self.whole:
            folder, began = self.new(script), time.monotonic()
            code = self.start(script, folder, watch=self.watch).wait()
            assert code == 0, folder.with_suffix(".log").read_text()[-3000:]
            mean = self.watch.seconds / self.watch.count.clip(1)
            times = {name: float(mean[i]) for i, name in enumerate(NAMES) if self.watch.count[i]}
            counts = {name: int(self.watch.count[i]) for i, name in enumerate(NAMES)}
            self.whole[script] = folder, times, counts, time.monotonic() - began
        return self.whole[script][0]


# Equal?


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_clock(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines(path)]


def typed_away(state: dict) -> dict:
    return state | {"config": {k: v for k, v in state["config"].items() if k not in TYPED}}


def differences(one: Path, two: Path) -> list[str]:
    """What of two finished runs is not equal, in words; [] if all is."""
    found = []
    if (a := {p.name for p in one.iterdir()}) != (b := {p.name for p in two.iterdir()}):
        found.append(f"files: {sorted(a ^ b)}")
    if without_clock(one / "metrics.jsonl") != without_clock(two / "metrics.jsonl"):
        found.append("metrics.jsonl")
    for name in ("rollouts.jsonl", "best.json"):
        if (one / name).exists() and (one / name).read_bytes() != (two / name).read_bytes():
            found.append(name)
    for mine in checkpoints(one):
        theirs = two / mine.name
        if not theirs.exists() or what_is_broken(theirs):
            found.append(f"{mine.name} is missing or broken")
            continue
        if typed_away(read_json(mine / "trainer_state.json")) != typed_away(read_json(theirs / "trainer_state.json")):
            found.append(f"{mine.name}/trainer_state.json")
        for file in [*mine.glob("*.safetensors"), mine / "adapter_config.json"]:
            if file.read_bytes() != (theirs / file.name).read_bytes():
                found.append(f"{mine.name}/{file.name}")
    return found


def losses(folder: Path, *names) -> list[tuple]:
    return [tuple(line.get(n) for n in names) for line in lines(folder / "metrics.jsonl") if "lr" in line]


def order_of_prompts(folder: Path) -> list[tuple]:
    return [(line["step"], line["prompt"], line["id"], line["ids"]) for line in lines(folder / "rollouts.jsonl")]

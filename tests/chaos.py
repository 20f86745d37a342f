"""Runs killed on purpose, files broken on purpose: what is promised of them is tried here. `make chaos`.

    python tests/chaos.py --minutes 20           then a table: promised, tried, held
    python tests/chaos.py --minutes 60 --write   puts the table into docs/guarantees.md
    python tests/chaos.py --kills 3 --files 20   at most so many tries of each kind; tests/test_chaos.py

The trainers are the real ones on the tiny model, CPU and fp32, forked from this process, which has everything imported.
"Equal" is bit for bit: weights, AdamW's moments, adapter, state, every number of metrics.jsonl but the clock's, every
byte of rollouts.jsonl, the names of all files.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}

import numpy as np
import torch._dynamo  # noqa: F401 (making a model on the meta device imports it)

import train_grpo
import train_sft
from checkpoint import checkpoints, read_json, what_is_broken
from clips import draw_clip, render, write_mp4
from config import SFT, cli
from data import Processor, load_tokenizer, read_records
from model import UserError
from model.loading import ModelConfig

SCRIPTS = {"train_sft": train_sft, "train_grpo": train_grpo}
CLOCK = re.compile("seconds|^ms$|^wait$|^gib$|tokens_per_second")
COMMON = {
    "nframes": 4,
    "eval_steps": 3,
    "eval_samples": 4,
    "max_new_tokens": 12,
    "logging_steps": 1000,
    "save_steps": 2,
}
FLAGS = {
    "train_sft": COMMON | {"max_steps": 12, "per_device_train_batch_size": 4, "lora_dropout": 0.1},
    "train_grpo": COMMON | {"max_steps": 8, "per_device_train_batch_size": 8, "num_generations": 4,
                            "max_completion_length": 12, "model_ckpt": "none"},
}  # fmt: skip
# The tiny model is seldom right before it is trained; this reward differs within its groups at every step.
REWARD = "def vowels(text, sample):\n    return sum(map(text.count, 'aeiou')) / max(1, len(text))\n"
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile")  # audit events


class Lab:
    """A scratch folder with a dataset, the undisturbed runs in it, and trainers forked from this process."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.number, self.whole = folder, random.Random(seed), 0, {}
        flags = ["--num_samples", "60", "--split", "0.8", "--video_length", "12", "--output_dir", folder / "data"]
        subprocess.run([sys.executable, "generate.py", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (folder / "rewards.py").write_text(REWARD)

    def new(self) -> Path:
        self.number += 1
        return self.folder / f"run{self.number}"

    def start(self, script: str, folder: Path, kill_before: int = 0, env: dict | None = None, **options) -> int:
        """Fork a trainer; its process id. kill_before: see watch_files; env: RANK and so on."""
        flags = FLAGS[script] | {"data_path": self.folder / "data/train.json", "output_dir": folder} | options
        flags |= {"rewards": f"{self.folder}/rewards.py:vowels"} if script == "train_grpo" else {}

        def main():
            os.environ.update(env or {})
            sys.argv = [f"{script}.py", *(word for name in flags for word in (f"--{name}", str(flags[name])))]
            if kill_before:
                watch_files(folder, kill_before)
            cli(SCRIPTS[script].main)

        return fork(main, folder.with_suffix(".log"))

    def undisturbed(self, script: str, **options) -> tuple[Path, float]:
        """(its folder, its seconds)"""
        key = script, *options.items()
        if key not in self.whole:
            folder, began = self.new(), time.monotonic()
            code = end_of(self.start(script, folder, **options))
            assert code == 0, folder.with_suffix(".log").read_text()[-3000:]
            self.whole[key] = folder, time.monotonic() - began
        return self.whole[key]

    def finish(self, script: str, folder: Path, **options) -> str:
        """Resume to the end and compare with the undisturbed run: "" or what is wrong."""
        broken = [f"{path.name}: {fault}" for path in checkpoints(folder) if (fault := what_is_broken(path))]
        code = end_of(self.start(script, folder, resume=True, **options))
        if code or broken:
            return f"{broken} resume ended with {code}: {folder.with_suffix('.log').read_text()[-300:]}"
        wrong = differences(self.undisturbed(script, **options)[0], folder)
        shutil.rmtree(folder)
        return ", ".join(wrong)


def fork(main, log: Path) -> int:
    """main() in a child whose output goes to `log`; its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        if sys.exc_info()[0]:  # the process ends here, with its reason in the log
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int, seconds: float = 300.0) -> int | None:
    """Exit code, or minus the signal; None if it had to be killed because it ran longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def watch_files(folder: Path, kill_before: int) -> None:
    """In the child: SIGKILL before its n-th change of a file in the folder, fsync included."""
    seen, sync = [0], os.fsync

    def change() -> None:
        seen[0] += 1
        if seen[0] == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args) -> None:
        if event in CHANGES and str(folder) in f"{args[0]}":
            if event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                change()

    os.fsync = lambda file: (change(), sync(file))[1]
    sys.addaudithook(hook)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def differences(one: Path, two: Path) -> list[str]:
    """What of two finished runs is not equal."""
    different = lambda path: not (two / path).exists() or (one / path).read_bytes() != (two / path).read_bytes()
    wrong = [f"only in one: {name}" for name in {p.name for p in one.iterdir()} ^ {p.name for p in two.iterdir()}]
    rows = [
        [{k: v for k, v in row.items() if not CLOCK.search(k)} for row in lines(f / "metrics.jsonl")]
        for f in (one, two)
    ]
    wrong += ["metrics.jsonl"] * (rows[0] != rows[1])
    for path in checkpoints(one):
        states = [read_json(folder / path.name / "trainer_state.json") for folder in (one, two)]
        for state in states:  # what was typed
            del state["config"]["resume"], state["config"]["output_dir"]
        wrong += [f"{path.name}/trainer_state.json"] * (states[0] != states[1])
    patterns = "rollouts.jsonl", "best.json", "checkpoint-*/*.safetensors", "checkpoint-*/adapter_config.json"
    files = [path.relative_to(one) for pattern in patterns for path in one.glob(pattern)]
    return wrong + [str(path) for path in files if different(path)]


# -- What is tried: each generator yields "" for a try that held, else what was wrong


def random_moments(lab: Lab, script: str):
    """A run and up to three resumes, each ended by SIGKILL, SIGTERM or SIGINT."""
    while True:
        folder, seconds, wrong = lab.new(), lab.undisturbed(script)[1], ""
        for life in range(lab.random.randint(1, 4)):
            number = lab.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            pid, before = lab.start(script, folder, resume=bool(life)), len(lines(folder / "metrics.jsonl"))
            time.sleep(lab.random.uniform(0, 0.9 * seconds))
            os.kill(pid, number)
            code, stepped = end_of(pid), len(lines(folder / "metrics.jsonl")) > before
            asked = 128 + number if number != signal.SIGKILL else -number
            if code not in (asked, 0) and (stepped or code != -number):  # a trainer that still starts just ends
                wrong = f"{number.name}: exit code {code}"
            elif code == 128 + number and stepped and not checkpoints(folder):
                wrong = f"{number.name}: no checkpoint"
        yield wrong or lab.finish(script, folder)


def before_each_change(lab: Lab, script: str):
    """SIGKILL before the 1st, 2nd, 3rd … change of a file in a run that saves three checkpoints."""
    short, number, code = {"max_steps": 3, "save_steps": 1, "eval_steps": 2, "save_total_limit": 1}, 0, -signal.SIGKILL
    while code:
        folder, number = lab.new(), number + 1
        code = end_of(lab.start(script, folder, kill_before=number, **short))
        if code == -signal.SIGKILL:
            yield lab.finish(script, folder, **short)
        elif code:
            yield f"change {number}: exit code {code}"


def other_ranks(lab: Lab, script: str):
    """Two ranks, one killed at a random moment: the other ends; resumed on one rank or two like one rank's run."""
    size = FLAGS[script]["per_device_train_batch_size"]
    options = {"lora_dropout": 0, "eval_data_path": "none", "save_total_limit": "none"}
    names = "step", "loss", "grad_norm", "lr", "completion_tokens"

    def start(folder, world, **more) -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        env = {"WORLD_SIZE": f"{world}", "LOCAL_SIZE": f"{world}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        flags = options | {"per_device_train_batch_size": size // world} | more
        return [
            lab.start(script, folder, env=env | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"}, **flags) for r in range(world)
        ]

    def numbers(folder) -> np.ndarray:
        rows = [row for row in lines(folder / "metrics.jsonl") if "lr" in row]
        return np.array([[row.get(name) or 0 for name in names] for row in rows], dtype=float)

    expected = numbers(lab.undisturbed(script, **options)[0])
    while True:
        folder, world = lab.new(), lab.random.choice([1, 2])
        pids, wanted, until = start(folder, 2), lab.random.randint(3, 6), time.monotonic() + 60
        while len(lines(folder / "metrics.jsonl")) < wanted and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(lab.random.choice(pids), signal.SIGKILL)
        codes = [end_of(pid, 60) for pid in pids]
        again = [end_of(pid) for pid in start(folder, world, resume=True)]
        result = numbers(folder)
        equal = result.shape == expected.shape and np.allclose(result, expected, rtol=1e-4, atol=1e-4)
        yield (
            "" if equal and None not in codes and not any(again) else f"{codes}, then {again} on {world}; equal {equal}"
        )


def mutated(lab: Lab, kind: str):
    """A broken clip or dataset: samples, or one line of a UserError, within 20 s and 3 GiB of memory."""
    folder = lab.folder / kind
    folder.mkdir()
    write_mp4(folder / "good.mp4", render(draw_clip(np.random.default_rng(0), "Ascending", 64, 16)))
    args = SFT(image_folder=str(folder), max_seq_length=2048)
    tiny = ROOT / "assets" / "tiny"
    processor = Processor(load_tokenizer(tiny), ModelConfig.from_folder(tiny), args)
    clip, number = (folder / "good.mp4").read_bytes(), 0
    turns = [{"from": "human", "value": "<video>\nWhere to?\n(A) up\n(B) down"}, {"from": "gpt", "value": "(A) up"}]
    record = {"id": 7, "video": "good.mp4", "conversations": turns}
    processor.encode(record)

    def read(path):
        signal.alarm(20)  # its default action ends the process, also in the middle of a library
        try:
            for each in read_records(path) if kind == "datasets" else [record | {"video": path.name}]:
                processor.encode(each)
        except UserError as error:
            assert "\n" not in str(error).strip() and str(error).strip(), f"not one line: {error!r}"

    while True:
        number, log = number + 1, folder / "log"
        path = folder / (f"{number}.mp4" if kind == "files" else f"{number}.json")
        if kind == "files":
            path.write_bytes(mutate_bytes(lab.random, clip))
        else:
            text = mutate_records(lab.random, json.dumps([record] * 3)).encode()
            path.write_bytes(mutate_bytes(lab.random, text) if lab.random.random() < 0.3 else text)
        _, status, usage = os.wait4(fork(lambda: read(path), log), 0)  # noqa: B023
        code = os.waitstatus_to_exitcode(status)
        yield f"{path.name}: exit code {code}: {log.read_text()[-400:]}" if code or usage.ru_maxrss > 3 * 2**20 else ""
        log.unlink()
        path.unlink()


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 4, 100, 1000))
        what = rng.choice(("flip", "cut", "remove", "repeat", "noise", "zero", "claim"))
        if what == "cut":
            del data[at:]
        elif what == "claim":  # a size, count or time of a header becomes an extreme one
            tags = [
                tag for tag in (b"stsz", b"stsc", b"stts", b"stco", b"tkhd", b"mvhd", b"mdhd", b"avcC") if tag in data
            ]
            at = data.find(rng.choice(tags)) + 4 + 4 * rng.randrange(5) if tags else at
            data[at : at + 4] = rng.choice((0, 1, 255, 65_535, 10**9, 2**31, 2**32 - 1)).to_bytes(4, "big")
        else:
            old = bytes(data[at : at + n])
            new = {"flip": bytes(b ^ 1 << rng.randrange(8) for b in old), "remove": b"", "repeat": old * 3,
                   "noise": rng.randbytes(n) + old, "zero": bytes(len(old))}  # fmt: skip
            data[at : at + n] = new[what]
    return bytes(data)


WEIRD = [None, True, 0, -1, 1e300, float("nan"), 10**30, "", "\0", "\ud83d", "<video>", "<video><video>", "<image>"]
WEIRD += ["<|im_end|>", "<|video_pad|>", "/dev/zero", "../../etc/passwd", "http://localhost/a.mp4", ".", "x" * 5000]
WEIRD += [[], {}, [[]], [None], {"type": "video"}, ["good.mp4"] * 2, "none.mp4"]
WEIRD += "videos images image messages role content type system fps nframes max_pixels problem solution".split()


def mutate_records(rng: random.Random, text: str) -> str:
    """One to three names or values become something else, often another one's."""
    for _ in range(rng.randint(1, 3)):
        tokens = list(re.finditer(r'"(?:[^"\\]|\\.)*"|\d+', text))
        old, other = rng.choice(tokens), rng.choice(tokens)[0]
        new = other if rng.random() < 0.3 else json.dumps(rng.choice(WEIRD))
        text = text[: old.start()] + new + text[old.end() :]
    return text


RESUMED = "resumed, it equals the undisturbed run"
PARTS = [
    (f"{{}}.py ended at random moments by SIGKILL, SIGTERM, SIGINT: {RESUMED}", random_moments, [*SCRIPTS], 5),
    (f"{{}}.py killed before each single change of a file: {RESUMED}", before_each_change, [*SCRIPTS], 5),
    (
        "{}.py, one of 2 ranks killed: the other ends; resumed on 1 or 2 it is one rank's run",
        other_ranks,
        [*SCRIPTS],
        2,
    ),
    ("mutated {}: read, or left out with one line; no traceback, no hang", mutated, ["files", "datasets"], 3),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="in all; a try that was begun is ended")
    parser.add_argument("--kills", type=int, default=10**6, help="tries of each kind with a trainer, at most")
    parser.add_argument("--files", type=int, default=500, help="mutated files, and as many datasets")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--write", action="store_true", help="put the table into docs/guarantees.md")
    args = parser.parse_args()
    command = f"python tests/chaos.py --minutes {args.minutes:g} --seed {args.seed}"
    print(command, flush=True)
    rows, held, shares = ["| promised | tried | held |", "|---|---|---|"], True, sum(2 * part[-1] for part in PARTS)
    with tempfile.TemporaryDirectory(prefix="chaos") as scratch:
        lab = Lab(Path(scratch), args.seed)
        for promise, tries, name, share in [
            (p, tries, name, share) for p, tries, names, share in PARTS for name in names
        ]:
            began, faults, tried = time.monotonic(), [], 0
            for tried, fault in enumerate(tries(lab, name), 1):  # noqa: B007 (read below)
                faults += [fault] * bool(fault)
                if fault:
                    print(f"{promise.format(name)}: {fault}", flush=True)
                full = tried >= (args.files if tries is mutated else args.kills)
                if full or time.monotonic() - began > 60 * args.minutes * share / shares:
                    break
            rows.append(f"| {promise.format(name)} | {tried} | {tried - len(faults)} |")
            held = held and not faults
            print(rows[-1], flush=True)
    if args.write:
        page, table = ROOT / "docs" / "guarantees.md", "\n".join([f"`{command}`, {date.today()}, CPU:", "", *rows])
        text = re.sub(r"(?s)(<!-- chaos -->\n).*(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", page.read_text())
        page.write_text(text)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

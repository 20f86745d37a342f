"""Runs killed on purpose, files broken on purpose: what is promised of them is tried here. `make chaos`.

    python tests/chaos.py --minutes 20           then a table for docs/guarantees.md: promised, tried, held
    python tests/chaos.py --kills 3 --files 20   at most so many tries of each kind

The trainers are the real ones on the tiny model, CPU and fp32, forked from this process, which has everything imported.
"Equal" is bit for bit: weights, AdamW's moments, adapter, state, every number of metrics.jsonl but the clock's, every
byte of rollouts.jsonl, the names of all files.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import islice
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
COMMON = "--nframes 4 --eval_steps 3 --eval_samples 4 --max_new_tokens 12 --logging_steps 1000 --save_steps 2"
FLAGS = {
    "train_sft": f"{COMMON} --max_steps 12 --per_device_train_batch_size 4 --lora_dropout 0.1",
    "train_grpo": f"{COMMON} --max_steps 8 --per_device_train_batch_size 8 --num_generations 4 "
    "--max_completion_length 12 --model_ckpt none --rewards rewards.py:vowels",
}
# The tiny model is seldom right before it is trained; this reward differs within its groups at every step.
REWARD = "def vowels(text, sample):\n    return sum(map(text.count, 'aeiou')) / max(1, len(text))\n"
CLOCK = re.compile("seconds|^ms$|^wait$|^gib$|tokens_per_second")
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile")  # audit events
RNG = random.Random()


def prepare(folder: Path, seed: int) -> None:
    """Go into a scratch folder with a dataset and a reward; runs are made in it as run1, run2, …"""
    RNG.seed(seed)
    flags = ["--num_samples", "60", "--split", "0.8", "--video_length", "12", "--output_dir", folder / "data"]
    subprocess.run([sys.executable, ROOT / "generate.py", *flags], check=True, stdout=subprocess.DEVNULL)
    os.chdir(folder)
    Path("rewards.py").write_text(REWARD)


def fork(main, log: Path):
    """main() in a process whose output goes to `log`."""

    def child():
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        main()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def end_of(process, seconds: float = 300.0) -> int | None:
    """Exit code, or minus the signal; None if it had to be killed because it ran longer."""
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def start(script: str, run: Path, flags: str = "", kill_before: int = 0, env=()):
    """A trainer's process. kill_before: SIGKILL before its n-th change of a file of the run, fsync too."""
    changes, sync = [], os.fsync

    def change():
        changes.append(None)
        if len(changes) == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, args):
        writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES and f"{run}" in f"{args[0]}" and writes:
            change()

    def main():
        os.environ.update(env)
        words = f"--data_path data/train.json --output_dir {run.absolute()} {FLAGS[script]} {flags}"
        sys.argv = [f"{script}.py", *words.split()]
        if kill_before:
            os.fsync = lambda file: (change(), sync(file))[1]
            sys.addaudithook(hook)
        cli(SCRIPTS[script].main)

    return fork(main, run.with_suffix(".log"))


@cache
def undisturbed(script: str, flags: str) -> tuple[Path, float]:
    """(the run's folder, its seconds), made once"""
    run, began = Path(f"whole_{script}{len(flags)}"), time.monotonic()
    code = end_of(start(script, run, flags))
    assert code == 0, run.with_suffix(".log").read_text()[-3000:]
    return run, time.monotonic() - began


def finish(script: str, run: Path, flags: str = "") -> str:
    """Resume to the end and compare with the undisturbed run: "" or what is wrong."""
    broken = [f"{path.name}: {fault}" for path in checkpoints(run) if (fault := what_is_broken(path))]
    code = end_of(start(script, run, f"{flags} --resume True"))
    if code or broken:
        return f"{broken} resume ended with {code}: {run.with_suffix('.log').read_text()[-300:]}"
    one, two = contents(undisturbed(script, flags)[0]), contents(run)
    shutil.rmtree(run)
    return ", ".join(sorted(name for name in one.keys() | two.keys() if one.get(name, 0) != two.get(name, 0)))


def lines(path: Path) -> list[dict]:
    """Of metrics.jsonl, clocks left out."""
    text = path.read_text() if path.exists() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())  # the last line may be in the middle of a write
    return [{key: value for key, value in row.items() if not CLOCK.search(key)} for row in rows]


def contents(run: Path) -> dict:
    """{name: what of each file must be equal in two finished runs}; of some the name alone."""
    result = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.name == "metrics.jsonl":
            result[name] = lines(path)
        elif path.name == "trainer_state.json":
            result[name] = read_json(path)
            del result[name]["config"]["resume"], result[name]["config"]["output_dir"]  # what was typed
        else:
            equal = path.suffix == ".safetensors" or path.name in ("rollouts.jsonl", "best.json", "adapter_config.json")
            result[name] = path.read_bytes() if equal else None
    return result


# -- What is tried: each generator yields "" for a try that held, else what was wrong


def random_moments(script: str):
    """A run and up to three resumes, each ended by SIGKILL, SIGTERM or SIGINT."""
    number = 0
    while True:
        run, number, wrong = Path(f"{script}_random{number}"), number + 1, ""
        for life in range(RNG.randint(1, 4)):
            kind = RNG.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            trainer, before = start(script, run, "--resume True" * bool(life)), len(lines(run / "metrics.jsonl"))
            time.sleep(RNG.uniform(0, 0.9 * undisturbed(script, "")[1]))
            os.kill(trainer.pid, kind)
            code, stepped = end_of(trainer), len(lines(run / "metrics.jsonl")) > before
            expected = 128 + kind if kind != signal.SIGKILL else -kind
            if code not in (expected, 0) and (stepped or code != -kind):  # a trainer that still starts just ends
                wrong = f"{kind.name}: exit code {code}"
            elif code == 128 + kind and stepped and not checkpoints(run):
                wrong = f"{kind.name}: no checkpoint"
        yield wrong or finish(script, run)


def before_changes(script: str, every: int = 1):
    """SIGKILL before the n-th change of a file in a run that saves three checkpoints, for each n once, in random order:
    a few tries already lie all over the run. Or for every so many-th n, in order."""
    short, most = "--max_steps 3 --save_steps 1 --eval_steps 2 --save_total_limit 1", 400
    numbers = [*range(every, most, every)]
    if every == 1:
        RNG.shuffle(numbers)
    for number in numbers:
        if number >= most:  # the run ends with fewer changes
            continue
        run = Path(f"{script}_change{number}")
        code = end_of(start(script, run, short, kill_before=number))
        if code == -signal.SIGKILL:
            yield finish(script, run, short)
        elif code:
            yield f"change {number}: exit code {code}"
        else:
            most = number


def other_ranks(script: str):
    """Two ranks, one killed at a random moment: the other ends; resumed on one rank or two like one rank's run."""
    size = 4 if script == "train_sft" else 8
    options = "--lora_dropout 0 --eval_data_path none --save_total_limit none"

    def launch(run, world, more="") -> list:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        env = {"WORLD_SIZE": f"{world}", "LOCAL_SIZE": f"{world}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        flags = f"{options} --per_device_train_batch_size {size // world} {more}"
        return [start(script, run, flags, env=env | {"RANK": f"{r}", "LOCAL_RANK": f"{r}"}) for r in range(world)]

    def numbers(run) -> np.ndarray:
        names = "step", "loss", "grad_norm", "lr", "completion_tokens"
        rows = [row for row in lines(run / "metrics.jsonl") if "lr" in row]
        return np.array([[row.get(name) or 0 for name in names] for row in rows], dtype=float)

    expected, number = numbers(undisturbed(script, options)[0]), 0
    while True:
        run, number, world = Path(f"{script}_ranks{number}"), number + 1, RNG.choice([1, 2])
        ranks, steps, until = launch(run, 2), RNG.randint(3, 6), time.monotonic() + 300
        while len(lines(run / "metrics.jsonl")) < steps and time.monotonic() < until:
            time.sleep(0.02)
        RNG.choice(ranks).kill()
        codes = [end_of(rank, 60) for rank in ranks]
        again, result = [end_of(rank) for rank in launch(run, world, "--resume True")], numbers(run)
        equal = result.shape == expected.shape and np.allclose(result, expected, rtol=1e-4, atol=1e-4)
        held = equal and None not in codes and not any(again)
        yield "" if held else f"{codes}, then {again} on {world}; equal {equal}"


def mutated(kind: str):
    """A broken clip or dataset: samples, or one line of a UserError, within 20 s and 3 GiB of memory."""
    write_mp4(Path("good.mp4"), render(draw_clip(np.random.default_rng(0), "Ascending", 64, 16)))
    tiny, number, log = ROOT / "assets" / "tiny", 0, Path("log")
    args = SFT(image_folder=".", max_seq_length=2048)
    processor = Processor(load_tokenizer(tiny), ModelConfig.from_folder(tiny), args)
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
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20, "more than 3 GiB"

    while True:
        number += 1
        if kind == "files":
            path, data = Path(f"{number}.mp4"), mutate_bytes(Path("good.mp4").read_bytes())
        else:
            path, data = Path(f"{number}.json"), mutate_records(json.dumps([record] * 3)).encode()
            data = mutate_bytes(data) if RNG.random() < 0.3 else data
        path.write_bytes(data)
        code = end_of(fork(lambda: read(path), log))  # noqa: B023
        yield f"{path.name}: exit code {code}: {log.read_text()[-400:]}" if code else ""
        log.unlink()
        path.unlink()


def mutate_bytes(data: bytes) -> bytes:
    for _ in range(RNG.choice((1, 1, 2, 4))):
        at, n = RNG.randrange(len(data) + 1), RNG.choice((1, 4, 100, 1000))
        tags = [tag for tag in (b"stsz", b"stsc", b"stts", b"stco", b"tkhd", b"mvhd", b"mdhd", b"avcC") if tag in data]
        if tags and RNG.random() < 0.2:  # a size, count or time of a header becomes an extreme one
            at, n = data.find(RNG.choice(tags)) + 4 + 4 * RNG.randrange(5), 4
        old, extreme = data[at : at + n], RNG.choice((0, 1, 255, 65_535, 10**9, 2**31, 2**32 - 1))
        flipped = bytes(byte ^ 1 << RNG.randrange(8) for byte in old)
        new = RNG.choice((flipped, b"", old * 3, RNG.randbytes(n) + old, bytes(len(old)), extreme.to_bytes(4, "big")))
        data = data[:at] + new + data[at + n :] * (RNG.random() < 0.9)  # or cut off
    return data


WEIRD = [None, True, 0, -1, 1e300, float("nan"), 10**30, "", "\0", "\ud83d", "<video>", "<video><video>", "<image>"]
WEIRD += ["<|im_end|>", "<|video_pad|>", "/dev/zero", "../../etc/passwd", "http://localhost/a.mp4", ".", "x" * 5000]
WEIRD += [[], {}, [[]], [None], {"type": "video"}, ["good.mp4"] * 2, "none.mp4"]
WEIRD += "videos images image messages role content type system fps nframes max_pixels problem solution".split()


def mutate_records(text: str) -> str:
    """One to three names or values become something else, often another one's."""
    for _ in range(RNG.randint(1, 3)):
        tokens = list(re.finditer(r'"(?:[^"\\]|\\.)*"|\d+', text))
        old, other = RNG.choice(tokens), RNG.choice(tokens)[0]
        new = other if RNG.random() < 0.3 else json.dumps(RNG.choice(WEIRD))
        text = text[: old.start()] + new + text[old.end() :]
    return text


RESUMED = "resumed, it equals the undisturbed run"
TRIES = [  # what is promised, its generator, of what, share of the time
    (f"{{}}.py ended at random moments by SIGKILL, SIGTERM, SIGINT: {RESUMED}", random_moments, SCRIPTS, 5),
    (f"{{}}.py killed before a change of a file, drawn from all: {RESUMED}", before_changes, SCRIPTS, 5),
    ("{}.py, one of 2 ranks killed: the other ends; resumed on 1 or 2 it is one rank's run", other_ranks, SCRIPTS, 2),
    ("mutated {}: read, or left out with one line; no traceback, no hang", mutated, ("files", "datasets"), 3),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="in all; a try that was begun is ended")
    parser.add_argument("--kills", type=int, default=10**6, help="tries of each kind with a trainer, at most")
    parser.add_argument("--files", type=int, default=500, help="mutated files, and as many datasets")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    print(f"`python tests/chaos.py --minutes {args.minutes:g} --seed {args.seed}`", flush=True)
    rows, failed = ["| promised | tried | held |", "|---|---|---|"], 0
    with tempfile.TemporaryDirectory(prefix="chaos") as scratch:
        prepare(Path(scratch), args.seed)
        for promise, tries, name, share in [(p, t, name, share) for p, t, names, share in TRIES for name in names]:
            end, faults = time.monotonic() + 60 * args.minutes * share / 30, []
            for fault in islice(tries(name), args.files if tries is mutated else args.kills):
                faults.append(fault)
                if fault:
                    print(f"{promise.format(name)}: {fault}", flush=True)
                if time.monotonic() > end:
                    break
            failed += sum(map(bool, faults))
            rows.append(f"| {promise.format(name)} | {len(faults)} | {faults.count('')} |")
    print(*rows, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

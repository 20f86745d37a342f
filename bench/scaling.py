"""The measuring half of scale.py: the real scripts on 1, 2, 4 … GPUs with the same work on each, one row a run.

A random checkpoint of the exact shape, with the embedded model's tokenizer, and drawn clips whose prompts and answers
have the workload's token counts are made first. Then each run goes through the deepspeed command: steps to warm up,
steps that are timed, steps under the profiler (traced.py). A run that fails or outlasts its limit is told in its row.
"""

import importlib.metadata
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from workloads import NAMED, TINY, config_dict, model_config

from clips import DIRECTIONS, draw_clip, render, write_mp4
from config import SFT
from data import Processor, load_tokenizer
from model import UserError
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL

ROOT = Path(__file__).resolve().parents[1]
CLIPS = 96  # records; an epoch of 12 steps of 8 on one GPU
DRAWN = 16  # different clips among them: drawing takes seconds, decoding is of whole files all the same
# a reward under which groups differ
NOISE = "import random\n\n\ndef noise(text, sample):\n    return random.random()\n"
ASKED = "<video>\nWhich?\nOptions:\n(A) Left to Right\n(B) Right to Left"
TOLD = ("ms", "wait", "gib", "rollout_seconds", "update_seconds", "tokens_per_second", "traffic")  # of metrics.jsonl
# Of each kind: script, prompts or samples a GPU and step, completions of a prompt
KINDS = {"sft": ("train_sft.py", 8, 0), "grpo": ("train_grpo.py", 1, 8), "grpo8": ("train_grpo.py", 8, 8)}


# -- What is measured on


def view(work):
    """Options of the scripts under which a clip gets the workload's grid."""
    t, h, w = work.grid
    return {"nframes": 2 * t, "video_resized_height": 14 * h, "video_resized_width": 14 * w}


def make_checkpoint(size, folder):
    """A random model of a released shape, with the embedded model's tokenizer and its special tokens' numbers."""
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    raw = config_dict(size) | {name: config[name] for name in config if name.endswith("_token_id")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    Qwen2_5_VL.random(ModelConfig.from_dict(raw), device, torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(TINY / name, folder / name)


def make_clips(work, folder):
    """CLIPS files of the workload's frames and size."""
    t, h, w = work.grid
    high, wide = 14 * h, 14 * w
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(0), [*DIRECTIONS]
    for i in range(DRAWN):
        frames = render(draw_clip(rng, names[i % len(names)], max(high, wide), 2 * t))
        top, left = (max(high, wide) - high) // 2, (max(high, wide) - wide) // 2
        write_mp4(folder / f"{i:03d}.mp4", np.ascontiguousarray(frames[:, top : top + high, left : left + wide]))
    for i in range(DRAWN, CLIPS):
        shutil.copyfile(folder / f"{i % DRAWN:03d}.mp4", folder / f"{i:03d}.mp4")


def make_data(work, folder):
    """videos/, train.json for SFT and rl.json for GRPO: prompts and answers of the workload's token counts."""
    make_clips(work, folder / "videos")
    cfg = SFT(**view(work), image_folder=str(folder / "videos"))
    processor = Processor(load_tokenizer(TINY), model_config("tiny"), cfg)
    rng, words = random.Random(0), [" ball", " is", " right", " left", " the", " time"]  # a token each

    def record(i, more, answer):
        turns = [{"from": "human", "value": ASKED + " the" * more}, {"from": "gpt", "value": answer}]
        return {"id": f"{i:03d}", "video": f"{i:03d}.mp4", "conversations": turns}

    more = work.prompt_tokens - processor.length(record(0, 0, ""), False)
    if more < 0:
        raise UserError(f"--workload: a prompt of {work.prompt} text tokens, expected at least {work.prompt - more}")
    answers = ["".join(rng.choice(words) for _ in range(work.completion - 1)) for _ in range(CLIPS)]  # and <|im_end|>
    for name, texts in (("train", answers), ("rl", ["Answer: (A) Left to Right"] * CLIPS)):
        records = [record(i, more, text) for i, text in enumerate(texts)]
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "noise.py").write_text(NOISE, encoding="utf-8")


def make(size, workload, folder):
    """All of it. In a process of its own: what it takes of the GPU is gone before anything is measured."""
    make_data(NAMED[workload], folder)
    if size != "tiny":
        make_checkpoint(size, folder / "model")


# -- The runs


def rank_of(args):
    return 16 if args.model == "tiny" else 64


def batch_of(kind):
    """Samples or prompts a GPU and step; fewer on a CPU."""
    return KINDS[kind][1] if torch.cuda.is_available() else min(4, KINDS[kind][1])


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def flags_of(kind, args, folder, steps):
    """The script's flags: workload, weak scaling's share of a GPU, as the usual settings have it."""
    script, _, group = KINDS[kind]
    tiny, work, recompute = args.model == "tiny", NAMED[args.workload], torch.cuda.is_available()
    flags = view(work) | {
        "model_id": TINY if tiny else folder / "model", "data_path": folder / ("rl.json" if group else "train.json"),
        "lora_rank": rank_of(args), "lora_alpha": rank_of(args), "learning_rate": 1e-4, "save_strategy": "no",
        "eval_data_path": "none", "dataloader_num_workers": args.workers, "gradient_checkpointing": recompute,
        "pack_tokens": 16384, "max_steps": steps, "overwrite": True,
        "per_device_train_batch_size": batch_of(kind) * max(1, group),
    }  # fmt: skip
    if group:
        flags |= {"model_ckpt": "none", "num_generations": group, "oversample": 1, "log_completions": 0}
        flags |= {"max_completion_length": work.completion, "rewards": f"{folder / 'noise.py'}:noise"}
    flags = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return script, flags + shlex.split(args.flags)


def launch(kind, gpus, args, folder):
    """-> (command, run's folder, trace's file, exit code or None after the limit, seconds)."""
    out, trace, last = folder / f"{kind}-{gpus}", folder / f"{kind}-{gpus}.json", args.warmup + args.steps
    script, flags = flags_of(kind, args, folder, last + args.traced)
    ours = ["--num_gpus", str(gpus), "--no_local_rank", "--master_port", str(free_port()), "bench/traced.py"]
    ours += [str(last + 1), str(args.traced), str(trace), script, *flags, "--output_dir", str(out)]
    began = time.monotonic()
    with open(folder / f"{kind}-{gpus}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.runner", *ours], cwd=ROOT, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(args.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: the launcher's children are in it too
            code = process.wait() and None
    command = shlex.join(["deepspeed", *ours]).replace(str(folder), "FOLDER").replace(f"{ROOT}/", "")
    return command, out, trace, code, time.monotonic() - began


def measured(kind, gpus, args, folder):
    """One row; what went wrong under "error"."""
    row = {"work": kind, "model": args.model, "workload": args.workload, "gpus": gpus, "flags": args.flags}
    row |= {"rank": rank_of(args), "batch": batch_of(kind), "group": KINDS[kind][2]}
    row |= {"gradient_checkpointing": torch.cuda.is_available()}
    row |= {"date": date.today().isoformat(), "machine": machine(), "gpu": gpu(), "versions": versions()}
    if torch.cuda.is_available() and torch.cuda.device_count() < gpus:
        return row | {"error": f"not run: this machine has {torch.cuda.device_count()} GPUs"}
    row["command"], out, trace, code, row["seconds_in_all"] = launch(kind, gpus, args, folder)
    if code != 0:
        text = (folder / f"{kind}-{gpus}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if "rror" in line] or text.splitlines() or ["no output"]
        why = f"not done after {args.limit} s" if code is None else f"exit code {code}"
        row["error"] = f"{why}: {lines[-1][:200]}"
    return row | steps_of(out / "metrics.jsonl", args) | (json.loads(trace.read_text()) if trace.exists() else {})


def steps_of(path, args):
    """Medians of the timed steps of metrics.jsonl, and each one's milliseconds; {} where there are none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if args.warmup < row["step"] <= args.warmup + args.steps]
    if not rows:
        return {}
    names = [name for name in rows[-1] if name in TOLD or "idle" in name]
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    medians = {name: statistics.median(values) for name, values in found.items() if values}
    return medians | {"gib": max(found["gib"]), "all_ms": [round(ms, 2) for ms in found["ms"]]}


def machine():
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    here = f"{len(gpus)} x {gpus[0]} of one host" if gpus else "CPU"
    return f"{here}, {os.cpu_count()} cores"


def gpu():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def versions():
    found = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    return found | ({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if torch.cuda.is_available() else {})


# -- The table


def shown(row, first):
    """A line of the table. first: the row of the same work on the fewest GPUs."""
    head = f"{row['work']:<6} {row['gpus']:>4}  "
    if "ms" not in row:
        return head + row["error"]
    share = row.get("shares") or {}
    cells = [f"{row['ms'] / 1000:8.3f}", f"{min(row['all_ms']) / 1000:8.3f}", f"{max(row['all_ms']) / 1000:8.3f}"]
    cells += [f"{first['ms'] / row['ms']:8.1%}" if "ms" in first else f"{'-':>8}"]
    for name in ("compute", "traffic", "waiting", "idle"):
        cells.append(f"{share[name]:8.1%}" if share.get(name) is not None else f"{'-':>8}")
    cells += [f"{row['wait']:8.1%}", f"{row['gib']:7.2f}"]
    return head + "  ".join(cells) + (f"  {row['error']}" if "error" in row else "")


HEADINGS = {"median s": 8, "least": 8, "most": 8, "scaling": 8, "compute": 8, "traffic": 8, "waiting": 8, "idle": 8}
HEADINGS |= {"for data": 8, "GiB": 7}


def run(args):
    """Every run of the command line: prints the table as it grows, rows as JSON last. Returns the rows."""
    folder = Path(args.folder or tempfile.mkdtemp(prefix="scale-"))
    shutil.rmtree(folder / "videos", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    child = multiprocessing.get_context("spawn").Process(target=make, args=(args.model, args.workload, folder))
    child.start()
    child.join(args.limit)
    if child.exitcode != 0:
        child.kill()
        raise UserError(f"{folder}: checkpoint and clips were not made within {args.limit} s (exit {child.exitcode})")
    print(f"{args.model}, workload {args.workload}, {machine()}; {folder} made in {time.monotonic() - began:.0f} s")
    print("work   GPUs  " + "  ".join(f"{name:>{width}}" for name, width in HEADINGS.items()), flush=True)
    rows = []
    for kind in args.work:
        for gpus in args.gpus:
            rows.append(measured(kind, gpus, args, folder))
            first = next(row for row in rows if row["work"] == kind)
            print(shown(rows[-1], first), flush=True)
    return rows

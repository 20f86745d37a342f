"""What a run reports: the start-up lines, run.json, metrics.jsonl, one line a step."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import METRICS, sync
from config import changed
from lora import FLAT, part_of, sizes
from model import UserError
from trackers import open_trackers

# name in metrics.jsonl, heading, format: the columns of a line
SFT_COLUMNS = (
    ("loss", "loss", "7.4f"),
    ("token_accuracy", "acc", "6.1%"),
    ("grad_norm", "gnorm", "8.3f"),
    ("lr", "lr", "8.2e"),
)
COMMON_COLUMNS = (  # wait: share of the step's time without data
    ("tokens_per_second", "tok/s", "7.0f"),
    ("gib", "GiB", "5.2f"),
    ("ms", "ms", "6.0f"),
    ("wait", "wait", "4.0%"),
)


def say(text):
    """A line on the console, above the progress bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


# At the start


def versions():
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a clone
    packages = ("torch", "transformers", "safetensors", "deepspeed", "numpy", "av")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found, "commit": commit}


def machine():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    return {**cpu, "threads": torch.get_num_threads(), "gpus": gpus, "system": platform.platform()}


def describe(run, model, total, warmup, lines):
    """The start-up lines: what differs from the defaults, precision and why, what is trained, a step's arithmetic."""
    cfg = run.cfg
    diff = " ".join(f"{name}={value}" for name, value in changed(cfg).items())
    where = f"CPU, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        where = torch.cuda.get_device_name(run.device)
    batch, micro, world = cfg.per_device_train_batch_size, cfg.gradient_accumulation_steps, run.world
    vision, merger = (cfg.learning_rate if rate is None else rate for rate in (cfg.vision_lr, cfg.merger_lr))
    yield f"{run.script}: {cfg.model_id} -> {run.folder}"
    yield f"  changed    {diff or 'nothing, all defaults'}"
    yield f"  precision  {str(run.dtype).removeprefix('torch.')} ({run.dtype_reason}); fp32 master weights; {where}"
    yield f"  trained    {'; '.join(trained_shares(model))}"
    packed = f", in micro-batches of at most {cfg.pack_tokens} tokens" if cfg.pack_tokens else ""
    yield f"  a step     {batch} samples x {micro} x {world} ranks = {batch * micro * world} samples{packed}"
    yield f"  schedule   steps {run.step + 1} to {total}, {cfg.lr_scheduler_type}, {warmup} of warm-up"
    yield f"  peak rate  llm {cfg.learning_rate:g}, vision {vision:g}, merger {merger:g}"
    yield from lines
    for text in run.notes:
        yield f"  note       {text}"


def trained_shares(model):
    """["llm 12,345 of 240,000 (5.14 %)", …] for each part, and for all."""
    counts, numbers = {"vision": [0, 0], "merger": [0, 0], "llm": [0, 0]}, sizes(model)
    for name, parameter in model.named_parameters():
        counts[part_of(name)][0] += numbers[name] * parameter.requires_grad
        counts[part_of(name)][1] += numbers[name] * (not name.endswith(FLAT))  # of the model's own
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    return [f"{part} {some:,} of {whole:,} ({100 * some / whole:.2f} %)" for part, (some, whole) in counts.items()]


def cut_after(path, step):
    """Drop the lines of later steps from a .jsonl, and a last line cut short: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    sync(temporary)
    temporary.rename(path)


# At every step


def progress(total, rank=0, **more):
    """A bar with the time left, on rank 0's terminal; nothing where output goes to a file."""
    hidden = rank > 0 or not sys.stdout.isatty()
    return tqdm(total=total, disable=hidden or None, leave=False, dynamic_ncols=True, **more)  # None: by stderr
def append(path, rows):
    """Add a line for each object to a .jsonl: all of them, or none and UserError."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size, written = file.tell(), 0
            try:
                while written < len(text):
                    written += file.write(text[written:])
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        why = f"cannot be written ({error.strerror}); the last checkpoint is intact: make room, then --resume"
        raise UserError(f"{path}: {why}") from None


class Log:
    """metrics.jsonl, a line on the console every logging_steps, a progress bar on a terminal, what --report_to names.

    Rank 0 writes; on the others every call does nothing.
    """

    def __init__(self, run, total, columns=SFT_COLUMNS):
        self.run, self.total = run, total
        self.columns = columns + COMMON_COLUMNS
        self.started, self.first = time.perf_counter(), run.step
        self.file, self.bar, self.trackers = None, None, []
        if run.rank == 0:
            self.trackers = open_trackers(run)
            self.file = run.folder / METRICS
            self.bar = progress(total, initial=run.step, unit="step")

    def write(self, step, metrics):
        """One line of metrics.jsonl, there for any reader at once. Numbers that are not finite become null."""
        if self.file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        append(self.file, [{"step": step, **clean}])
        for tracker in self.trackers:
            tracker.log(step, clean)

    def step(self, step, metrics, seconds, waited, tokens):
        """Log step 1 … total. seconds: of the whole step, `waited` of them for data; tokens: of all ranks."""
        timing = {"tokens_per_second": tokens / seconds, "gib": memory_gib(self.run.device), "ms": 1000 * seconds}
        metrics = metrics | timing | {"wait": waited / seconds}
        self.write(step, metrics)
        if self.bar is not None:
            self.bar.update()
        if self.file is not None and (step % self.run.cfg.logging_steps == 0 or step == self.total):
            say(self.line(step, metrics))

    def line(self, step, metrics):
        shown = []
        for name, heading, form in self.columns:
            value = metrics.get(name)
            width = int(form.partition(".")[0])
            shown.append(f"{heading} {'-'.rjust(width) if value is None else format(value, form)}")
        left = (time.perf_counter() - self.started) / (step - self.first) * (self.total - step)
        return f"step {step:>6}/{self.total}  {'  '.join(shown)}  eta {int(left // 60):>3}:{int(left % 60):02d}"

    def close(self):
        for thing in (self.bar, *self.trackers):
            if thing is not None:
                thing.close()


def memory_gib(device):
    """Peak so far: of the GPU's allocator, else of the process (ru_maxrss is in KiB on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

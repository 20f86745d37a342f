"""What both training loops share: the run's folder, model, log, checkpoints, resume. (Accuracy: training/evaluation.)

    run = launch(cfg)                    processes, device, the folder claimed, the checkpoint to go on from
    model = build_model(cfg, run)        base, adapter, what is trained
    engine = start(run, model, total)    DeepSpeed (training/engine.py), state put back, the run's facts told
    save(run, engine, …)                 a checkpoint, whole or absent
    finish(run)

Every step seeds the random numbers, dropout's by (seed, step, rank), a prompt's completions by (seed, step, prompt):
they do not depend on how often the run was evaluated or interrupted, completions not on the number of ranks either, and
there is no generator state to carry over.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from config import as_dict, ignored_options
from dataset.sheet import sheet
from interop.merged import copy_small_files
from interop.saved import CONFIG, TENSORS, load_adapter, save_adapter
from lora import inject, lora_layers, set_trainable
from model import UserError
from model.fast.graphs import GraphCache
from model.loading import load_model, not_finite, resolve_folder, save_model
from report import write_report
from training import checkpoint
from training.agreed import agree, agree_on_checkpoint, agree_on_start
from training.checkpoint import BEST, METRICS, RUN, STATE, read_json, write_json
from training.counting import what_was_counted
from training.engine import (
    NotFinite,
    build_engine,
    global_max,
    global_sum,
    launchers,
    leave_processes,
    load_state,
    precision,
    save_state,
    start_processes,
    updates_made,
    whole_state,
)
from training.meeting import first
from training.runlog import cut_after, describe, machine, say, versions
from training.schedule import warmup_steps
from training.trackers import TRACKERS, check_installed

LOCK, START, DATA = "run.lock", "start_adapter", "data.json"
LEFT_OVER = 1.0  # seconds
# what --overwrite removes, beside checkpoints, START and TRACKERS
OURS = (RUN, BEST, METRICS, DATA, "rollouts.jsonl", "report.html")


@dataclass
class Run:
    """One process of one training run."""

    cfg: object
    script: str
    folder: Path
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    lock: object = None  # open file: the folder is ours while it lives (rank 0)
    source: Path | None = None  # checkpoint to go on from
    adapter: Path | None = None  # adapter that the run began with
    state: dict = field(default_factory=dict)  # its trainer_state.json
    step: int = 0  # steps done
    best: dict | None = None  # {"step", "accuracy"}; where the start was judged "start_accuracy" and "below_start" too
    start_accuracy: float | None = None  # before the first step, where that was measured
    last_accuracy: float | None = None  # of the last evaluation
    bad: int = 0  # steps in a row without an update
    norms: list = field(default_factory=list)  # gradient norms of the last updates, which a spike is judged by
    loader: object = None  # of the training data: counts what it leaves out
    halved: int = 0  # times that this rank sampled in halves for lack of memory
    sample_limit: float = math.inf  # tokens that are no longer tried at once since
    launchers: tuple = ()  # processes that it ends with
    signal: int = 0  # SIGINT or SIGTERM, once it came
    handlers: dict = field(default_factory=dict)  # what took these signals before
    notes: list = field(default_factory=list)  # to tell at the start
    plan: list = field(default_factory=list)  # lines of training/plan.py, likewise

    rank = property(lambda self: torch.distributed.get_rank())
    world = property(lambda self: torch.distributed.get_world_size())
    data_rank = property(lambda self: self.rank // self.cfg.sequence_parallel)  # ranks that share batches are one here
    data_world = property(lambda self: self.world // self.cfg.sequence_parallel)

    def say(self, text):
        if self.rank == 0:
            say(text)

    def judged(self, accuracy: float | None) -> str:
        """Keep the accuracy that was measured after this step; what to add to its line. Of equals the latest is best;
        the start itself is no checkpoint, but what the best one is held against."""
        if accuracy is None:
            return ""
        self.last_accuracy = accuracy
        if self.step == 0:
            self.start_accuracy = accuracy
            return ", the start"
        if self.best is not None and accuracy < self.best["accuracy"]:
            return ""
        self.best = {"step": self.step, "accuracy": accuracy}
        if self.start_accuracy is None:
            return ", the best so far"
        below = accuracy < self.start_accuracy
        self.best |= {"start_accuracy": self.start_accuracy, "below_start": below}
        return f", the best so far, but below the start's {self.start_accuracy:.1%}" if below else ", the best so far"

    def sum(self, *values):
        return global_sum(values, self.device)

    def seed_step(self, step):
        """Random numbers of this step and rank: torch's, CPU and GPU."""
        torch.manual_seed(self.cfg.seed + 1_000_003 * (step + 1) + 7_919 * self.rank)

    def seeds(self, step, prompts, stream=0):
        """What each prompt of this step draws from: the same on any number of ranks. stream: 0, 1, … at one step."""
        seed = self.cfg.seed + 1_000_003 * (step + 1) + 15_485_863 * stream
        return [seed + 7_919 * prompt.number for prompt in prompts]

    def own_signal(self):
        """The signal that this rank was sent, SIGTERM where a launcher is gone, else 0."""
        if launchers() != self.launchers:
            self.signal = self.signal or signal.SIGTERM
        return self.signal

    def stop_requested(self, told=None):
        """The signal that any rank was sent, else 0. Every rank must ask. told: what the ranks have told each other in
        this step, which spares asking again; alone, a rank looks once more."""
        if told is None or self.world == 1:
            return int(global_max([self.own_signal()], self.device)[0])
        return told


# Start


def launch(cfg, records=(), held_out=()):
    """Processes, device, seed; the run's folder claimed; with --resume the checkpoint found.

    records, held_out: what the run is trained and judged on, which must be the same on every machine.

    Nothing in the folder is changed yet (start() does). UserError if it holds something and neither --overwrite nor
    --resume is given, or if another process trains in it.
    """
    check_installed(cfg)
    lock = first("claim", lambda: claim(Path(cfg.output_dir), cfg))
    device = start_processes()
    dtype, reason = precision(cfg, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
        repeatable(cfg.deterministic)
    torch.manual_seed(cfg.seed)  # the same on every rank: adapters start alike
    script = Path(sys.argv[0]).stem
    sys.setswitchinterval(5e-4)  # seconds; the threads that decode must not hold this one up for 5 ms at a time
    run = Run(cfg, script, Path(cfg.output_dir), device, dtype, reason, lock, launchers=launchers())
    if cfg.deterministic and device.type == "cpu":
        run.notes.append("--deterministic has no effect: on a CPU the same seed gives the same run without it")
    run.notes += agree(cfg, dtype, records, held_out)
    if cfg.resume:
        find_source(run)
    return run


def repeatable(on):
    """Choose deterministic kernels on CUDA, FlashAttention's backward pass among them, or the fastest; an operation
    that has none raises a RuntimeError with its name. The workspace is cuBLAS' rule: docs.nvidia.com/cuda/cublas,
    "Results reproducibility"; it must be set before the first product."""
    if on:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that it has not written


def claim(folder, cfg):
    """Make the folder and lock it for this process; the lock ends with the process, however it ends."""
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume: found beside --overwrite, expected one of them: go on, or start anew")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
        take(lock)
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError:
        told = f"--output_dir: another process trains in {folder} ({(folder / LOCK).read_text()})"
        raise UserError(f"{told}; wait for it or choose another") from None
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be written ({error.strerror}); choose another folder") from None
    others = sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith("."))
    if set(others) <= {RUN, DATA, START}:  # of a run that ended before its first step
        others = []
    if others and not (cfg.resume or cfg.overwrite):
        what = "a run" if RUN in others else f"other things ({', '.join(others[:3])})"
        raise UserError(f"--output_dir: {folder} already holds {what}, expected nothing; --resume or --overwrite")
    return lock


def take(lock):
    """flock, over NFS too: the machines of a run share the folder. For a moment after a process was killed, one that
    it was just starting may still hold its files."""
    end = time.monotonic() + LEFT_OVER
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def find_source(run):
    """--resume: the newest whole checkpoint, and the flags that must follow it."""
    newest = checkpoint.newest_checkpoint(run.folder) if run.rank == 0 else None
    (step,) = global_max([-1 if newest is None else checkpoint.step_of(newest)], run.device)
    if step < 0:
        run.notes.append(f"--resume: no checkpoint in {run.folder} yet, starting at the beginning")
        return
    run.source = run.folder / f"checkpoint-{int(step)}"
    agree_on_checkpoint(run.source)
    run.state = read_json(run.source / STATE)
    run.step, run.best = run.state["step"], run.state["best"]
    run.start_accuracy = run.state.get("start_accuracy")
    run.norms = run.state.get("norms", [])
    memory = run.state.get("memory") or {"halved": 0, "limit": None}
    run.halved = memory["halved"] if run.rank == 0 else 0
    run.sample_limit = math.inf if memory["limit"] is None else memory["limit"]
    keep_batch(run)
    run.notes.append(f"--resume: going on from {run.source}")
    ignore = {"resume", "overwrite", "output_dir", "gradient_accumulation_steps", "deepspeed"}
    for name, value in run.state["config"].items():
        now = as_dict(run.cfg).get(name)
        if now != value and name not in ignore:
            run.notes.append(f"--resume: {name} was {value!r} in that run and is {now!r} now")


def samples_per_step(cfg, world):
    """world: ranks, those that share batches counted as one."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps * world


def keep_batch(run):
    """On another number of ranks a resumed run keeps its samples per step: by another accumulation, or, where that does
    not come out even, by the next smaller micro-batch that does."""
    cfg, wanted = run.cfg, run.state["samples_per_step"]
    if wanted % run.data_world:
        text = f"expected a number that divides {wanted}, the samples a step of the run that is resumed"
        raise UserError(f"ranks: found {run.data_world}, {text}")
    share, given = wanted // run.data_world, cfg.per_device_train_batch_size
    cfg.per_device_train_batch_size = next(size for size in range(min(given, share), 0, -1) if share % size == 0)
    cfg.gradient_accumulation_steps = share // cfg.per_device_train_batch_size
    if cfg.per_device_train_batch_size != given:
        how = f"{cfg.per_device_train_batch_size} x {cfg.gradient_accumulation_steps} x {run.data_world} ranks"
        run.notes.append(f"--per_device_train_batch_size: {given} makes no {wanted} samples a step here, {how} does")


def build_model(cfg, run):
    """The base on its device, with the adapter of --model_ckpt or a fresh one, and exactly what the flags name trained.

    When resuming, too, it is the model as the run began: GRPO takes its reference from it. start() puts the state back.
    """
    if cfg.partition_weights or cfg.sequence_parallel > 1:
        raise UserError("--partition_weights, --sequence_parallel: removed; use --gradient_checkpointing True")
    model = load_model(cfg.model_id, run.device, run.dtype, cfg.local_files_only)
    if run.source and (run.folder / START).exists():
        run.adapter = run.folder / START
    elif run.source is None and cfg.model_ckpt is not None and cfg.lora_enable:
        run.adapter = checkpoint.find_adapter(cfg.model_ckpt, besides=run.folder, script="train_sft")
    if run.adapter:
        found = load_adapter(model, run.adapter)
        run.notes.append(f"adapter of {run.adapter}: rank {found.lora_rank}, alpha {found.lora_alpha:g}")
        own = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "num_lora_modules", "lora_namespan_exclude")
        for name in own:
            if name in cfg.given and getattr(cfg, name) != getattr(found, name):
                run.notes.append(f"--{name} has no effect: the adapter has its own")
    else:
        inject(model, cfg)
    set_trainable(model, cfg)
    if names := not_finite(model):
        where = run.adapter if names[0].endswith("adapters") else cfg.model_id
        told = f"{where}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}"
        raise UserError(f"{told}; take another checkpoint, or download it again")
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.cuda_graphs and run.device.type == "cuda":
        model.ops.graphs = GraphCache(run.say)
    return model


def start(run, model, total):
    """The engine, with the state of the checkpoint put back; the folder made ready; the start-up lines printed."""
    agree_on_start(run.cfg, run.adapter, total)
    engine, notes = build_engine(model, run.cfg, run.device, run.dtype)
    run.notes += [*notes, *ignored_options(run.cfg)]
    if run.source:
        load_state(engine, run.source, run.state["updates"])
        if run.state["loss_scale"]:
            engine.optimizer.loss_scaler.cur_scale = run.state["loss_scale"]
    if run.rank == 0:
        try:
            prepare_folder(run)
        except OSError as error:
            told = f"{run.folder}: cannot be written ({error.strerror}: {error.filename})"
            raise UserError(f"{told}; make room, or choose another --output_dir") from None
        for line in describe(run, model, total, warmup_steps(run.cfg, total)):
            run.say(line)
    watch_signals(run)
    return engine


def prepare_folder(run):
    """Remove what an overwritten run left, or what a killed run wrote after its last checkpoint; write run.json."""
    for rest in run.folder.glob(".checkpoint-*"):
        shutil.rmtree(rest)
    if run.source is None:
        keep_start_adapter(run)  # before anything is removed: it may lie in the run that is overwritten
    for folder in checkpoint.checkpoints(run.folder):
        if checkpoint.step_of(folder) > run.step:  # of an older run, or broken: the newest whole one is older
            checkpoint.remove(folder)
    if run.source is None:
        for name in OURS:
            (run.folder / name).unlink(missing_ok=True)
        for name in TRACKERS:
            shutil.rmtree(run.folder / name, ignore_errors=True)
    for name in (METRICS, "rollouts.jsonl"):
        cut_after(run.folder / name, run.step)
    if run.best:
        write_json(run.folder / BEST, run.best)
    else:
        (run.folder / BEST).unlink(missing_ok=True)  # of a checkpoint that was broken since
    checkpoint.rotate(run.folder, run.cfg.save_total_limit)  # a run killed after its last checkpoint had not come to it
    facts = {"versions": versions(), "machine": machine() | {"ranks": run.world}}
    write_json(run.folder / RUN, {"script": run.script, "command": sys.argv, "config": as_dict(run.cfg), **facts})


def tell_data(run, processor, records, held_out):
    """Write data.json: what the run is trained and judged on, for the report. A fraction of a second."""
    if run.rank == 0:
        write_json(run.folder / DATA, sheet({"train": records, "held out": held_out}, processor))


def keep_start_adapter(run):
    """Copy the adapter that the run begins with: its own run may delete it before this one is resumed."""
    beside = run.folder / f".{START}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name in (CONFIG, TENSORS) if run.adapter else ():
        shutil.copyfile(run.adapter / name, beside / name)
    shutil.rmtree(run.folder / START, ignore_errors=True)
    if run.adapter:
        beside.rename(run.folder / START)
    else:
        beside.rmdir()


def watch_signals(run):
    """SIGINT and SIGTERM end the run after its step, with a checkpoint; a second Ctrl-C ends it at once.

    The deepspeed launcher answers a Ctrl-C, which its processes get too, by sending them SIGTERM: no second one.
    """

    def note(number, _frame):
        if number == run.signal == signal.SIGINT:
            raise SystemExit(128 + number)
        if not run.signal and run.rank == 0:
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            text = f"\n{signal.Signals(number).name}: this step is finished, a checkpoint written{again}\n"
            os.write(2, text.encode())  # print() may be in the middle of another line
        run.signal = run.signal or number

    for number in (signal.SIGINT, signal.SIGTERM):
        run.handlers[number] = signal.signal(number, note)


# Checkpoints


def save(run, engine, step, loop=None):
    """Write checkpoint-{step} and best.json, delete what save_total_limit says. Every rank must call it.

    loop: what the script wants to find in run.state["loop"] when it is resumed (JSON). A full disk ends the run with
    one line; the earlier checkpoints are intact.
    """
    folder, error = run.folder / f"checkpoint-{step}", None
    counts, state = what_was_counted(run), whole_state(engine)
    if run.rank == 0:
        try:
            for path in (run.folder / METRICS, run.folder / "rollouts.jsonl"):  # a resumed run has them up to this step
                if path.exists():
                    checkpoint.sync(path)
            checkpoint.write_whole(folder, lambda beside: fill(run, engine, step, loop, counts, state, beside))
            if run.best:
                write_json(run.folder / BEST, run.best)
            checkpoint.rotate(run.folder, run.cfg.save_total_limit)
        except (OSError, SafetensorError) as found:
            error = f"cannot be written ({found}); earlier ones are intact: make room, then --resume"
        except NotFinite as found:
            error = f"is not written: {found}; earlier ones are intact: --resume, with a lower --learning_rate"
    for _ in state:  # whatever happens on rank 0: the ranks meet in every reduction of it
        pass
    if global_max([error is not None], run.device)[0]:
        if run.rank:
            raise SystemExit(2)
        raise UserError(f"{folder}: {error}")


def fill(run, engine, step, loop, counts, state, folder):
    """The files of a checkpoint."""
    cfg, model = run.cfg, engine.module
    if names := not_finite(model):
        raise NotFinite(f"{names[0]} holds NaN or Inf")
    save_state(state, folder)
    if lora_layers(model):
        save_adapter(model, folder, cfg.model_id)
    else:
        save_model(model, folder)
        copy_small_files(resolve_folder(cfg.model_id, cfg.local_files_only), folder)
    scaler = engine.optimizer.loss_scaler
    told = {
        "step": step,
        "updates": updates_made(engine),
        "best": run.best,
        "start_accuracy": run.start_accuracy,
        "samples_per_step": samples_per_step(cfg, run.data_world),
        "ranks": run.world,
        "loss_scale": scaler.cur_scale if scaler.dynamic else None,
        "loop": loop or {},
        **counts,
        "config": as_dict(cfg),
    }
    (folder / STATE).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# The end


def report(run):
    """Write report.html of the run so far; a page that cannot be written is told and ends nothing."""
    if run.rank == 0:
        try:
            write_report([run.folder], run.folder / "report.html")
        except UserError as error:
            run.say(f"report: {error}")


def against_start(run):
    """How the last evaluation stands to the one before the first step: "" where one of them was not made."""
    if None in (run.start_accuracy, run.last_accuracy) or run.step == 0:
        return ""
    end, start = run.last_accuracy, run.start_accuracy
    told = "better than" if end > start else "worse than" if end < start else "as good as"
    text = f"; {end:.1%} at the end, {start:.1%} at the start: {told} the start"
    if end < start:
        text += " (the run made it worse; try a lower --learning_rate or a larger --beta)"
    return text


def finish(run, total):
    """Tell how the run ended and leave the other ranks in order; after a signal exit with 128 + its number."""
    number = run.stop_requested()
    best = f"; best {run.best['accuracy']:.1%} at step {run.best['step']}" if run.best else ""
    best += against_start(run)
    why = f", stopped by {signal.Signals(number).name}; --resume goes on" if number else ""
    run.say(f"{run.folder}: step {run.step} of {total}{best}{why}")
    for each, handler in run.handlers.items():
        signal.signal(each, handler)
    leave_processes()
    if run.lock:
        run.lock.close()
    if number:
        raise SystemExit(128 + number)

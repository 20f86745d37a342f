"""What both training loops share: the run's folder, the model, the schedule, checkpoints, signals.

    run = launch(cfg, records, held_out)    processes, device, the folder claimed, the checkpoint to go on from
    model = build_model(cfg, run)           base, adapter, what is trained
    engine = start(run, model, total, …)    DeepSpeed ZeRO-2, state put back, the run's facts printed
    save(run, engine, …)                    a checkpoint, complete or absent
    finish(run, total)

Every step seeds the random numbers, dropout's by (seed, step, rank), a prompt's completions by (seed, step, prompt):
they do not depend on how often the run was evaluated or interrupted, completions not on the number of ranks either, and
there is no generator state to carry over.
"""

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import signal
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

import checkpoint
from adapter_files import CONFIG, TENSORS, copy_small_files, load_adapter, save_adapter
from checkpoint import BEST, METRICS, RUN, STATE, NotFiniteError, read_json, sha256, write_json
from config import as_dict, ignored_options
from data import Processor, load_tokenizer
from engine import build_engine, init_distributed, leave_processes, precision, use_deterministic_kernels
from lora import inject, lora_layers, set_trainable
from memory import summary
from model import UserError
from model.fast.graphs import GraphCache
from model.loading import ModelConfig, load_model, not_finite, resolve_folder, save_model
from model.qwen import Qwen2_5_VL
from report import write_report
from reporting.dataset import dataset_summary
from runlog import cut_after, describe, machine, say, trained_shares, versions
from trackers import TRACKERS, check_installed

LOCK, START, DATA = "run.lock", "start_adapter", "data.json"
# what --overwrite removes, beside checkpoints, START and TRACKERS
OURS = (RUN, BEST, METRICS, DATA, "rollouts.jsonl", "report.html")
# Flags that may differ between ranks: folders and files, whose contents are compared, and what a machine does its way
OWN_FLAGS = {"data_path", "eval_data_path", "image_folder", "model_id", "model_ckpt", "output_dir"}
OWN_FLAGS |= {"deepspeed", "rewards", "cache_mb", "dataloader_num_workers", "local_files_only", "report_to"}
BAD_IN_A_ROW = 5  # steps without an update, because of numbers that are not finite, that end a run
SCALING_STEPS = 25  # as many with fp16, where loss scaling starts high and falls by such steps
SPIKE, SPIKE_STEPS = 10, 16  # a gradient norm so many times the median of so many updates before is reported


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
    updates: int = 0  # steps that changed the weights
    best: dict | None = None  # {"step", "accuracy"}; where the start was judged "start_accuracy" and "below_start" too
    start_accuracy: float | None = None  # before the first step, where that was measured
    last_accuracy: float | None = None  # of the last evaluation
    bad: int = 0  # steps in a row without an update
    norms: list = field(default_factory=list)  # gradient norms of the last updates, which a spike is judged by
    loader: object = None  # of the training data: counts what it leaves out
    oom_retries: int = 0  # times that this rank sampled in halves for lack of memory
    max_sampled_tokens: float = math.inf  # as many are no longer tried at once since
    signal: int = 0  # SIGINT or SIGTERM, once it came
    handlers: dict = field(default_factory=dict)  # what took these signals before
    notes: list = field(default_factory=list)  # to print at the start
    adamw: object = None  # torch's optimizer, which DeepSpeed drives

    rank = property(lambda self: torch.distributed.get_rank())
    world = property(lambda self: torch.distributed.get_world_size())

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

    def gather_numbers(self, *values) -> torch.Tensor:
        """Numbers of every rank, (world, len(values)) float64 on the host."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return own[None]
        own = own.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(every, own)
        return torch.stack(every).cpu()

    def sum(self, *values):
        return self.gather_numbers(*values).sum(0).tolist()

    def gather(self, value):
        """[value of each rank], on every rank; anything that can be pickled."""
        if self.world == 1:
            return [value]
        every = [None] * self.world
        torch.distributed.all_gather_object(every, value)
        return every

    def seed_step(self, step):
        """Random numbers of this step and rank: torch's, CPU and GPU."""
        torch.manual_seed(self.cfg.seed + 1_000_003 * (step + 1) + 7_919 * self.rank)

    def seeds(self, step, prompts, stream=0):
        """What each prompt of this step draws from: the same on any number of ranks. stream: 0, 1, … at one step."""
        seed = self.cfg.seed + 1_000_003 * (step + 1) + 15_485_863 * stream
        return [seed + 7_919 * prompt.number for prompt in prompts]

    def stop_requested(self):
        """The signal that any rank was sent, else 0. Every rank must ask."""
        return int(self.gather_numbers(self.signal).max())


# -- Start


def launch(cfg, records=(), held_out=()):
    """Processes, device, seed; the run's folder claimed; with --resume the checkpoint found.

    records, held_out: what the run is trained and judged on, which must be the same on every rank.

    Nothing in the folder is changed yet (start() does). UserError if it holds something and neither --overwrite nor
    --resume is given, or if another process trains in it.
    """
    check_installed(cfg)
    device = init_distributed()
    lock = claim_on_first_rank(cfg)
    dtype, reason = precision(cfg, device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.tf32
        use_deterministic_kernels(cfg.deterministic)
    torch.manual_seed(cfg.seed)  # the same on every rank: adapters start alike
    sys.setswitchinterval(5e-4)  # seconds; the threads that decode must not hold this one up for 5 ms at a time
    run = Run(cfg, Path(sys.argv[0]).stem, Path(cfg.output_dir), device, dtype, reason, lock)
    if cfg.deterministic and device.type == "cpu":
        run.notes.append("--deterministic has no effect: on a CPU the same seed gives the same run without it")
    if cfg.resume:
        find_source(run)
    assert_same_across_ranks(run, records, held_out)
    return run


def claim_on_first_rank(cfg):
    """The open lock on rank 0, None on the others; where it is a user's mistake all ranks end, and rank 0 says why."""
    lock = error = None
    if torch.distributed.get_rank() == 0:
        try:
            lock = claim(Path(cfg.output_dir), cfg)
        except UserError as problem:
            error = problem
    failed = [error is not None]
    torch.distributed.broadcast_object_list(failed, src=0)
    if failed[0]:
        raise error or SystemExit(2)
    return lock


def claim(folder, cfg):
    """Make the folder and lock it for this process; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
    except BlockingIOError:
        owner = (folder / LOCK).read_text()
        problem = f"--output_dir: another process trains in {folder} ({owner})"
        raise UserError(f"{problem}; wait for it or choose another") from None
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be written ({error.strerror}); choose another folder") from None
    others = sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.startswith("."))
    if set(others) <= {RUN, DATA, START}:  # of a run that ended before its first step
        others = []
    if others and not (cfg.resume or cfg.overwrite):
        what = "a run" if RUN in others else f"other things ({', '.join(others[:3])})"
        raise UserError(f"--output_dir: {folder} already holds {what}, expected nothing; --resume or --overwrite")
    return lock


def assert_same_across_ranks(run, records, held_out):
    """UserError on rank 0, exit code 2 on all, if flags, data, code or the checkpoint differ between ranks: one hash of
    each, gathered once."""
    cfg = run.cfg
    file = lambda path: sha256(path)[:16] if path and os.path.isfile(path) else None
    facts = {
        "flags": sorted((name, str(value)) for name, value in as_dict(cfg).items() if name not in OWN_FLAGS),
        "training data": (len(records), file(cfg.data_path)),
        "held-out data": (len(held_out), file(cfg.eval_data_path)),
        "--deepspeed": file(cfg.deepspeed),
        "rewards": [file(name.rpartition(":")[0]) for name in getattr(cfg, "rewards", "").split(",")],
        "precision": str(run.dtype),
        "checkpoint to go on from": run.source and (run.source.name, file(run.source / checkpoint.MANIFEST)),
    }
    hashes = {name: hashlib.sha256(repr(value).encode()).hexdigest() for name, value in facts.items()}
    every = run.gather(hashes)
    differing = {name: [rank for rank, other in enumerate(every) if other[name] != every[0][name]] for name in hashes}
    lines = [f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in differing.items() if ranks]
    if lines:
        if run.rank:
            raise SystemExit(2)
        raise UserError(f"ranks differ from rank 0: {'; '.join(lines)}; start all with the same flags and files")


def find_source(run):
    """--resume: the newest whole checkpoint, and the flags that must follow it."""
    newest = checkpoint.newest_checkpoint(run.folder) if run.rank == 0 else None
    (newest, *_) = run.gather(newest)
    if newest is None:
        run.notes.append(f"--resume: no checkpoint in {run.folder} yet, starting at the beginning")
        return
    run.source = run.folder / newest.name
    run.state = read_json(run.source / STATE)
    run.step, run.updates, run.best = (run.state[name] for name in ("step", "updates", "best"))
    run.start_accuracy, run.norms = run.state.get("start_accuracy"), run.state["norms"]
    memory = run.state["memory"]
    run.oom_retries = memory["oom_retries"] if run.rank == 0 else 0
    run.max_sampled_tokens = math.inf if memory["max_sampled_tokens"] is None else memory["max_sampled_tokens"]
    wanted, cfg = run.state["samples_per_step"], run.cfg
    if samples_per_step(run) != wanted:
        asked = f"{cfg.per_device_train_batch_size} x {cfg.gradient_accumulation_steps} x {run.world} ranks"
        text = f"expected {wanted} samples a step as in that run, found {samples_per_step(run)} ({asked})"
        raise UserError(f"--resume: {text}; change --per_device_train_batch_size or --gradient_accumulation_steps")
    run.notes.append(f"--resume: going on from {run.source}")
    ignore = {"resume", "overwrite", "output_dir", "gradient_accumulation_steps", "per_device_train_batch_size"}
    now = as_dict(cfg)
    for name in now.keys() & run.state["config"].keys() - ignore:
        if now[name] != run.state["config"][name]:
            run.notes.append(f"--resume: {name} was {run.state['config'][name]!r} in that run and is {now[name]!r} now")


def samples_per_step(run):
    return run.cfg.per_device_train_batch_size * run.cfg.gradient_accumulation_steps * run.world


# -- Model


def dry_run(cfg, make_loader, records):
    """--dry_run: print data, steps, memory and options without effect; nothing is run or written. The weights are not
    read: config.json and the tokenizer are enough. make_loader: the trainer's own."""
    if int(os.environ.get("RANK", "0")):
        return
    folder = resolve_folder(cfg.model_id, cfg.local_files_only, weights=False)
    with torch.device("meta"):
        model = Qwen2_5_VL(ModelConfig.from_folder(folder))
    adapter = checkpoint.find_adapter(cfg.model_ckpt, besides=cfg.output_dir) if cfg.model_ckpt is not None else None
    if adapter and cfg.lora_enable:
        load_adapter(model, adapter)
    else:
        inject(model, cfg)
    set_trainable(model, cfg)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    processor = Processor(load_tokenizer(folder), model.config, cfg)
    loader = make_loader(cfg, records, processor, 0, world)
    print(f"plan of {Path(sys.argv[0]).name}: {cfg.model_id} -> {cfg.output_dir} (nothing is run or written)")
    for line in summary(model, cfg, records, processor, loader, total_steps(cfg, loader), world, 2):
        print(line)
    print(f"  trained    {'; '.join(trained_shares(model))}")
    for line in ignored_options(cfg):
        print(f"  note       {line}")


def build_model(cfg, run):
    """The base on its device, with the adapter of --model_ckpt or a fresh one, and exactly what the flags name trained.

    When resuming, too, it is the model as the run began: GRPO takes its reference from it. start() puts the state back.
    """
    model = load_model(cfg.model_id, run.device, run.dtype, cfg.local_files_only)
    if run.source and (run.folder / START).exists():
        run.adapter = run.folder / START
    elif run.source is None and cfg.model_ckpt is not None and cfg.lora_enable:
        run.adapter = checkpoint.find_adapter(cfg.model_ckpt, besides=run.folder, script="train_sft")
    if run.adapter:
        given = load_adapter(model, run.adapter)
        run.notes.append(f"adapter of {run.adapter}: rank {given.lora_rank}, alpha {given.lora_alpha:g}")
        own = ("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "num_lora_modules", "lora_namespan_exclude")
        for name in own:
            if name in cfg.given and getattr(cfg, name) != getattr(given, name):
                run.notes.append(f"--{name} has no effect: the adapter has its own")
    else:
        inject(model, cfg)
    set_trainable(model, cfg)
    if names := not_finite(model):
        where = run.adapter if names[0].endswith("adapters") else cfg.model_id
        problem = f"{where}: {len(names)} tensors hold NaN or Inf, the first: {names[0]}"
        raise UserError(f"{problem}; take another checkpoint, or download it again")
    model.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.cuda_graphs and run.device.type == "cuda":
        model.ops.graphs = GraphCache(run.say)
    return model


def start(run, model, total, lines):
    """The engine, with the state of the checkpoint put back; the folder made ready; the start-up lines printed, `lines`
    (memory.summary) among them."""
    engine, run.adamw, notes = build_engine(model, run.cfg, run.device, run.dtype)
    run.notes += [*notes, *ignored_options(run.cfg)]
    if run.source:
        checkpoint.load_state(engine, run.adamw, run.source, run.updates)
        if run.state["loss_scale"]:
            engine.optimizer.loss_scaler.cur_scale = run.state["loss_scale"]
    if run.rank == 0:
        try:
            prepare_folder(run)
        except OSError as error:
            problem = f"{run.folder}: cannot be written ({error.strerror}: {error.filename})"
            raise UserError(f"{problem}; make room, or choose another --output_dir") from None
        for line in describe(run, model, total, warmup_steps(run.cfg, total), lines):
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
    known = read_json(run.folder / RUN) if (run.folder / RUN).exists() else {}
    facts = {"id": known.get("id", secrets.token_hex(4)), "script": run.script, "command": sys.argv}
    facts |= {"config": as_dict(run.cfg), "versions": versions(), "machine": machine() | {"ranks": run.world}}
    write_json(run.folder / RUN, facts)


def describe_data(run, processor, records, held_out):
    """Write data.json: what the run is trained and judged on, for the report. A fraction of a second."""
    if run.rank == 0:
        write_json(run.folder / DATA, dataset_summary({"train": records, "held out": held_out}, processor))


def keep_start_adapter(run):
    """Copy the adapter that the run begins with: its own run may delete it before this one is resumed."""
    temporary = run.folder / f".{START}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name in (CONFIG, TENSORS) if run.adapter else ():
        shutil.copyfile(run.adapter / name, temporary / name)
    shutil.rmtree(run.folder / START, ignore_errors=True)
    if run.adapter:
        temporary.rename(run.folder / START)
    else:
        temporary.rmdir()


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


# -- Steps


def total_steps(cfg, loader):
    """Optimizer steps of the whole run."""
    return cfg.max_steps if cfg.max_steps > 0 else loader.num_steps(cfg.num_train_epochs)


def warmup_steps(cfg, total):
    return cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total)


def lr_factor(step, total, kind="cosine", warmup=0, floor=0.0):
    """Share of the peak learning rate in step 0 … total-1.

    The warm-up rises by equal amounts, from above 0 to below 1. After it, "cosine" and "linear" fall from 1 towards
    `floor`, which they would reach in step `total`; "constant" stays 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    fall = 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * fall


def set_learning_rates(engine, cfg, step, total):
    """Every group at its share of its peak, for step 0 … total-1. Returns the last group's rate: the language model's,
    if that is trained."""
    factor = lr_factor(step, total, cfg.lr_scheduler_type, warmup_steps(cfg, total), cfg.min_lr_ratio)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return engine.optimizer.param_groups[-1]["lr"]


def is_due(every, step, total):
    """Whether something that happens every so many steps (0 = only at the end) happens after step 1 … total."""
    return step == total or (every > 0 and step % every == 0)


def save_is_due(cfg, loader, step, total):
    return is_due({"steps": cfg.save_steps, "epoch": loader.steps_per_epoch, "no": 0}[cfg.save_strategy], step, total)


def check_numbers(run, step, loss, grad_norm, updated):
    """Count the update, or report that it was skipped; UserError when several in a row were. loss None: there was
    nothing to train on."""
    run.updates += updated
    if updated and loss is not None and math.isfinite(loss):
        run.bad = 0
        report_spike(run, step, grad_norm)
        return
    run.bad += 1
    why = "no answer tokens in the batch" if loss is None else f"loss {loss}, gradient norm {grad_norm}"
    run.say(f"step {step}: {why}: no update ({run.bad} in a row)")
    limit = SCALING_STEPS if run.dtype == torch.float16 else BAD_IN_A_ROW
    if run.bad >= limit:
        last = checkpoint.checkpoints(run.folder)[-1:] or ["none"]
        text = f"{run.bad} steps in a row without an update ({why})"
        raise UserError(f"{text}; stopped, last good checkpoint: {last[0]}; lower --learning_rate or look at the data")


def report_spike(run, step, grad_norm):
    """A gradient many times as large as the last ones' is reported; clipping makes its update no larger than others."""
    usual = statistics.median(run.norms) if len(run.norms) == SPIKE_STEPS else math.inf
    if grad_norm > SPIKE * usual:
        most = run.cfg.max_grad_norm
        done = f"clipped to {most:g}" if most else "not clipped, --max_grad_norm is 0"
        run.say(f"step {step}: SPIKE gradient norm {grad_norm:.3g}, {grad_norm / usual:.0f} times the usual: {done}")
    run.norms = [*run.norms, grad_norm][-SPIKE_STEPS:]


def count_left_out(run, loader):
    """What the loader leaves out is counted on from the run that is resumed."""
    run.loader = loader
    if run.source and run.state["config"].get("data_path") == run.cfg.data_path:
        loader.restore(run.state["left_out"])


def check_left_out(run, broken):
    """End the run where too much of the data is broken. broken: the ranks' loader.broken, summed; all see the same."""
    try:
        run.loader.check_share(broken)
    except UserError:
        if run.rank:
            raise SystemExit(2) from None  # one line is enough
        raise


# -- Checkpoints and the end


def save(run, engine, step, loop=None):
    """Write checkpoint-{step} and best.json, delete what save_total_limit says. Every rank must call it.

    loop: what the script wants to find in run.state["loop"] when it is resumed (JSON). A full disk ends the run with
    one line; the earlier checkpoints are intact.
    """
    folder, error = run.folder / f"checkpoint-{step}", None
    retries, limits = run.gather_numbers(run.oom_retries, run.max_sampled_tokens).T
    limit = float(limits.min())
    counts = {
        "left_out": run.gather(run.loader.state()),
        "norms": run.norms,
        "memory": {"oom_retries": int(retries.sum()), "max_sampled_tokens": None if limit == math.inf else limit},
    }
    state = checkpoint.optimizer_state(engine, run.updates)
    if run.rank == 0:
        try:
            for path in (run.folder / METRICS, run.folder / "rollouts.jsonl"):  # a resumed run has them up to this step
                if path.exists():
                    checkpoint.sync(path)
            checkpoint.write_whole(folder, lambda temporary: fill(run, engine, step, loop, counts, state, temporary))
            if run.best:
                write_json(run.folder / BEST, run.best)
            checkpoint.rotate(run.folder, run.cfg.save_total_limit)
        except (OSError, SafetensorError) as problem:
            error = f"cannot be written ({problem}); earlier ones are intact: make room, then --resume"
        except NotFiniteError as problem:
            error = f"is not written: {problem}; earlier ones are intact: --resume, with a lower --learning_rate"
    for _ in state:  # whatever happens on rank 0: the ranks meet in every reduction of it
        pass
    if run.sum(error is not None)[0]:
        if run.rank:
            raise SystemExit(2)
        raise UserError(f"{folder}: {error}")


def fill(run, engine, step, loop, counts, state, folder):
    """The files of a checkpoint."""
    cfg, model = run.cfg, engine.module
    if names := not_finite(model):
        raise NotFiniteError(f"{names[0]} holds NaN or Inf")
    checkpoint.save_state(state, folder)
    if lora_layers(model):
        save_adapter(model, folder, cfg.model_id)
    else:
        save_model(model, folder)
        copy_small_files(resolve_folder(cfg.model_id, cfg.local_files_only), folder)
    scaler = engine.optimizer.loss_scaler
    facts = {
        "step": step,
        "updates": run.updates,
        "best": run.best,
        "start_accuracy": run.start_accuracy,
        "samples_per_step": samples_per_step(run),
        "ranks": run.world,
        "loss_scale": scaler.cur_scale if scaler.dynamic else None,
        "loop": loop or {},
        **counts,
        "config": as_dict(cfg),
    }
    (folder / STATE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def report(run):
    """Write report.html of the run so far; a page that cannot be written is reported and ends nothing."""
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
    relation = "better than" if end > start else "worse than" if end < start else "as good as"
    text = f"; {end:.1%} at the end, {start:.1%} at the start: {relation} the start"
    if end < start:
        text += " (the run made it worse; try a lower --learning_rate or a larger --beta)"
    return text


def finish(run, total):
    """Print how the run ended and leave the other ranks in order; after a signal exit with 128 + its number."""
    number = run.stop_requested()
    best = f"; best {run.best['accuracy']:.1%} at step {run.best['step']}" if run.best else ""
    why = f", stopped by {signal.Signals(number).name}; --resume goes on" if number else ""
    run.say(f"{run.folder}: step {run.step} of {total}{best}{against_start(run)}{why}")
    for each, handler in run.handlers.items():
        signal.signal(each, handler)
    leave_processes()
    if run.lock:
        run.lock.close()
    if number:
        raise SystemExit(128 + number)

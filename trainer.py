"""What both training loops do at each step: learning rate, optimizer update, log line, evaluation, checkpoint, signals.

Every step seeds the random numbers, dropout's by (seed, step, rank), a prompt's completions by (seed, step, prompt):
they do not depend on how often the run was evaluated or interrupted, and there is no generator state to carry over.
"""

import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import console
import ranks
from adapter_files import copy_small_files, save_adapter
from checkpoint import BEST, METRICS, ROLLOUTS, STATE, append_lines, write_json
from config import as_dict
from data import pack
from engine import clear_gradients, leave_processes
from evaluate import progress
from lora import lora_layers
from memory import out_of_memory
from model import UserError
from model.loading import not_finite, resolve_folder, save_model
from report import write_report


@dataclass
class Run:
    """One process of one training run."""

    cfg: object
    script: str
    folder: Path
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str = ""
    rank: int = 0
    world: int = 1  # ranks
    lock: object = None  # open file: the folder is ours while it lives (rank 0)
    source: Path | None = None  # checkpoint to go on from
    state: dict = field(default_factory=dict)  # its trainer_state.json
    adapter: Path | None = None  # that the run began with
    data_hash: str | None = None  # of the training data
    question: dict | None = None  # what the training data asks, for infer.py
    loader: object = None
    sampler: object = None  # rollouts.Sampler
    plan: object = None  # memory.Plan: size of the packs, and how many blocks are recomputed
    total: int = 0  # steps of the whole run
    step: int = 0  # steps done
    rounds: int = 0  # of sampling that they took (GRPO)
    updates: int = 0  # steps that changed the weights
    bad: int = 0  # steps in a row that did not
    best: dict | None = None  # {"step", "accuracy"}
    start_accuracy: float | None = None
    last_accuracy: float | None = None
    skipped: int = 0  # samples that are left out, on all ranks together
    signal: int = 0  # SIGINT or SIGTERM, once it came
    notes: list = field(default_factory=list)  # to print at the start
    next_command: str = ""  # to print at the end

    def say(self, text):
        """A line on rank 0's console, above the progress bar if there is one."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def warn(self, text):
        self.say(console.highlight(f"warning: {text}"))

    def compare(self, accuracy: float | None) -> tuple[bool, str]:
        """Record the accuracy after this step -> (whether it is the best so far, of equals the latest; words for its
        line). The start is no checkpoint, so it is never the best."""
        if self.step == 0:
            self.start_accuracy = accuracy
            return False, ", the start"
        self.last_accuracy = accuracy
        if accuracy is None or (self.best and accuracy < self.best["accuracy"]):
            return False, ""
        self.best = {"step": self.step, "accuracy": accuracy}
        return True, ", the best checkpoint so far"


# -- One step


def seed_of(cfg, step, number, stream=0):
    """The seed of step 1 … total, for a rank or a prompt by its number, and for one of the step's streams of random
    numbers. It depends on nothing else, so a resumed run draws the same; the factors are primes of different sizes, so
    neighbouring steps, numbers and streams have different seeds."""
    return cfg.seed + 1_000_003 * (step + 1) + 7_919 * number + 15_485_863 * stream


def begin_step(run, engine, step):
    """Seed torch's random numbers by step and rank, and set the learning rates of step 1 … total. Returns the last
    parameter group's: the language model's, if that is trained."""
    cfg = run.cfg
    torch.manual_seed(seed_of(cfg, step, run.rank))
    warmup = warmup_steps(cfg, run.total)
    factor = lr_factor(step - 1, run.total, cfg.lr_scheduler_type, warmup, cfg.min_lr_ratio)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return engine.optimizer.param_groups[-1]["lr"]


def warmup_steps(cfg, total):
    return cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total)


def lr_factor(step, total, kind="cosine", warmup=0, floor=0.0):
    """Share of the peak learning rate in step 0 … total-1: a warm-up by equal amounts, from above 0 to below 1; then
    "cosine" and "linear" fall from 1 towards `floor`, which they would reach in step `total`; "constant" stays 1."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    fall = 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * fall


def update(engine, micro_batches, loss_of, num_micro_batches):
    """One optimizer step over this rank's micro-batches -> (global gradient norm before clipping, whether the weights
    were updated: not where the gradient is not finite). Every rank must call it.

    loss_of(micro_batch): its share of the loss, already divided by the count over the whole global batch.
    num_micro_batches: of the rank that has most; the others make blank passes, for DeepSpeed reduces gradients in each.
    OutOfMemoryError: in a pass, before anything was updated.
    """
    assert len(micro_batches) <= num_micro_batches, f"{len(micro_batches)} micro-batches, at most {num_micro_batches}"
    for i in range(num_micro_batches):
        engine.set_gradient_accumulation_boundary(i == num_micro_batches - 1)
        if i < len(micro_batches):
            loss = loss_of(micro_batches[i])
        else:
            loss = 0.0 * engine(pack([]).to(engine.device)).sum()
        loss = loss * (1 + 0 * loss.detach())  # a loss that is not finite must not come with gradients that are
        # the sum of losses is wanted: DeepSpeed would divide by its own accumulation, and averages over the ranks
        engine.backward(loss * ranks.world_size(), scale_wrt_gas=False)
    try:
        engine.step()
    except torch.OutOfMemoryError:
        lower = "--offload_optimizer or --lora_rank"
        raise out_of_memory(engine.device, "updating the weights", lower) from None
    if graphs := engine.module.ops.graphs:
        graphs.ready = True
    return float(engine.get_global_grad_norm()), engine.was_step_applied()


def shrink(run, engine, largest, step, repeatable=True):
    """Memory ran out in a pass of this step: clear its gradients and make run.plan smaller, so that it can be repeated.
    largest: tokens of its largest pack. UserError where a single sample is too much, or where other ranks wait."""
    plan = run.plan
    is_single = plan.pack_tokens is not None and largest > plan.pack_tokens  # a sample, or a prompt and a completion
    if run.world > 1 or not repeatable or (is_single and plan.kept == 0):
        lower = "--offload_activations, --video_max_pixels or --nframes"
        raise out_of_memory(run.device, f"training step {step} (the largest pack has {largest:,} tokens)", lower)
    plan.pack_tokens, plan.kept = largest // 2, 0
    plan.apply(engine.module)
    clear_gradients(engine)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    smaller = f"packs of at most {plan.pack_tokens:,} tokens, everything recomputed"
    run.warn(f"step {step}: out of GPU memory; it is repeated, from now on {smaller}: the same update")


def check_numbers(run, step, loss, grad_norm, updated):
    """Count the update, or report why there was none; UserError after several in a row. loss None: no answers."""
    run.updates += updated
    if updated and loss is not None and math.isfinite(loss):
        run.bad = 0
        return
    run.bad += 1
    why = "no answer tokens in the batch" if loss is None else f"loss {loss}, gradient norm {grad_norm}"
    run.warn(f"step {step}: {why}: no update ({run.bad} in a row)")
    if run.bad >= (25 if run.dtype == torch.float16 else 5):  # fp16's loss scaling starts high and falls by such steps
        last = checkpoint.checkpoints(run.folder)[-1:] or ["none"]
        problem = f"{run.bad} steps in a row without an update ({why}), last good checkpoint: {last[0]}"
        raise UserError(f"{problem}; lower --learning_rate or look at the data")


def count_skipped(run, seen):
    """How many samples are left out on all ranks together; UserError where too many are broken. seen: the sum over the
    ranks, which may know of the same ones."""
    if seen != run.skipped:
        every = ranks.gather((set(run.loader.skipped), run.loader.too_long))
        names, too_long = (set().union(*column) for column in zip(*every))
        run.skipped = len(names)
        run.loader.check_share(len(names - too_long))
    return run.skipped


# -- The log line


class Log:
    """metrics.jsonl, a line on the console every logging_steps, a progress bar on a terminal, what --report_to names.
    columns: (name in metrics.jsonl, heading, format) of the line's numbers. Only rank 0 writes."""

    def __init__(self, run, columns):
        self.run, self.columns, self.started, self.first = run, columns, None, run.step
        self.bar = progress(run.total, run.rank, initial=run.step, unit="step")
        self.trackers = [] if run.rank else [tracker(run) for tracker in console.trackers(run.cfg)]

    def write(self, step, metrics):
        """One line of metrics.jsonl, there for any reader at once. Numbers that are not finite become null."""
        if self.run.rank == 0:
            clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
            append_lines(self.run.folder / METRICS, [{"step": step, **clean}])
            for tracker in self.trackers:
                tracker.log(step, {k: v for k, v in clean.items() if isinstance(v, (int, float))})

    def step(self, step, metrics, seconds, waited, tokens):
        """Log step 1 … total. seconds: of the whole step, `waited` of them for data; tokens: of all ranks."""
        run, self.started = self.run, self.started or time.perf_counter() - seconds  # the evaluation before is no step
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process; in KiB on Linux
        if run.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(run.device)
        metrics = metrics | {"tokens_per_second": tokens / seconds, "gib": peak / 2**30}
        metrics |= {"ms": 1000 * seconds, "wait": waited / seconds}
        self.write(step, metrics)
        self.bar.update()
        if step % run.cfg.logging_steps == 0 or step == run.total:
            run.say(self.line(step, metrics))

    def line(self, step, metrics):
        """At most 100 columns; with --verbose, behind them, every other number of metrics.jsonl."""
        total = self.run.total
        shown = [f"step {step:>{len(str(total))}}/{total}"]
        for name, heading, form in self.columns:
            value = metrics.get(name)
            text = "-" if value is None else format(value, form)
            shown.append(f"{heading} {text if len(text) < 8 else format(value, '.1e'):>6}")
        left = (time.perf_counter() - self.started) / (step - self.first) * (total - step)
        shown += [f"{metrics['ms'] / 1000:.1f} s", f"left {timedelta(seconds=int(left))}"]
        if self.run.cfg.verbose:
            known = {name for name, *_ in self.columns}
            others = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k not in known}
            shown += [f"{name} {value:.4g}" for name, value in others.items()]
        return "  ".join(shown)

    def close(self):
        for each in (self.bar, *self.trackers):
            each.close()


# -- After a step: evaluation, checkpoint, end


def before_first_step(run, engine, evaluate):
    """After a signal or a kill, do what was left undone: as if it had not come."""
    if run.rank == 0:  # a run killed after its last checkpoint had not come to it
        checkpoint.rotate(run.folder, run.cfg.save_total_limit)
    if run.state.get("stopped"):
        after_step(run, engine, evaluate)
    elif run.step >= run.total:
        run.say(f"all {run.total} steps are done: nothing is left to do")


def after_step(run, engine, evaluate):
    """Do what is due after step run.step: evaluation, report page, checkpoint. Returns whether the run ends here.
    evaluate() -> whether the answers are the best so far."""
    is_due = lambda every: run.step == run.total or (every > 0 and run.step % every == 0)
    cfg, better, stop = run.cfg, False, stop_requested(run)
    if evaluate and not stop and is_due(cfg.eval_steps):
        better = evaluate()
        write_page(run)
        stop = stop_requested(run)
    every = {"steps": cfg.save_steps, "epoch": run.loader.steps_per_epoch, "no": 0}[cfg.save_strategy]
    if better or stop or is_due(every):
        save(run, engine, stop)
    return bool(stop)


def save(run, engine, stopped):
    """Write checkpoint-{step} and best.json, delete what save_total_limit says. Every rank must call it. A full disk or
    NaN ends the run with one line. stopped: by this signal; the resumed run does all of after_step once more."""
    folder, error = run.folder / f"checkpoint-{run.step}", None
    model, scaler = engine.module, engine.optimizer.loss_scaler
    retries, limits = ranks.gather_numbers(run.sampler.oom_retries, run.sampler.max_tokens).T
    names = ("step", "rounds", "updates", "best", "start_accuracy", "data_hash", "question")
    state = {name: getattr(run, name) for name in names} | {
        "global_batch": run.loader.global_batch,
        "loss_scale": scaler.cur_scale if scaler.dynamic else None,
        "skipped": ranks.gather(run.loader.state()),
        "memory": {"oom_retries": int(retries.sum()), "max_sampled_tokens": int(limits.min())},
        "plan": asdict(run.plan),
        "stopped": bool(stopped),
        "config": as_dict(run.cfg),
    }
    tensors = checkpoint.optimizer_state(engine, run.updates)

    def fill(temporary):
        if names := not_finite(model):
            raise FloatingPointError(f"{names[0]} holds NaN or Inf")
        checkpoint.save_state(tensors, temporary)
        if lora_layers(model):
            save_adapter(model, temporary, run.cfg.model_id)
        else:  # with the tokenizer and so on of its base
            save_model(model, temporary)
            copy_small_files(resolve_folder(run.cfg.model_id, run.cfg.local_files_only), temporary)
        write_json(temporary / STATE, state)

    if run.rank == 0:
        try:
            for path in (run.folder / METRICS, run.folder / ROLLOUTS):  # a resumed run has them up to this step
                if path.exists():
                    checkpoint.sync(path)
            checkpoint.write_whole(folder, fill)
            if run.best:
                write_json(run.folder / BEST, run.best)
            checkpoint.link_adapter(run.folder)
            if not stopped:
                checkpoint.rotate(run.folder, run.cfg.save_total_limit)
        except (OSError, SafetensorError, FloatingPointError) as problem:
            advice = "free some space or lower --learning_rate, then --resume"
            error = f"{folder}: cannot be written ({problem}); earlier ones are intact: {advice}"
    for _ in tensors:  # whatever happens on rank 0: the ranks meet in every reduction of it
        pass
    ranks.raise_together(error)


def write_page(run):
    """report.html of the run so far; a page that cannot be written ends nothing."""
    try:
        if run.rank == 0:
            write_report([run.folder], run.folder / "report.html")
    except UserError as error:
        run.say(f"report: {error}")


# -- Signals and the end


def watch_signals(run):
    """SIGINT and SIGTERM end the run after its step, with a checkpoint; a Ctrl-C after that ends it at once. The
    deepspeed launcher answers a Ctrl-C, which its processes get too, by sending them SIGTERM: that changes nothing."""

    def note(number, _frame):
        if run.signal and number == signal.SIGINT:
            raise SystemExit(128 + number)
        if not run.signal and run.rank == 0:
            what = "finishing this step, then writing a checkpoint; Ctrl-C quits at once"
            os.write(2, f"\n{signal.Signals(number).name}: {what}\n".encode())  # print() may be in another line
        run.signal = run.signal or number

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)


def stop_requested(run):
    """The signal that any rank was sent, else 0. Every rank must ask."""
    return int(ranks.gather_numbers(run.signal).max())


def finish(run, log):
    """Close the log, write the page, print how the run ended; after a signal exit with 128 + its number."""
    number = stop_requested(run)
    write_page(run)
    log.close()  # W&B takes the page along
    for line in console.closing_lines(run, number) if run.rank == 0 else ():
        run.say(line)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    leave_processes()
    if run.lock:
        run.lock.close()
    if number:
        raise SystemExit(128 + number)

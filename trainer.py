"""What both training loops do at each step: learning rate, optimizer update, log line, evaluation, checkpoint, signals.

What comes before the first step is startup.py. Every step seeds the random numbers, dropout's by (seed, step, rank), a
prompt's completions by (seed, step, prompt): they do not depend on how often the run was evaluated or interrupted, nor
completions on the number of ranks, and there is no generator state to carry over.
"""

import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import console
import ranks
from checkpoint import BEST, METRICS, ROLLOUTS, STATE, NotFiniteError, append_lines, write_json
from config import as_dict
from data import pack
from engine import leave_processes
from evaluate import progress
from lora import lora_layers
from memory import out_of_memory
from model import UserError
from model.loading import not_finite
from report import write_report
from trackers import open_trackers

BAD_IN_A_ROW = 5  # steps without an update, because of numbers that are not finite, that end a run
SCALING_STEPS = 25  # as many with fp16, where loss scaling starts high and falls by such steps


@dataclass
class Run:
    """One process of one training run."""

    cfg: object
    script: str
    folder: Path
    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    rank: int = 0
    world: int = 1  # ranks
    lock: object = None  # open file: the folder is ours while it lives (rank 0)
    source: Path | None = None  # checkpoint to go on from
    adapter: Path | None = None  # adapter that the run began with
    state: dict = field(default_factory=dict)  # trainer_state.json of `source`
    step: int = 0  # steps done
    total: int = 0  # steps of the whole run
    data_hash: str = ""  # of the training data's file
    question: dict | None = None  # what the training data asks, for infer.py: see reporting.dataset.data_question
    updates: int = 0  # steps that changed the weights
    best: dict | None = None  # {"step", "accuracy"}; where the start was judged "start_accuracy" and "below_start" too
    start_accuracy: float | None = None  # before the first step, where that was measured
    last_accuracy: float | None = None  # of the last evaluation
    bad: int = 0  # steps in a row without an update
    loader: object = None  # of the training data: names what it leaves out
    skipped_seen: int = 0  # len(loader.skipped) summed over the ranks: see count_skipped()
    skipped: int = 0  # samples that are left out
    sampler: object = None  # rollouts.Sampler
    plan: object = None  # memory.Plan: size of the packs, and how many blocks are recomputed
    signal: int = 0  # SIGINT or SIGTERM, once it came
    handlers: dict = field(default_factory=dict)  # what took these signals before
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
        """Record the accuracy after this step. Returns (whether it is the best so far, what to add to its line).

        Of equals the latest is best. The start itself is no checkpoint, but what the best one is compared with.
        """
        if accuracy is None:
            return False, ""
        self.last_accuracy = accuracy
        if self.step == 0:
            self.start_accuracy = accuracy
            return False, ", the start"
        if self.best is not None and accuracy < self.best["accuracy"]:
            return False, ""
        self.best = {"step": self.step, "accuracy": accuracy}
        if self.start_accuracy is None:
            return True, ", the best so far"
        below = accuracy < self.start_accuracy
        self.best |= {"start_accuracy": self.start_accuracy, "below_start": below}
        return True, ", the best so far" + (f", but below the start's {self.start_accuracy:.1%}" if below else "")

    def loop_state(self, name):
        """What the loop saved under this name in the checkpoint that the run goes on from, or None."""
        return self.state.get("loop", {}).get(name)


# -- One step


def begin_step(run, engine, step):
    """Seed torch's random numbers, CPU and GPU, by step and rank, and set every parameter group to its share of its
    peak learning rate, for step 1 … total. Returns the last group's rate: the language model's, if that is trained."""
    cfg = run.cfg
    torch.manual_seed(cfg.seed + 1_000_003 * (step + 1) + 7_919 * run.rank)
    warmup = warmup_steps(cfg, run.total)
    factor = lr_factor(step - 1, run.total, cfg.lr_scheduler_type, warmup, cfg.min_lr_ratio)
    for group in engine.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return engine.optimizer.param_groups[-1]["lr"]


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


def update(engine, micro_batches, loss_of, num_micro_batches):
    """One optimizer step over this rank's micro-batches. Every rank must call it.

    loss_of(micro_batch): the micro-batch's share of the loss, already divided by the count over the whole global batch.
    num_micro_batches: of the rank that has most. DeepSpeed reduces gradients in every backward pass, so this rank makes
    as many, the rest of them blank.
    Returns (global gradient norm before clipping, whether the update was made: False if the gradient was not finite).
    OutOfMemoryError: in a pass, before anything was updated. UserError: in the update itself.
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
        packs = [getattr(each, "packed", each) for each in micro_batches]
        lower = "--offload_optimizer or --lora_rank"
        raise out_of_memory(engine.device, "updating the weights", packs, lower) from None
    return float(engine.get_global_grad_norm()), engine.was_step_applied()


def check_numbers(run, step, loss, grad_norm, updated):
    """Count the update, or report that it was skipped; UserError when several in a row were. loss None: there was
    nothing to train on."""
    run.updates += updated
    if updated and loss is not None and math.isfinite(loss):
        run.bad = 0
        return
    run.bad += 1
    why = "no answer tokens in the batch" if loss is None else f"loss {loss}, gradient norm {grad_norm}"
    run.warn(f"step {step}: {why}: no update ({run.bad} in a row)")
    limit = SCALING_STEPS if run.dtype == torch.float16 else BAD_IN_A_ROW
    if run.bad >= limit:
        last = checkpoint.checkpoints(run.folder)[-1:] or ["none"]
        text = f"{run.bad} steps in a row without an update ({why})"
        raise UserError(f"{text}; stopped, last good checkpoint: {last[0]}; lower --learning_rate or look at the data")


def count_skipped(run, seen):
    """How many samples are left out on all ranks together; ends the run where too many are broken. Every rank must call
    it.

    seen: len(loader.skipped) summed over the ranks. A sample may be skipped on several, so where the sum changed they
    gather the names.
    """
    if seen != run.skipped_seen:
        run.skipped_seen = seen
        every = ranks.gather((set(run.loader.skipped), run.loader.too_long))
        names, too_long = (set().union(*column) for column in zip(*every))
        run.skipped = len(names)
        try:
            run.loader.check_share(len(names - too_long))
        except UserError:
            if run.rank:
                raise SystemExit(2) from None  # one line is enough
            raise
    return run.skipped


# -- The log line


class Log:
    """metrics.jsonl, a line on the console every logging_steps, a progress bar on a terminal, what --report_to names.

    columns: (name in metrics.jsonl, heading, format) of the line's numbers. Rank 0 writes; on the others every call
    does nothing.
    """

    def __init__(self, run, columns):
        self.run, self.columns = run, columns
        self.started, self.first = time.perf_counter(), run.step
        self.bar = progress(run.total, run.rank, initial=run.step, unit="step")
        self.trackers = [] if run.rank else open_trackers(run)

    def write(self, step, metrics):
        """One line of metrics.jsonl, there for any reader at once. Numbers that are not finite become null."""
        if self.run.rank:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        append_lines(self.run.folder / METRICS, [{"step": step, **clean}])
        for tracker in self.trackers:
            tracker.log(step, clean)

    def step(self, step, metrics, seconds, waited, tokens, warnings=(), lines=()):
        """Log step 1 … total. seconds: of the whole step, `waited` of them for data; tokens: of all ranks. warnings and
        lines: shown below the step's."""
        timing = {"tokens_per_second": tokens / seconds, "gib": memory_gib(self.run.device), "ms": 1000 * seconds}
        metrics = metrics | timing | {"wait": waited / seconds}
        self.write(step, metrics)
        self.bar.update()
        if step % self.run.cfg.logging_steps == 0 or step == self.run.total:
            self.run.say(self.line(step, metrics))
        for text in warnings:
            self.run.warn(f"step {step}: {text}")
        for text in lines:
            self.run.say(f"step {step:>6}  {text}")

    def line(self, step, metrics):
        """At most 100 columns; with --verbose, behind them, every other number of metrics.jsonl."""
        total = self.run.total
        shown = [f"step {step:>{len(str(total))}}/{total}"]
        for name, heading, form in self.columns:
            value = metrics.get(name)
            text = "-" if value is None else format(value, form)
            shown.append(f"{heading} {text if len(text) < 8 else format(value, '.1e'):>6}")
        left = (time.perf_counter() - self.started) / (step - self.first) * (total - step)
        shown += [f"{metrics['ms'] / 1000:.1f} s", f"left {duration(left)}"]
        if self.run.cfg.verbose:
            known = {name for name, *_ in self.columns}
            others = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and k not in known}
            shown += [f"{name} {value:.4g}" for name, value in others.items()]
        return "  ".join(shown)

    def close(self):
        for thing in (self.bar, *self.trackers):
            thing.close()


def duration(seconds):
    """12:38, 3h12 or 5d03h."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes % 60:02}" if hours else f"{minutes}:{int(seconds % 60):02}"


def memory_gib(device):
    """Peak so far: of the GPU's allocator, else of the process (ru_maxrss is in KiB on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# -- After a step: evaluation, checkpoint, end


def is_due(every, step, total):
    """Whether something that happens every so many steps (0 = only at the end) happens after step 1 … total."""
    return step == total or (every > 0 and step % every == 0)


def save_is_due(run):
    cfg = run.cfg
    every = {"steps": cfg.save_steps, "epoch": run.loader.steps_per_epoch, "no": 0}[cfg.save_strategy]
    return is_due(every, run.step, run.total)


def before_first_step(run, engine, evaluate, judge_start=False):
    """Evaluate the start, where that is wanted, or what a signal left undone: the run is then as if it had not come."""
    if evaluate and run.loop_state("evaluation_due"):
        if evaluate() or save_is_due(run):
            save(run, engine, run.state["loop"] | {"evaluation_due": False})
        return
    if evaluate and judge_start and run.step == 0:
        evaluate()
    if run.rank == 0:  # a run killed after its last checkpoint had not come to it
        checkpoint.rotate(run.folder, run.cfg.save_total_limit)


def after_step(run, engine, evaluate, loop=None):
    """Do what is due after step run.step: evaluation, report page, checkpoint. Returns whether the run ends here.

    evaluate(): logs answer accuracy and returns whether it is the best so far; None where there is nothing to judge.
    loop: what the script wants back when the run is resumed.
    """
    better, evaluation_due = False, evaluate is not None and is_due(run.cfg.eval_steps, run.step, run.total)
    stop = stop_requested(run)
    if evaluation_due and not stop:
        better, evaluation_due = evaluate(), False
        write_page(run)
        stop = stop_requested(run)
    if better or stop or save_is_due(run):
        only_for_stop = not better and not save_is_due(run)
        save(run, engine, (loop or {}) | {"evaluation_due": evaluation_due}, stop, only_for_stop)
    return bool(stop)


def save(run, engine, loop, stop=False, only_for_stop=False):
    """Write checkpoint-{step} and best.json, delete what save_total_limit says. Every rank must call it.

    stop: a signal came; what is deleted depends on an evaluation that may be due, so it waits for the resumed run.
    only_for_stop: without the signal there would be no checkpoint here.
    A full disk ends the run with one line; the earlier checkpoints are intact.
    """
    folder, error = run.folder / f"checkpoint-{run.step}", None
    facts = run_facts(run, engine, loop) | {"only_for_stop": only_for_stop}
    state = checkpoint.optimizer_state(engine, run.updates)

    def fill(temporary):
        if names := not_finite(engine.module):
            raise NotFiniteError(f"{names[0]} holds NaN or Inf")
        checkpoint.save_state(state, temporary)
        checkpoint.save_weights(engine.module, temporary, run.cfg, whole=not lora_layers(engine.module))
        (temporary / STATE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    if run.rank == 0:
        try:
            for path in (run.folder / METRICS, run.folder / ROLLOUTS):  # a resumed run has them up to this step
                if path.exists():
                    checkpoint.sync(path)
            checkpoint.write_whole(folder, fill)
            if run.best:
                write_json(run.folder / BEST, run.best)
            checkpoint.link_adapter(run.folder)
            if not stop:
                checkpoint.rotate(run.folder, run.cfg.save_total_limit)
        except (OSError, SafetensorError) as problem:
            error = f"cannot be written ({problem}); earlier ones are intact: free some space, then --resume"
        except NotFiniteError as problem:
            error = f"is not written: {problem}; earlier ones are intact: --resume, with a lower --learning_rate"
    for _ in state:  # whatever happens on rank 0: the ranks meet in every reduction of it
        pass
    ranks.raise_together(error and f"{folder}: {error}")


def run_facts(run, engine, loop):
    """trainer_state.json: what a resumed run needs besides weights and optimizer state."""
    scaler = engine.optimizer.loss_scaler
    retries, limits = ranks.gather_numbers(run.sampler.oom_retries, run.sampler.max_tokens).T
    return {
        "step": run.step,
        "updates": run.updates,
        "best": run.best,
        "start_accuracy": run.start_accuracy,
        "samples_per_step": samples_per_step(run),
        "data_hash": run.data_hash,
        "question": run.question,
        "ranks": run.world,
        "loss_scale": scaler.cur_scale if scaler.dynamic else None,
        "skipped": ranks.gather(run.loader.state()),
        "memory": {"oom_retries": int(retries.sum()), "max_sampled_tokens": int(limits.min())},
        "plan": asdict(run.plan),
        "loop": loop,
        "config": as_dict(run.cfg),
    }


def samples_per_step(run):
    return run.cfg.per_device_train_batch_size * run.cfg.gradient_accumulation_steps * run.world


def write_page(run):
    """Write report.html of the run so far; a page that cannot be written is reported and ends nothing."""
    if run.rank == 0:
        try:
            write_report([run.folder], run.folder / "report.html")
        except UserError as error:
            run.say(f"report: {error}")


# -- Signals and the end


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


def stop_requested(run):
    """The signal that any rank was sent, else 0. Every rank must ask."""
    return int(ranks.gather_numbers(run.signal).max())


def finish(run, log):
    """Close the log, write the page, print how the run ended; after a signal exit with 128 + its number."""
    write_page(run)
    log.close()  # W&B takes the page along
    number = stop_requested(run)
    if run.rank == 0:
        for line in console.closing_lines(run, number):
            run.say(line)
    for each, handler in run.handlers.items():
        signal.signal(each, handler)
    leave_processes()
    if run.lock:
        run.lock.close()
    if number:
        raise SystemExit(128 + number)

"""Supervised fine-tuning: the model learns to give the dataset's answers. Read it from top to bottom.

    python train_sft.py                                        the embedded model on data/synthetic_videos
    deepspeed train_sft.py --config configs/qwen_3b_sft_24gb.py     all GPUs of the machine
    deepspeed --num_gpus 2 train_sft.py                        two processes, on a CPU too
    python train_sft.py --output_dir output/video_lora --resume

loss = - sum of log p(answer token) / number of answer tokens, both over the whole global batch: how it is cut into
micro-batches and ranks changes nothing.
"""

# ruff: noqa: E402
from config import SFT, cli, parse

if __name__ == "__main__":
    cli(lambda: parse(SFT), each_rank=False)  # before torch is imported: a mistyped flag is told at once

import time
from functools import partial

import torch

from bench.flops import training_flops
from data import Loader, Processor, load_tokenizer, pack, read_records
from model.loading import resolve_folder
from model.qwen import IGNORE, target_logprobs
from trainer import (
    build_model,
    finish,
    launch,
    report,
    save,
    start,
    tell_data,
)
from training.counting import Tally, check_left_out, check_numbers, keep_count
from training.engine import update
from training.evaluation import answerable, evaluate, evaluation_facts, held_out_records
from training.full import told_when_full
from training.groups import ROLLOUTS
from training.meeting import together
from training.plan import brief, dry_run
from training.runlog import Log, append
from training.schedule import is_due, saved_every, schedule, total_steps


@together
def main():
    cfg = parse(SFT)
    records = read_records(cfg.data_path)
    held_out, left_out = answerable(cfg, "held-out", held_out_records(cfg), most=1.0)  # free text is no task to grade
    if cfg.dry_run:
        return dry_run(cfg, "train_sft.py", make_loader, records, held_out)
    run = launch(cfg, records, held_out)
    run.notes += left_out
    model = build_model(cfg, run)
    tokenizer = load_tokenizer(resolve_folder(cfg.model_id, cfg.local_files_only))
    processor = Processor(tokenizer, model.config, cfg)
    loader = make_loader(run, records, processor)
    keep_count(run, loader)
    total = total_steps(cfg, loader)
    run.plan = brief(run, model, processor, records, loader, held_out)
    run.notes.append(f"{len(records)} samples, {loader.steps_per_epoch} steps an epoch; {len(held_out)} held out")
    engine = start(run, model, total)
    tell_data(run, processor, records, held_out)
    log, tally, seconds = Log(run, total), Tally(run, engine), 0.0
    batches = loader.iterate(run.step, total)

    for step in range(run.step + 1, total + 1):
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began

        # one update: every rank goes through its micro-batches, the gradients are summed, AdamW steps once
        run.seed_step(step)
        lr = schedule(engine, cfg, step - 1, total)
        tally.start(*count(micro_batches), seconds)
        loss_of = partial(micro_loss, engine, tally.answers, tally.sums)
        with told_when_full(run, f"training step {step}", micro_batches):
            grad_norm, updated = update(engine, micro_batches, loss_of, len(micro_batches), tally.send)
        found = tally.read()
        loss = found.mean(found.loss)
        check_left_out(run, found.broken)
        check_numbers(run, step, loss, grad_norm, updated)

        run.step, seconds = step, time.perf_counter() - began
        metrics = {"epoch": step / loader.steps_per_epoch, "loss": loss, "token_accuracy": found.mean(found.right)}
        metrics |= {"grad_norm": grad_norm if found.answers else None, "lr": lr, "updated": updated}
        metrics |= {"answer_tokens": found.answers, "skipped": found.left_out}
        if run.world > 1:
            metrics |= {"idle": found.idle, "traffic": found.traffic}
        log.step(step, metrics, seconds, waited, found.tokens)

        # answer accuracy, checkpoint, end
        better, stop = False, run.stop_requested(found.signal)
        if held_out and not stop and is_due(cfg.eval_steps, step, total):
            better = evaluate_and_tell(run, model, processor, held_out, log)
            report(run)
            stop = run.stop_requested()
        if better or stop or is_due(saved_every(cfg, loader), step, total):
            save(run, engine, step)
        if stop:
            break

    log.close()
    report(run)
    finish(run, total)


def make_loader(run, records, processor):
    """Batches of this rank; of ranks that share them, the part that is this one's."""
    cfg = run.cfg
    tower = (cfg.lora_enable and cfg.vision_lora) or not cfg.freeze_vision_tower
    cost = partial(training_flops, processor.config, tower=tower)
    at = {"rank": run.data_rank, "world_size": run.data_world, "readers": cfg.sequence_parallel}
    collate = partial(pack, pin=torch.cuda.is_available())
    return Loader(records, processor, cfg, **at, collate=collate, cost=cost)


def micro_loss(engine, answers, sums, packed):
    """One micro-batch's share of the loss. answers: answer tokens of the global batch. Adds to sums what is logged.

    Without any in the global batch it is NaN, and so are the gradients: the update is skipped, on all ranks alike.
    """
    model, weight = engine.module, 1.0
    rows = (packed.targets != IGNORE).nonzero()[:, 0]  # only these go through the head
    if not len(rows) and len(packed.targets):  # a rank that shares a short batch may have no token of it
        rows, weight = torch.zeros(1, dtype=torch.int64), 0.0
    packed, rows = packed.to(engine.device), rows.to(engine.device, non_blocking=True)  # nothing waits for the GPU
    hidden = engine(packed, rows=rows)  # (N, C)
    targets = packed.targets[rows].clamp(min=0)
    logprobs, _, right = target_logprobs(hidden, model.head_weight, targets, with_entropy=False)
    sums += weight * torch.stack([-logprobs.detach().sum(), right.sum()])
    return -weight * logprobs.sum() / answers


def count(micro_batches):
    """(answer tokens, all tokens) of this rank's share of a step."""
    return sum(int((m.targets != IGNORE).sum()) for m in micro_batches), sum(len(m.input_ids) for m in micro_batches)


def evaluate_and_tell(run, model, processor, held_out, log):
    """Log answer accuracy after this step; True if it is the best so far (of equals the latest)."""
    began = time.perf_counter()
    found = evaluate(run, model, processor, held_out)
    seconds, accuracy = time.perf_counter() - began, found.accuracy
    verdict = run.judged(accuracy)
    if found.count:
        text = f"answers right: {accuracy:.1%} of {found.count} held-out samples{verdict}  ({seconds:.1f} s)"
        run.say(f"step {run.step:>6}  {text}")
    told = {"eval_accuracy": accuracy, "eval_count": found.count, "eval_seconds": seconds}
    log.write(run.step, told | {"evaluation": evaluation_facts(run, model, processor, held_out, found, log.total)})
    if run.rank == 0:
        append(run.folder / ROLLOUTS, found.rows)
    log.rollouts(run.step, found.rows)
    return run.best is not None and run.best["step"] == run.step


if __name__ == "__main__":
    cli(main)

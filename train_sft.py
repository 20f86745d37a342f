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
    cli(lambda: parse(SFT))  # before torch is imported, so that --help and a mistyped flag answer at once

import time
from functools import partial

import torch

from data import Loader, Processor, load_tokenizer, read_records
from model.loss import IGNORE, target_logprobs
from model.qwen2_5_vl import resolve_folder
from trainer import (
    build_model,
    check_left_out,
    check_numbers,
    finish,
    is_due,
    keep_count,
    launch,
    report,
    save,
    schedule,
    start,
    tell_data,
    total_steps,
)
from training.engine import update
from training.evaluation import answerable, evaluate, evaluation_facts, held_out_records
from training.full import told_when_full
from training.groups import ROLLOUTS
from training.meeting import together
from training.plan import brief, dry_run
from training.runlog import Log, append


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
    log = Log(run, total)
    batches = loader.iterate(run.step, total)

    for step in range(run.step + 1, total + 1):
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began

        # one update: every rank goes through its micro-batches, the gradients are summed, AdamW steps once
        run.seed_step(step)
        lr = schedule(engine, cfg, step - 1, total)
        answers, tokens, skipped, broken = run.sum(*count(micro_batches), loader.left_out, loader.broken)
        check_left_out(run, broken)
        sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # of -log p, and of tokens guessed right
        loss = accuracy = grad_norm = None
        updated = False
        if answers:
            loss_of = partial(micro_loss, engine, answers, sums)
            with told_when_full(run, f"training step {step}", micro_batches):
                grad_norm, updated = update(engine, micro_batches, loss_of)
            loss, accuracy = (x / answers for x in run.sum(*sums.tolist()))
        check_numbers(run, step, loss, grad_norm, updated)

        run.step = step
        metrics = {"epoch": step / loader.steps_per_epoch, "loss": loss, "token_accuracy": accuracy}
        metrics |= {"grad_norm": grad_norm, "lr": lr, "updated": updated, "answer_tokens": answers, "skipped": skipped}
        log.step(step, metrics, time.perf_counter() - began, waited, tokens)

        # answer accuracy, checkpoint, end
        better = False
        if held_out and is_due(cfg.eval_steps, step, total):
            better = evaluate_and_tell(run, model, processor, held_out, log)
            report(run)
        stop = run.stop_requested()
        every = {"steps": cfg.save_steps, "epoch": loader.steps_per_epoch, "no": 0}[cfg.save_strategy]
        if better or stop or is_due(every, step, total):
            save(run, engine, step)
        if stop:
            break

    log.close()
    report(run)
    finish(run, total)


def make_loader(run, records, processor):
    return Loader(records, processor, run.cfg, rank=run.rank, world_size=run.world)


def micro_loss(engine, answers, sums, packed):
    """One micro-batch's share of the loss. answers: answer tokens of the global batch. Adds to sums what is logged."""
    model = engine.module
    rows = (packed.targets != IGNORE).nonzero()[:, 0]  # only these go through the head
    packed, rows = packed.to(engine.device), rows.to(engine.device)
    hidden = engine(packed, rows=rows)  # (N, C)
    logprobs, _, right = target_logprobs(hidden, model.head_weight, packed.targets[rows], with_entropy=False)
    sums += torch.stack([-logprobs.detach().sum(), right.sum()])
    return -logprobs.sum() / answers


def count(micro_batches):
    """(answer tokens, all tokens) of this rank's share of a step."""
    return sum(int((m.targets != IGNORE).sum()) for m in micro_batches), sum(len(m.input_ids) for m in micro_batches)


def evaluate_and_tell(run, model, processor, held_out, log):
    """Log answer accuracy after this step; True if it is the best so far (of equals the latest)."""
    began = time.perf_counter()
    found = evaluate(run, model, processor, held_out)
    seconds, accuracy = time.perf_counter() - began, found.accuracy
    better = accuracy is not None and (run.best is None or accuracy >= run.best["accuracy"])
    if better:
        run.best = {"step": run.step, "accuracy": accuracy}
    if found.count:
        mark = ", the best so far" if better else ""
        text = f"answers right: {accuracy:.1%} of {found.count} held-out samples{mark}  ({seconds:.1f} s)"
        run.say(f"step {run.step:>6}  {text}")
    told = {"eval_accuracy": accuracy, "eval_count": found.count, "eval_seconds": seconds}
    log.write(run.step, told | {"evaluation": evaluation_facts(run, model, processor, held_out, found, log.total)})
    if run.rank == 0:
        append(run.folder / ROLLOUTS, found.rows)
    log.rollouts(run.step, found.rows)
    return better


if __name__ == "__main__":
    cli(main)

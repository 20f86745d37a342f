"""Supervised fine-tuning: the model learns to give the dataset's answers. Read it from top to bottom.

    python train_sft.py                                        the tiny model on the dataset made last
    deepspeed train_sft.py --config configs/3b_sft.py          all GPUs of the machine
    deepspeed --num_gpus 2 train_sft.py                        two processes, on a CPU too
    python train_sft.py --output_dir output/video_lora --resume

loss = - sum of log p(answer token) / number of answer tokens, both over the whole global batch: how it is cut into
micro-batches and ranks changes nothing.
"""

# ruff: noqa: E402
from config import SFT, cli, parse

if __name__ == "__main__":
    cli(lambda: parse(SFT), each_rank=False)  # before torch is imported: a mistyped flag is reported at once

import time
from functools import partial

import torch

import ranks
import trainer
from data import pack, read_records
from evaluate import answerable, evaluate_and_log, held_out_records
from latest import follow
from loader import Loader
from model.packed import IGNORE
from model.qwen import target_logprobs
from startup import build_model, dry_run, launch, start

# Of the console's line: name in metrics.jsonl, heading, format
COLUMNS = (("loss", "loss", ".4f"), ("token_accuracy", "token acc", ".1%"))


def main():
    cfg = follow(parse(SFT))
    records = read_records(cfg.data_path)
    held_out, notes = answerable(cfg, "held-out", held_out_records(cfg), strict=False)  # free text is no task to grade
    if cfg.dry_run:
        return dry_run(cfg, make_loader, records)
    run = launch(cfg, records, held_out, notes)
    model, processor = build_model(run)
    loader = make_loader(cfg, records, processor, run.rank, run.world)
    engine = start(run, model, processor, loader, records, held_out)
    log = trainer.Log(run, COLUMNS)
    evaluate = partial(evaluate_and_log, run, log, held_out) if held_out else None
    trainer.before_first_step(run, engine, evaluate)

    batches = loader.iterate(run.step, run.total)
    for step in range(run.step + 1, run.total + 1):
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began

        # one update: every rank goes through its micro-batches, the gradients are summed, AdamW steps once
        lr = trainer.begin_step(run, engine, step)
        counts = ranks.gather_numbers(*count_tokens(micro_batches), len(micro_batches))  # (world, 3)
        answer_tokens, tokens, _ = counts.sum(0).tolist()
        sums, grad_norm, updated = torch.zeros(2), None, False
        if answer_tokens:  # 0: nothing to learn from, on all ranks alike
            sums, grad_norm, updated = learn(run, engine, micro_batches, int(counts[:, 2].max()), answer_tokens, step)
        loss, right, seen = ranks.add(*sums.tolist(), len(loader.skipped))
        loss, right = (loss / answer_tokens, right / answer_tokens) if answer_tokens else (None, None)
        trainer.check_numbers(run, step, loss, grad_norm, updated)
        skipped = trainer.count_skipped(run, seen)

        run.step, seconds = step, time.perf_counter() - began
        metrics = {"epoch": step / loader.steps_per_epoch, "loss": loss, "token_accuracy": right, "lr": lr}
        metrics |= {"grad_norm": grad_norm, "updated": updated, "answer_tokens": int(answer_tokens), "skipped": skipped}
        log.step(step, metrics, seconds, waited, int(tokens))
        if trainer.after_step(run, engine, evaluate):
            break
    trainer.finish(run, log)


def make_loader(cfg, records, processor, rank, world):
    """Packed micro-batches of this rank."""
    collate = partial(pack, pin=torch.cuda.is_available())
    return Loader(records, processor, cfg, rank=rank, world_size=world, collate=collate)


def count_tokens(micro_batches):
    """(answer tokens, all tokens) of this rank's share of a step."""
    return sum(int((m.targets != IGNORE).sum()) for m in micro_batches), sum(len(m.input_ids) for m in micro_batches)


def learn(run, engine, micro_batches, most, answer_tokens, step):
    """One update -> (sums, gradient norm, whether it was made); repeated with smaller packs where memory runs out.
    sums (2,): -log p of this rank's answer tokens, and how many are right. most: micro-batches of the fullest rank."""
    while True:
        sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        loss_of = partial(micro_loss, engine, answer_tokens, sums)
        try:
            return sums, *trainer.update(engine, micro_batches, loss_of, most)
        except torch.OutOfMemoryError:
            largest = max((len(packed.input_ids) for packed in micro_batches), default=0)
        trainer.shrink(run, engine, largest, step)  # outside of that clause nothing holds the pass's tensors any more
        run.loader.pack_tokens = run.plan.pack_tokens
        micro_batches = run.loader.packs()
        most = len(micro_batches)


def micro_loss(engine, answer_tokens, sums, packed):
    """One micro-batch's share of the loss. answer_tokens: of the global batch. Adds to sums what is logged."""
    rows = (packed.targets != IGNORE).nonzero()[:, 0]  # only these go through the head
    packed = packed.to(engine.device)
    hidden, rows = engine(packed, rows=rows), rows.to(engine.device, non_blocking=True)  # (N, C)
    head = engine.module.head_weight
    logprobs, _, right = target_logprobs(hidden, head, packed.targets[rows], with_entropy=False)
    sums += torch.stack([-logprobs.detach().sum(), right.sum()])
    return -logprobs.sum() / answer_tokens


if __name__ == "__main__":
    cli(main)

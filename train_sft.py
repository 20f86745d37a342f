"""Supervised fine-tuning: the model learns to give the dataset's answers. Read it from top to bottom.

    python train_sft.py                                        the tiny model on data/synthetic_videos
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

from data import Loader, Processor, load_tokenizer, pack, read_records
from engine import update
from evaluate import answerable, evaluate, evaluation_facts, held_out_records
from memory import out_of_memory, settings_for_update, summary
from model.loading import resolve_folder
from model.packed import IGNORE
from model.qwen import target_logprobs
from rollouts import ROLLOUTS
from runlog import Log, append
from trainer import (
    build_model,
    check_left_out,
    check_numbers,
    count_left_out,
    describe_data,
    dry_run,
    finish,
    is_due,
    launch,
    report,
    save,
    save_is_due,
    set_learning_rates,
    start,
    total_steps,
)


def main():
    cfg = parse(SFT)
    records = read_records(cfg.data_path)
    held_out, left_out = answerable(cfg, "held-out", held_out_records(cfg), most=1.0)  # free text is no task to grade
    if cfg.dry_run:
        return dry_run(cfg, make_loader, records)
    run = launch(cfg, records, held_out)
    run.notes += left_out
    model = build_model(cfg, run)
    tokenizer = load_tokenizer(resolve_folder(cfg.model_id, cfg.local_files_only))
    processor = Processor(tokenizer, model.config, cfg)
    loader = make_loader(cfg, records, processor, run.rank, run.world)
    count_left_out(run, loader)
    total = total_steps(cfg, loader)
    lines = [] if run.rank else list(summary(model, cfg, records, processor, loader, total, run.world, 2))
    run.notes.append(f"{len(records)} samples, {loader.steps_per_epoch} steps an epoch; {len(held_out)} held out")
    engine = start(run, model, total, lines)
    describe_data(run, processor, records, held_out)
    log = Log(run, total)
    batches = loader.iterate(run.step, total)
    if held_out and run.state.get("loop", {}).get("evaluation_due"):  # a signal came before it
        evaluate_and_log(run, model, processor, held_out, log)

    for step in range(run.step + 1, total + 1):
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began

        # one update: every rank goes through its micro-batches, the gradients are summed, AdamW steps once
        run.seed_step(step)
        lr = set_learning_rates(engine, cfg, step - 1, total)
        own = *count(micro_batches), len(micro_batches), loader.left_out, loader.broken, run.signal
        counts = run.gather_numbers(*own)  # (world, 6)
        answers, tokens, _, skipped, broken, _ = counts.sum(0).tolist()
        sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # -log p of answer tokens, and how many are right
        grad_norm, updated = None, False
        try:
            if answers:  # else there is nothing to learn from, on all ranks alike
                loss_of, passes = partial(micro_loss, engine, answers, sums), int(counts[:, 2].max())
                grad_norm, updated = update(engine, micro_batches, loss_of, passes)
        except torch.OutOfMemoryError:
            settings = settings_for_update(cfg, micro_batches, run.device.type == "cuda")
            then = "the last checkpoint is intact, --resume goes on from it"
            raise out_of_memory(run.device, f"training step {step}", micro_batches, settings, then) from None
        loss, right = (total_of / answers if answers else None for total_of in run.sum(*sums.tolist()))
        check_left_out(run, broken)
        check_numbers(run, step, loss, grad_norm, updated)

        run.step, seconds = step, time.perf_counter() - began
        metrics = {"epoch": step / loader.steps_per_epoch, "loss": loss, "token_accuracy": right}
        metrics |= {"grad_norm": grad_norm, "lr": lr, "updated": updated}
        metrics |= {"answer_tokens": int(answers), "skipped": skipped}
        log.step(step, metrics, seconds, waited, int(tokens))

        # answer accuracy, checkpoint, end
        better, stop = False, int(counts[:, 5].max()) if run.world > 1 else run.signal
        if held_out and not stop and is_due(cfg.eval_steps, step, total):
            better = evaluate_and_log(run, model, processor, held_out, log)
            report(run)
            stop = run.stop_requested()
        if better or stop or save_is_due(cfg, loader, step, total):
            save(run, engine, step, {"evaluation_due": bool(stop) and is_due(cfg.eval_steps, step, total)})
        if stop:
            break

    log.close()
    report(run)
    finish(run, total)


def make_loader(cfg, records, processor, rank, world):
    """Packed micro-batches of this rank."""
    collate = partial(pack, pin=torch.cuda.is_available())
    return Loader(records, processor, cfg, rank=rank, world_size=world, collate=collate)


def micro_loss(engine, answers, sums, packed):
    """One micro-batch's share of the loss. answers: answer tokens of the global batch. Adds to sums what is logged."""
    model = engine.module
    rows = (packed.targets != IGNORE).nonzero()[:, 0]  # only these go through the head
    packed, rows = packed.to(engine.device), rows.to(engine.device, non_blocking=True)  # nothing waits for the GPU
    hidden = engine(packed, rows=rows)  # (N, C)
    logprobs, _, right = target_logprobs(hidden, model.head_weight, packed.targets[rows], with_entropy=False)
    sums += torch.stack([-logprobs.detach().sum(), right.sum()])
    return -logprobs.sum() / answers


def count(micro_batches):
    """(answer tokens, all tokens) of this rank's share of a step."""
    return sum(int((m.targets != IGNORE).sum()) for m in micro_batches), sum(len(m.input_ids) for m in micro_batches)


def evaluate_and_log(run, model, processor, held_out, log):
    """Log answer accuracy after this step; True if it is the best so far (of equals the latest)."""
    began = time.perf_counter()
    result = evaluate(run, model, processor, held_out)
    seconds, accuracy = time.perf_counter() - began, result.accuracy
    verdict = run.judged(accuracy)
    if result.count:
        text = f"answers right: {accuracy:.1%} of {result.count} held-out samples{verdict}  ({seconds:.1f} s)"
        run.say(f"step {run.step:>6}  {text}")
    facts = {"eval_accuracy": accuracy, "eval_count": result.count, "eval_seconds": seconds}
    log.write(run.step, facts | {"evaluation": evaluation_facts(run, model, processor, held_out, result, log.total)})
    if run.rank == 0:
        append(run.folder / ROLLOUTS, result.rows)
    return run.best is not None and run.best["step"] == run.step


if __name__ == "__main__":
    cli(main)

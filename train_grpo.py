"""GRPO: sample groups of completions -> score them -> advantages in each group -> update. Read it from top to bottom.

    python train_grpo.py                                         goes on from the newest adapter under output/
    deepspeed train_grpo.py --config configs/qwen_3b_grpo_24gb.py     all GPUs of the machine
    python train_grpo.py --rewards accuracy,format,my_rewards.py:brief --reward_weights 1,0.2,0.5
    python train_grpo.py --output_dir output/grpo_video_lora --resume

A clip goes through the same preprocessing and positions when its group is sampled, in the update, and in infer.py. In
sampling and in the update alike the prompt stands once for its G completions. training/grpo.py has the mathematics,
training/groups.py what is told of the completions, training/dealing.py how several ranks share a step.

Beside DeepSpeed's gradients, the ranks meet twice a step: they gather all completions with their rewards once these
are sampled, and add up the update's sums, sent before AdamW's step and read when the host has waited for the gradient
norm. (Each further update of --num_iterations adds one such sum; an evaluation and a checkpoint have their own.)
"""

# ruff: noqa: E402
from config import GRPO, cli, parse

if __name__ == "__main__":
    cli(lambda: parse(GRPO), each_rank=False)  # before torch is imported: a mistyped flag is told at once

import copy
import math
import time
from functools import cache, partial
from pathlib import Path

import torch

from data import Processor, load_tokenizer, read_records
from lora import disabled, lora_layers, reference, reference_snapshot
from model import UserError
from model.decode import Sampling
from model.loading import resolve_folder
from model.qwen import target_logprobs
from reporting.rollouts import telling_rows
from rewards import load_rewards
from trainer import (
    build_model,
    finish,
    launch,
    report,
    save,
    start,
    tell_data,
)
from training.checkpoint import STATE, find_adapter, read_json
from training.counting import check_left_out, check_numbers, keep_count
from training.dealing import SAMPLED_TOKENS, Clock, PromptLoader, Sums, exchange, share_of_update, to_sample
from training.engine import update
from training.evaluation import answerable, evaluate, evaluation_facts, held_out_records, prompt_batches
from training.full import sample, told_when_full
from training.groups import (
    ROLLOUTS,
    Alarm,
    Rollout,
    best_and_worst,
    columns,
    needs_shuffled,
    reward_metrics,
    row,
    score_group,
    token_metrics,
)
from training.grpo import group_advantages, grpo_loss, k3, loss_normalizer
from training.meeting import together
from training.passes import micro_batch, micro_batches
from training.plan import brief, dry_run
from training.runlog import Log, append
from training.schedule import is_due, saved_every, schedule, total_steps


@together
def main():
    cfg = parse(GRPO)
    rewards = load_rewards(cfg.rewards, cfg.reward_weights)
    records, held_out, told = data_of(cfg)
    if cfg.dry_run:
        return dry_run(cfg, "train_grpo.py", prompt_loader, records, held_out, SAMPLED_TOKENS)
    run = launch(cfg, records, held_out)
    run.notes += told
    model = build_model(cfg, run)
    frozen = freeze_reference(model, cfg)
    processor = Processor(load_tokenizer(resolve_folder(cfg.model_id, cfg.local_files_only)), model.config, cfg)
    loader = prompt_loader(run, records, processor)
    keep_count(run, loader)
    total = total_steps(cfg, loader)
    run.plan = brief(run, model, processor, records, loader, held_out, SAMPLED_TOKENS)
    run.notes += notes(run, loader, records, held_out)
    engine = start(run, model, total)
    tell_data(run, processor, records, held_out)
    log, clock = Log(run, total, columns(rewards)), Clock(run, engine)
    alarm = Alarm(run.state.get("loop", {}).get("alarm"))
    batches = loader.iterate(run.step, total)
    if held_out and run.step == 0:
        evaluate_and_tell(run, model, processor, held_out, log)

    for step in range(run.step + 1, total + 1):
        began = clock.begin()
        units = next(batches)
        waited = time.perf_counter() - began

        # sample a group of completions for each prompt and score them; then all ranks know them all
        run.seed_step(step)
        found = roll_out(run, model, processor, loader, rewards, step, units, clock)
        health, counts = compare_within_groups(run, found.groups, groups_per_step(cfg) * run.world)
        sampled = time.perf_counter()

        # update the policy with the groups that differ within themselves
        lr = schedule(engine, cfg, step - 1, total)
        metrics, rows, told = learn(run, engine, frozen, loader, found, counts, step)

        run.step, seconds = step, clock.end()
        metrics |= health | found.told | {"lr": lr, "epoch": step / loader.steps_per_epoch}
        metrics |= {"rollout_seconds": sampled - began - waited, "update_seconds": began + seconds - sampled}
        log.step(step, metrics, seconds, waited, metrics["prompt_tokens"] + metrics["completion_tokens"])
        show(run, log, alarm, step, metrics, found.groups, rows)

        # answer accuracy, checkpoint, end
        better, stop = False, run.stop_requested(told)
        if held_out and not stop and is_due(cfg.eval_steps, step, total):
            better = evaluate_and_tell(run, model, processor, held_out, log)
            report(run)
            stop = run.stop_requested()
        if better or stop or is_due(saved_every(cfg, loader), step, total):
            save(run, engine, step, {"alarm": alarm.state})
        if stop:
            break

    log.close()
    report(run)
    finish(run, total)


# Start


def data_of(cfg):
    """(records to train on, held-out ones, lines to tell)"""
    told = follow_adapter(cfg)
    records, left_out = answerable(cfg, "training", read_records(cfg.data_path))
    held_out, held_left_out = answerable(cfg, "held-out", held_out_records(cfg))
    return records, held_out, told + left_out + held_left_out


def follow_adapter(cfg):
    """Where no data is named and the default is not there: the data that the adapter was trained on. Lines to tell."""
    if "data_path" in cfg.given or Path(cfg.data_path).exists() or cfg.model_ckpt is None:
        return []
    adapter = find_adapter(cfg.model_ckpt, script="train_sft")
    if adapter is None or not (adapter / STATE).exists():
        return []
    cfg.data_path = read_json(adapter / STATE)["config"]["data_path"]
    return [f"--data_path {cfg.data_path}, which the adapter was trained on"]


def groups_per_step(cfg):
    """Groups that one rank trains on in a step."""
    size = cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps
    if size % cfg.num_generations:  # checked with the flags, but a resumed run may have changed its accumulation
        text = f"found {size} completions a rank and step, expected a multiple of num_generations {cfg.num_generations}"
        raise UserError(f"--per_device_train_batch_size: {text}; resume on fewer ranks")
    return size // cfg.num_generations


def prompt_loader(run, records, processor):
    """Prompts of each step: `oversample` times as many as are trained on, on any number of ranks."""
    plain = copy.copy(run.cfg)
    plain.gradient_accumulation_steps, plain.pack_tokens = 1, None  # those cut the update, not the sampling
    size = math.ceil(groups_per_step(run.cfg) * run.world * run.cfg.oversample)
    return PromptLoader(records, processor, plain, rank=run.rank, world_size=run.world, global_batch=size)


def notes(run, loader, records, held_out):
    cfg, trained = run.cfg, groups_per_step(run.cfg) * run.world
    if run.adapter is None:
        yield "no adapter to go on from: a new one on the base" if cfg.lora_enable else "trains the base itself"
    yield f"{len(records)} samples, {loader.steps_per_epoch} steps an epoch; {len(held_out)} held out"
    yield f"a step samples {loader.global_batch} prompts x {cfg.num_generations} and trains on {trained} groups of them"


def freeze_reference(model, cfg):
    """-> frozen: inside `with frozen():` the model is the reference. None if beta is 0.

    It is called before a checkpoint's state is put back, so it is the policy as the run began, also in a resumed run.
    Dropout is off from now on: the policy that is updated is the one that was sampled.
    """
    for _, layer in lora_layers(model):
        layer.dropout = 0.0
    if cfg.beta == 0:
        return None
    if cfg.reference == "base":
        return partial(disabled, model)
    return partial(reference, model, reference_snapshot(model))


# Sampling


def roll_out(run, model, processor, loader, rewards, step, units, clock):
    """A group of completions for each prompt of the step, scored -> dealing.Found. units: this rank's prompts."""
    done, failed = [], []
    for prompts in to_sample(run, loader, step, units, failed):
        groups = sample_groups(run, model, processor, prompts, run.seeds(step, prompts))
        shuffled = sample_shuffled(run, model, processor, prompts, rewards, step)
        for prompt, group, texts in zip(prompts, groups, shuffled, strict=True):
            score_group(rewards, prompt, group, texts, run.cfg.max_completion_length)
        done += zip(prompts, groups, strict=True)
    return exchange(run, loader, step, done, failed, clock)


def sample_groups(run, model, processor, prompts, seeds, count=None):
    """Completions of each prompt under the policy as it is: a list of groups of Rollouts. seeds: one a prompt, so
    that it does not matter which prompts a rank has, or samples together. count: num_generations."""
    cfg, count = run.cfg, count or run.cfg.num_generations
    stop = (processor.im_end, processor.token_id("<|endoftext|>"))
    sampling = Sampling(cfg.max_completion_length, cfg.temperature, cfg.top_k, cfg.top_p, stop_ids=stop)
    longest = max(map(len, prompts), default=1)
    # all prompts count as long as the longest one, their completions as long as they may get
    budget = SAMPLED_TOKENS * longest // (longest + count * cfg.max_completion_length)
    groups = []
    for batch in prompt_batches(prompts, budget):
        mine = seeds[len(groups) : len(groups) + len(batch)]
        for completions in sample(run, model, batch, sampling, count, "sampling", mine):
            texts = [processor.backend.decode(c.ids, skip_special_tokens=True) for c in completions]
            told = zip(completions, texts, strict=True)
            groups.append([Rollout(len(groups), c.ids, c.logprobs, c.finished, text) for c, text in told])
    return groups


def sample_shuffled(run, model, processor, prompts, rewards, step):
    """Texts of half as many completions of each prompt with its frames in random order; None where no reward asks."""
    if not needs_shuffled(rewards):
        return [None] * len(prompts)
    examples = [processor.encode(prompt.record, answer=False, control="shuffled") for prompt in prompts]
    seeds = run.seeds(step, prompts, stream=1)
    groups = sample_groups(run, model, processor, examples, seeds, max(1, run.cfg.num_generations // 2))
    return [[rollout.text for rollout in group] for group in groups]


# Rewards and advantages


def compare_within_groups(run, groups, wanted):
    """Advantages of the Rollouts of all ranks' groups; the `wanted` groups whose rewards differ most are marked as
    trained.

    A group whose rewards are all equal teaches nothing and is not trained, but it counts where the loss is divided: or
    the last few groups that differ would get the whole step. Returns the metrics of everything that was sampled, and
    (tokens, completions) of the `wanted` groups.
    """
    if not groups:
        return {"completion_tokens": 0, "groups_trained": 0}, (0, 0)
    everyone = [rollout for group in groups for rollout in group]
    rewards = torch.tensor([rollout.reward for rollout in everyone], dtype=torch.float64)
    index = torch.arange(len(groups)).repeat_interleave(run.cfg.num_generations)
    advantages, std = group_advantages(rewards, index, run.cfg.scale_rewards)
    wanted = std.argsort(descending=True, stable=True)[:wanted].tolist()
    sound = [all(rollout.sound for rollout in group) for group in groups]
    chosen = {number for number in wanted if std[number] > 0 and sound[number]}
    lost = sum(not rollout.sound for rollout in everyone)
    if lost:
        told = f"{lost} of {len(rewards)} completions have log-probs that are not finite"
        run.say(f"{told}: their groups are not trained on")
    for rollout, number, advantage in zip(everyone, index.tolist(), advantages.tolist(), strict=True):
        rollout.advantage, rollout.trained = advantage, number in chosen
    counted = [rollout for number in wanted for rollout in groups[number]]
    counts = sum(len(rollout.ids) for rollout in counted if rollout.kept(run.cfg)), len(counted)
    return reward_metrics(groups, std.tolist()) | {"groups_trained": len(chosen)}, counts


# The update


def learn(run, engine, frozen, loader, found, counts, step):
    """KL of what was sampled, and the updates with the groups that were chosen -> (metrics, rows of rollouts.jsonl,
    signal that a rank was sent). counts: (tokens, completions) that the loss is divided by."""
    cfg, model, fair = run.cfg, engine.module, max(1, groups_per_step(run.cfg) * run.world // 4)
    share, untrained, passes = share_of_update(run, model.config, loader, found, range(min(fair, len(found.groups))))
    batches = [micro_batch(found.prompts, rollouts, cfg) for rollouts in share]
    everyone = [rollout for group in found.groups for rollout in group]
    tokens = float(sum(len(rollout.ids) for rollout in everyone if rollout.trained and rollout.kept(cfg)))
    metrics, rows, sums = {"grad_norm": None, "updated": False, "trained_tokens": tokens}, [], Sums(run)

    def send():  # while a GPU is busy with the passes the host has time to write
        sums.send()
        rows.extend(write_rollouts(run, step, loader, found))

    with told_when_full(run, f"training step {step}", [batch.packed for batch in batches]):
        batches = [batch.to(run.device) for batch in batches]
        reference_pass(run, model, frozen, found.prompts, untrained, batches, fair, sums)
        if tokens:
            metrics |= train_on(run, engine, batches, counts, step, passes, sums, send)
        else:  # no group differs within itself: told by the alarm, and no fault of the numbers
            send()
    total = sums.read()
    check_left_out(run, found.broken)
    if not tokens and not all(rollout.sound for rollout in everyone):  # the model itself may be beyond repair
        check_numbers(run, step, math.nan, math.nan, updated=False)
    return metrics | token_metrics(cfg, total), rows, total["signal"]


def reference_pass(run, model, frozen, prompts, untrained, batches, fair, sums):
    """Put the reference's log-probs into the batches that are trained on, and add up what tells the KL to it.

    The KL is that over the first `fair` groups as they were sampled, a quarter as many as a step trains on: the groups
    trained on are no fair sample; chosen for rare outcomes, they show a KL many times too large. untrained: those of
    them that are not in the batches.
    """
    if not frozen:
        return
    for batch in (*batches, *(batch.to(run.device) for batch in micro_batches(prompts, untrained, run.cfg))):
        with torch.no_grad(), frozen():
            batch.ref = token_logprobs(model, model, batch, run.cfg)[0]
        counted = batch.group[batch.completion] < fair
        sums["fair_kl"] += (k3(batch.ref - batch.sampler) * counted).sum().double()
        sums["fair_tokens"] += counted.sum()


def train_on(run, engine, batches, counts, step, passes, sums, send):
    """num_iterations updates with the same rollouts. counts: (tokens, completions) that the loss is divided by; passes:
    of the rank that has most; send(): called in the last update instead of sums.send. Returns metrics."""
    cfg, before = run.cfg, 0.0
    normalizer = loss_normalizer(cfg.aggregation, *counts, cfg.max_completion_length)
    loss_of = partial(micro_loss, engine, cfg, normalizer, sums)
    for left in reversed(range(cfg.num_iterations)):
        grad_norm, updated = update(engine, batches, loss_of, passes, sums.send if left else send)
        loss = sums.read()["loss"]
        check_numbers(run, step, loss - before, grad_norm, updated)
        before = loss
    return {"grad_norm": grad_norm, "updated": updated}


def token_logprobs(forward, model, batch, cfg):
    """Log-probs (N,) of the completions' tokens, with gradient, and entropies (N,): as they are sampled, without the
    vision tokens. forward: the model itself, or the engine around it."""
    banned = torch.tensor(model.config.vision_token_ids, device=batch.rows.device)
    hidden = forward(batch.packed, rows=batch.rows)  # (N, C)
    targets = batch.packed.targets[batch.rows]
    return target_logprobs(hidden, model.head_weight, targets, cfg.temperature, banned)[:2]


def micro_loss(engine, cfg, normalizer, sums, batch):
    """One micro-batch's share of the loss. Adds to sums what is logged."""
    logprobs, entropy = token_logprobs(engine, engine.module, batch, cfg)
    if cfg.num_iterations > 1 and batch.old is None:  # no update has been made yet: this is the policy that sampled
        batch.old = logprobs.detach()
    loss, metrics = grpo_loss(
        logprobs, batch.advantages, batch.completion, normalizer, old_logprobs=batch.old, ref_logprobs=batch.ref,
        sampler_logprobs=batch.sampler, entropy=entropy, keep=batch.keep, epsilon=cfg.epsilon,
        epsilon_high=cfg.epsilon_high, beta=cfg.beta, use_bias_correction_kl=cfg.use_bias_correction_kl,
        aggregation=cfg.aggregation, importance_sampling_level=cfg.importance_sampling_level,
        sampler_is_cap=cfg.sampler_is_cap,
    )  # fmt: skip
    gap = metrics.pop("sampler_gap_max")
    sums["sampler_gap_max"] = torch.maximum(gap, sums.get("sampler_gap_max", gap))  # nothing here waits for the GPU
    for name, value in (metrics | {"loss": loss.detach()}).items():
        sums[name] += value
    return loss


# What one sees


def write_rollouts(run, step, loader, found):
    """Append every completion of the step, of all ranks, to rollouts.jsonl. Returns what was written (rank 0)."""
    if run.rank:
        return []
    spell = cache(lambda token: loader.processor.backend.decode([token], skip_special_tokens=False))
    records = [loader.records[x.number] for x in found.sampled]
    rows = [row(step, records[k], rollout, spell) for k, group in enumerate(found.groups) for rollout in group]
    append(run.folder / ROLLOUTS, rows)
    return rows


def show(run, log, alarm, step, metrics, groups, rows):
    """Alarms, and every log_completions steps some completions."""
    seen = []
    if run.cfg.log_completions and step % run.cfg.log_completions == 0:
        seen = best_and_worst(groups)
        log.rollouts(step, telling_rows(rows))
    for text in [*(f"ALARM {text}" for text in alarm.look(step, metrics)), *seen]:
        run.say(f"step {step:>6}  {text}")


def evaluate_and_tell(run, model, processor, held_out, log):
    """Log answer accuracy after this step, greedy and sampled; True if the greedy one is the best so far (of equals the
    latest)."""
    began = time.perf_counter()
    greedy = evaluate(run, model, processor, held_out)
    sampled = evaluate(run, model, processor, held_out, run.cfg.temperature, run.cfg.seed)
    seconds, accuracy, count = time.perf_counter() - began, greedy.accuracy, greedy.count
    verdict = run.judged(accuracy)
    if count and sampled.count:
        text = f"answers right: {accuracy:.1%} greedy, {sampled.accuracy:.1%} sampled, of {count} held-out samples"
        run.say(f"step {run.step:>6}  {text}{verdict}  ({seconds:.1f} s)")
    told = {"eval_accuracy": accuracy, "eval_sampled_accuracy": sampled.accuracy, "eval_count": count}
    told["evaluation"] = evaluation_facts(run, model, processor, held_out, greedy, log.total)
    log.write(run.step, told | {"eval_seconds": seconds})
    return run.best is not None and run.best["step"] == run.step


if __name__ == "__main__":
    cli(main)

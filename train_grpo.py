"""GRPO: sample groups of completions -> score them -> advantages in each group -> update. Read it from top to bottom.

    python train_grpo.py                                         goes on from the SFT run made last
    deepspeed train_grpo.py --config configs/3b_grpo.py     all GPUs of the machine
    python train_grpo.py --rewards accuracy,format,my_rewards.py:brief --reward_weights 1,0.2,0.5
    python train_grpo.py --output_dir output/grpo_video_lora --resume

A clip goes through the same preprocessing and positions when its group is sampled, in the update, and in infer.py. In
sampling and in the update alike the prompt stands once for its G completions. grpo.py has the mathematics, rollouts.py
the completions.

Several ranks: each samples the groups of its own prompts, all completions are gathered with their rewards, each rank
trains on its own groups as far as that is even, and one reduction adds up what is logged.
"""

# ruff: noqa: E402
from config import GRPO, cli, parse

if __name__ == "__main__":
    cli(lambda: parse(GRPO), each_rank=False)  # before torch is imported: a mistyped flag is reported at once

import copy
import math
import time
from collections import Counter
from functools import cache, partial

import torch

import ranks
import trainer
from checkpoint import ROLLOUTS, append_lines
from data import read_records
from evaluate import answerable, evaluate_and_log, held_out_records
from grpo import group_advantages, grpo_loss, k3, loss_normalizer
from latest import follow
from loader import Loader
from lora import disabled, lora_layers, reference, reference_snapshot
from memory import out_of_memory, smaller_update
from model.decode import Sampling
from model.qwen import target_logprobs
from rewards import can_shuffle, load_rewards, try_rewards
from rollouts import (
    Alarm,
    Group,
    assign,
    best_and_worst,
    columns,
    cut,
    differs,
    micro_batch,
    needs_shuffled,
    reward_metrics,
    row,
    score_group,
    token_metrics,
)
from startup import build_model, dry_run, launch, start

# Prompt and completion tokens sampled together: their keys and values take 4.8 GB at the 3B shape
# (36 layers x 2 x 2 heads x 128 numbers x 2 bytes a token).
SAMPLED_TOKENS = 131_072
# What an update adds up over its micro-batches and ranks, for metrics.jsonl
SUMS = ("sampled_kl", "sampled_tokens", "loss", "tokens", "ratio", "clip_low", "clip_high", "entropy", "kl",
        "sampler_gap", "sampler_capped")  # fmt: skip


def main():
    cfg = follow(parse(GRPO))
    rewards = load_rewards(cfg.rewards, cfg.reward_weights)
    records, left_out = answerable(cfg, "training", read_records(cfg.data_path))
    held_out, held_left_out = answerable(cfg, "held-out", held_out_records(cfg))
    try_rewards(rewards, records[0])
    if cfg.dry_run:
        return dry_run(cfg, make_loader, records)
    run = launch(cfg, records, held_out, left_out + held_left_out)
    model, processor = build_model(run)
    frozen = freeze_reference(model, cfg)
    loader = make_loader(cfg, records, processor, run.rank, run.world)
    run.notes += notes_of(run, loader)
    engine = start(run, model, processor, loader, records, held_out)
    log, alarm = trainer.Log(run, columns(rewards)), Alarm(run.loop_state("alarm"))
    evaluate = partial(evaluate_and_log, run, log, held_out, sampled=True) if held_out else None
    if evaluate and (run.step == 0 or run.loop_state("evaluation_due")):  # due when a signal stopped the run
        evaluate()
        trainer.write_best(run)

    done = {"rounds": run.loop_state("rounds") or run.step}  # of sampling, each with the next prompts of the dataset
    batches = loader.iterate(done["rounds"])
    for step in range(run.step + 1, run.total + 1):
        began = time.perf_counter()
        trainer.seed_step(run, step)

        # sample a group of completions for each prompt and score them, until enough groups differ within themselves
        groups, examples, rounds, waited = sample_step(run, rewards, batches, step)
        health, normalizer = compare_within_groups(run, groups)
        sampled = time.perf_counter()

        # update the policy with the groups that the step counts
        lr = trainer.set_learning_rates(run, engine, step)
        learned = learn(run, engine, frozen, groups, examples, normalizer, step)
        known, retries = ranks.add(len(loader.skipped), run.sampler.oom_retries)
        skipped = trainer.left_out(run, known)

        run.step, seconds = step, time.perf_counter() - began
        done["rounds"] += rounds
        metrics = learned | health | {"rounds": rounds, "skipped": skipped, "oom_retries": retries, "lr": lr}
        metrics["epoch"] = done["rounds"] / loader.steps_per_epoch
        metrics |= {"rollout_seconds": sampled - began - waited, "update_seconds": began + seconds - sampled}
        write_rollouts(run, groups)
        log.step(step, metrics, seconds, waited, metrics["prompt_tokens"] + metrics["completion_tokens"])
        show(run, alarm, metrics, groups)
        if trainer.after_step(run, engine, evaluate, done | {"alarm": alarm.state}):
            break
    trainer.finish(run, log)


# -- Start


def groups_per_step(cfg):
    """Groups that one rank trains on in a step."""
    return cfg.per_device_train_batch_size * cfg.gradient_accumulation_steps // cfg.num_generations


def make_loader(cfg, records, processor, rank, world):
    """This rank's prompts of each round of sampling, one list: as many as a step trains on."""
    plain = copy.copy(cfg)
    plain.gradient_accumulation_steps, plain.pack_tokens = 1, None  # those cut the update, not the sampling
    options = {"rank": rank, "world_size": world, "answer": False, "collate": list}
    return Loader(records, processor, plain, global_batch=groups_per_step(cfg) * world, **options)


def notes_of(run, loader):
    cfg = run.cfg
    if run.adapter is None:
        yield "no adapter to go on from: a new one on the base" if cfg.lora_enable else "trains the base itself"
    yield f"a step samples {loader.global_batch} prompts x {cfg.num_generations}, at most {1 + cfg.max_resample} times"


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


# -- Sampling


def sample_step(run, rewards, batches, step):
    """Rounds of sampling until groups_per_step groups of every rank together differ in accuracy, or max_resample more
    rounds were made (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2).

    Returns the groups of all ranks in the order of their prompts, {number of the group: Example} of this rank's, the
    rounds, and the seconds that data was waited for.
    """
    wanted, groups, examples, waited = groups_per_step(run.cfg) * run.world, [], {}, 0.0
    for number in range(1 + run.cfg.max_resample):
        began = time.perf_counter()
        (prompts,) = next(batches)
        waited += time.perf_counter() - began
        own = roll_out(run, rewards, step, number, prompts)
        first = len(groups)
        for rank, theirs in enumerate(ranks.gather(own)):
            if rank == run.rank:
                examples |= zip(range(len(groups), len(groups) + len(theirs)), prompts, strict=True)
            for group in theirs:
                group.set_number(len(groups), rank)
                groups.append(group)
        if len(groups) == first or sum(map(differs, groups)) >= wanted:  # no prompt could be read; enough
            break
    return groups, examples, number + 1, waited


def roll_out(run, rewards, step, number, prompts):
    """A Group of scored completions for each of this rank's prompts. number: of the round."""
    cfg = run.cfg
    groups = sample_groups(run, prompts, seeds(run, step, prompts, 2 * number))
    shuffled = [None] * len(prompts)
    if needs_shuffled(rewards):
        shuffled = sample_shuffled(run, prompts, seeds(run, step, prompts, 2 * number + 1))
    for prompt, rollouts, texts in zip(prompts, groups, shuffled, strict=True):
        score_group(rewards, prompt, rollouts, texts, cfg.max_completion_length)
    return [Group(prompt.number, len(prompt), rollouts) for prompt, rollouts in zip(prompts, groups, strict=True)]


def seeds(run, step, prompts, stream):
    """What each prompt of this step draws from: the same on any number of ranks. stream: 0, 1, … at one step."""
    seed = run.cfg.seed + 1_000_003 * (step + 1) + 15_485_863 * stream
    return [seed + 7_919 * prompt.number for prompt in prompts]


def sample_groups(run, prompts, seeds, count=None):
    """Completions of each prompt under the policy as it is: a list of lists of Rollouts. seeds: one a prompt, so
    that it does not matter which prompts a rank has, or samples together. count: num_generations."""
    cfg, sampler, count = run.cfg, run.sampler, count or run.cfg.num_generations
    limit = cfg.max_completion_length
    sampling = Sampling(limit, cfg.temperature, cfg.top_k, cfg.top_p, stop_ids=sampler.stop_ids)
    # all prompts count as long as the longest one, their completions as long as they may get
    size = max(1, SAMPLED_TOKENS // (max(map(len, prompts), default=1) + count * limit))
    groups = []
    for first in range(0, len(prompts), size):
        batch = slice(first, first + size)
        for completions in sampler(prompts[batch], sampling, count, seeds[batch]):
            groups.append([sampler.rollout(len(groups), completion) for completion in completions])
    return groups


def sample_shuffled(run, prompts, seeds):
    """Texts of half as many completions of each prompt with its frames in random order; None where there is no order to
    change: a text, a picture, a clip of two frames."""
    able = [k for k, prompt in enumerate(prompts) if can_shuffle(prompt.grid_thw)]
    encode = partial(run.sampler.processor.encode, answer=False, control="shuffled")
    examples = [encode(prompts[k].record) for k in able]
    groups = sample_groups(run, examples, [seeds[k] for k in able], max(1, run.cfg.num_generations // 2))
    texts = {k: [rollout.text for rollout in group] for k, group in zip(able, groups, strict=True)}
    return [texts.get(k) for k in range(len(prompts))]


# -- Advantages


def compare_within_groups(run, groups):
    """Advantages of all Rollouts, and which groups the step counts: as many as it has prompts in one round, those first
    that differ in accuracy, then those that differ in their reward alone, then the rest.

    The loss is divided by what is counted: or the last few groups that differ would get the whole step. With a KL every
    counted group is trained on, for the policy may drift where rewards are equal too; without it a group whose rewards
    are equal has no gradient. Returns the metrics of everything that was sampled, and the loss' normalizer.
    """
    cfg = run.cfg
    if not groups:
        return {"prompt_tokens": 0, "completion_tokens": 0, "groups_differing": 0, "groups_counted": 0}, 1
    everyone = [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([rollout.reward for rollout in everyone], dtype=torch.float64)
    index = torch.arange(len(groups)).repeat_interleave(cfg.num_generations)
    advantages, std = group_advantages(rewards, index, cfg.scale_rewards)
    for rollout, advantage in zip(everyone, advantages.tolist(), strict=True):
        rollout.advantage = advantage
    priority = lambda group: 0 if differs(group) else 1 if std[group.number] > 0 else 2
    counted = sorted(groups, key=priority)[: groups_per_step(cfg) * run.world]  # of equals the first
    for group in counted:
        group.trained = (std[group.number] > 0 or cfg.beta > 0) and all(rollout.finite for rollout in group.rollouts)
    lost = sum(not rollout.finite for rollout in everyone)
    if lost:
        problem = f"{lost} of {len(rewards)} completions have log-probs that are not finite"
        run.say(f"{problem}: their groups are not trained on")
    completions = [rollout for group in counted for rollout in group.rollouts]
    tokens = sum(len(rollout.ids) for rollout in completions if rollout.unmasked(cfg))
    normalizer = loss_normalizer(cfg.aggregation, tokens, len(completions), cfg.max_completion_length)
    metrics = {"groups_counted": len(counted), "groups_differing": sum(map(differs, groups))}
    return reward_metrics(groups, std.tolist()) | metrics, normalizer


# -- The update


def learn(run, engine, frozen, groups, examples, normalizer, step):
    """Updates with the groups that are trained on -> metrics. examples: {number: Example} of this rank's groups."""
    cfg, sums = run.cfg, Counter()
    trained = [group for group in groups if group.trained]
    shares = assign(trained, run.world)
    passes = [cut(share, cfg) for share in shares]
    for group in shares[run.rank]:
        if group.number not in examples:  # another rank's prompt
            record = run.loader.records[group.record]
            examples[group.number] = run.sampler.processor.encode(record, answer=False)
    batches = [micro_batch(examples, rollouts, cfg) for rollouts in passes[run.rank]]
    tokens = float(sum(len(r.ids) for group in trained for r in group.rollouts if r.unmasked(cfg)))
    metrics = {"grad_norm": None, "updated": False, "trained_tokens": tokens}
    try:
        batches = [batch.to(run.device) for batch in batches]
        reference_pass(run, engine.module, frozen, batches, sums)
        if tokens:
            metrics |= train_on(run, engine, batches, normalizer, step, max(map(len, passes)), sums)
    except torch.OutOfMemoryError:
        packs = [batch.packed for batch in batches]
        raise out_of_memory(run.device, f"training step {step}", packs, smaller_update(cfg)) from None
    usable = any(all(rollout.finite for rollout in group.rollouts) for group in groups)
    if groups and not tokens and not usable:  # the model itself may be beyond repair
        trainer.check_numbers(run, step, math.nan, math.nan, updated=False)
    return metrics | token_metrics(cfg, reduce_sums(run, sums))


def reduce_sums(run, sums):
    """Sums over this rank's micro-batches -> over all ranks, in one reduction; "sampler_gap_max" is their maximum."""
    named = torch.stack([torch.as_tensor(sums[name], dtype=torch.float64, device=run.device) for name in SUMS])
    every = ranks.gather_numbers(*named.tolist(), float(sums["sampler_gap_max"]))
    return dict(zip(SUMS, every[:, :-1].sum(0).tolist())) | {"sampler_gap_max": float(every[:, -1].max())}


def reference_pass(run, model, frozen, batches, sums):
    """Put the reference's log-probs into the batches, for the loss, and add up the KL of the policy that sampled.

    Where more was sampled than is counted that is no fair sample: groups chosen because they differ show a larger KL.
    """
    for batch in batches if frozen else ():
        with torch.no_grad(), frozen():
            batch.ref = token_logprobs(model, model, batch, run.cfg)[0]
        sums["sampled_kl"] += k3(batch.ref - batch.sampler).sum().double()
        sums["sampled_tokens"] += len(batch.ref)


def train_on(run, engine, batches, normalizer, step, passes, sums):
    """num_iterations updates with the same rollouts. passes: of the rank that has most. Returns metrics."""
    before, any_updated = 0.0, False
    loss_of = partial(micro_loss, engine, run.cfg, normalizer, sums)
    for _ in range(run.cfg.num_iterations):
        grad_norm, updated = trainer.update(engine, batches, loss_of, passes)
        (loss,) = ranks.add(float(sums["loss"]))
        trainer.check_numbers(run, step, loss - before, grad_norm, updated)
        before, any_updated = loss, any_updated or updated
    return {"grad_norm": grad_norm, "updated": any_updated}


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


# -- Shown


def write_rollouts(run, groups):
    """Append every completion of the step, of all ranks, to rollouts.jsonl."""
    if run.rank:
        return
    decode_token = cache(lambda token: run.sampler.processor.backend.decode([token], skip_special_tokens=False))
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
    rows = [row(run.step, run.loader.records[group.record], group, rollout, decode_token) for group, rollout in pairs]
    append_lines(run.folder / ROLLOUTS, rows)


def show(run, alarm, metrics, groups):
    """Alarms, and every log_completions steps some completions, on the console."""
    every = run.cfg.log_completions
    seen = best_and_worst(groups) if every and run.step % every == 0 else []
    for text in [*(f"ALARM {text}" for text in alarm.look(run.step, metrics)), *seen]:
        run.say(f"step {run.step:>6}  {text}")


if __name__ == "__main__":
    cli(main)

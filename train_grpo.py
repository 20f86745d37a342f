"""GRPO: sample groups of completions -> score them -> advantages in each group -> update. Read it from top to bottom.

    python train_grpo.py                                         goes on from the SFT run made last
    deepspeed train_grpo.py --config configs/3b_grpo.py     all GPUs of the machine
    python train_grpo.py --rewards accuracy,format,my_rewards.py:brief --reward_weights 1,0.2,0.5
    python train_grpo.py --output_dir output/grpo_video_lora --resume

A clip goes through the same preprocessing and positions when its group is sampled, in the update, and in infer.py. In
sampling and in the update alike the prompt stands once for its G completions. rollouts.py samples and scores, grpo.py
has the mathematics.

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
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import autofit
import ranks
import trainer
from data import pack_groups, read_records
from evaluate import answerable, evaluate_and_log, held_out_records
from grpo import group_advantages, grpo_loss, k3, loss_normalizer
from latest import follow
from loader import Loader
from lora import disabled, lora_layers, reference, reference_snapshot
from memory import out_of_memory, units_per_step
from model.packed import IGNORE, Packed
from model.qwen import target_logprobs
from rewards import load_rewards, try_rewards
from rollouts import Alarm, GroupSampler, reward_metrics, shown_rollouts, write_rollouts
from startup import build_model, dry_run, launch, start

# What an update adds up over its micro-batches and ranks, for metrics.jsonl
SUMS = ("sampled_kl", "sampled_tokens", "loss", "tokens", "ratio", "clip_low", "clip_high", "entropy", "kl",
        "sampler_gap", "sampler_capped")  # fmt: skip


# Of the console's line: name in metrics.jsonl, heading, format
COLUMNS = (("reward", "reward", ".3f"), ("accuracy", "acc", ".1%"), ("kl", "kl", ".1e"), ("length", "len", ".1f"))


def main():
    cfg = follow(parse(GRPO))
    rewards = load_rewards(cfg.rewards, cfg.reward_weights)
    records, unreadable = answerable(cfg, "training", read_records(cfg.data_path))
    held_out, held_out_unreadable = answerable(cfg, "held-out", held_out_records(cfg))
    try_rewards(rewards, records[0])
    if cfg.dry_run:
        return dry_run(cfg, make_loader, records)
    run = launch(cfg, records, held_out, unreadable + held_out_unreadable)
    model, processor = build_model(run)
    frozen = freeze_reference(model, cfg)
    loader = make_loader(cfg, records, processor, run.rank, run.world)
    run.notes += notes_of(run, loader)
    engine = start(run, model, processor, loader, records, held_out)
    log, alarm = trainer.Log(run, COLUMNS), Alarm(run.loop_state("alarm"))
    evaluate = partial(evaluate_and_log, run, log, held_out, sampled=True) if held_out else None
    trainer.before_first_step(run, engine, evaluate, judge_start=True)
    if run.start_accuracy == 1:
        run.warn("nothing to learn: the start is right 100 % of the time; take harder questions")

    rounds = run.loop_state("rounds") or run.step  # of sampling, each with the next prompts of the dataset
    sampler, wanted = GroupSampler(run, rewards, loader.iterate(rounds), rounds), loader.global_batch  # groups a step
    for step in range(run.step + 1, run.total + 1):
        began, before = time.perf_counter(), sampler.rounds
        lr = trainer.begin_step(run, engine, step)

        # sample a group of completions for each prompt and score them, until enough groups differ in accuracy
        groups, examples = sampler.sample_step(step, wanted)
        # how much better is each completion than the mean of its group, and which groups does the step count?
        metrics, normalizer = compare_within_groups(run, groups, wanted)
        warnings, shown = alarm.look(step, metrics), shown_rollouts(cfg, step, groups)
        write_rollouts(run, step, groups)
        sampled = time.perf_counter()

        # update the policy with the groups that the step counts
        metrics |= learn(run, engine, frozen, groups, examples, normalizer, step)
        seen, oom_retries = ranks.gather_numbers(len(loader.skipped), run.sampler.oom_retries).sum(0).tolist()
        skipped = trainer.count_skipped(run, seen)

        run.step, seconds = step, time.perf_counter() - began
        metrics |= {"rounds": sampler.rounds - before, "skipped": skipped, "oom_retries": oom_retries, "lr": lr}
        metrics["epoch"] = sampler.rounds / loader.steps_per_epoch
        metrics |= {"rollout_seconds": sampled - began - sampler.waited, "update_seconds": began + seconds - sampled}
        tokens = metrics["prompt_tokens"] + metrics["completion_tokens"]
        log.step(step, metrics, seconds, sampler.waited, tokens, warnings, shown)
        if trainer.after_step(run, engine, evaluate, {"rounds": sampler.rounds, "alarm": alarm.state}):
            break
    trainer.finish(run, log)


# -- Start


def make_loader(cfg, records, processor, rank, world):
    """This rank's prompts of each round of sampling, one list: as many as a step trains on."""
    plain = copy.copy(cfg)
    plain.gradient_accumulation_steps, plain.pack_tokens = 1, None  # those split the update, not the sampling
    options = {"rank": rank, "world_size": world, "answer": False, "collate": list}
    return Loader(records, processor, plain, global_batch=units_per_step(cfg) * world, **options)


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


# -- Advantages


def compare_within_groups(run, groups, wanted):
    """Advantages of all Rollouts, and which groups the step counts: `wanted` of them, those first that differ in
    accuracy, then those that differ in their reward alone, then the rest.

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
        rollout.masked = cfg.mask_truncated_completions and not rollout.finished
    priority = lambda group: 0 if group.differs else 1 if std[group.number] > 0 else 2
    counted = sorted(groups, key=priority)[:wanted]  # of equals the first
    for group in counted:
        group.trained = (std[group.number] > 0 or cfg.beta > 0) and group.finite
    if lost := sum(not rollout.finite for rollout in everyone):
        problem = f"{lost} of {len(rewards)} completions have log-probs that are not finite"
        run.warn(f"{problem}: their groups are not trained on")
    completions = [rollout for group in counted for rollout in group.rollouts]
    tokens = sum(len(rollout.ids) for rollout in completions if not rollout.masked)
    normalizer = loss_normalizer(cfg.aggregation, tokens, len(completions), cfg.max_completion_length)
    metrics = {"groups_counted": len(counted), "groups_differing": sum(group.differs for group in groups)}
    return reward_metrics(groups, std.tolist()) | metrics, normalizer


# -- The update


@dataclass(eq=False)
class MicroBatch:
    """Completions of one forward pass. N completion tokens, G completions."""

    packed: Packed
    rows: Tensor  # (N,) int64: packed positions that predict a completion's token
    completion: Tensor  # (N,) int64: whose token it is
    advantages: Tensor  # (G,) float32
    keep: Tensor  # (G,) bool: whether it gives a gradient
    sampler: Tensor  # (N,) float32: log-probs as drawn
    ref: Tensor | None = None  # (N,) under the frozen reference
    old: Tensor | None = None  # (N,) before the first update, with several updates a set of rollouts

    def to(self, device):
        names = ("packed", "completion", "advantages", "keep", "sampler")  # the model takes rows from the host
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def learn(run, engine, frozen, groups, examples, normalizer, step):
    """Updates with the groups that are trained on -> metrics. examples: {number: Example} of this rank's groups."""
    cfg = run.cfg
    trained = [group for group in groups if group.trained]
    shares = assign(trained, run.world)
    for group in shares[run.rank]:
        if group.number not in examples:  # another rank's prompt
            record = run.loader.records[group.record]
            examples[group.number] = run.sampler.processor.encode(record, answer=False)
    tokens = float(sum(len(r.ids) for group in trained for r in group.rollouts if not r.masked))
    updates = run.updates
    while True:
        splits = [split_micro_batches(share, cfg, run.plan.pack_tokens) for share in shares]
        batches = [micro_batch(examples, rollouts) for rollouts in splits[run.rank]]
        most = max(map(len, splits)) if tokens else 0
        try:
            on_device = [batch.to(run.device) for batch in batches]
            metrics = train_on(run, engine, frozen, on_device, normalizer, step, most)
            break
        except torch.OutOfMemoryError:
            packs, on_device = [batch.packed for batch in batches], None
            if run.updates > updates:  # with these rollouts: what it was made from is gone
                raise out_of_memory(run.device, f"training step {step}", packs, autofit.LOWER) from None
        autofit.shrink(run, engine, packs, step)
    if groups and not any(group.finite for group in groups):  # the model itself may be beyond repair
        trainer.check_numbers(run, step, math.nan, math.nan, updated=False)
    return metrics | {"trained_tokens": tokens}


def assign(groups, world):
    """Groups to train on -> those of each rank: its own, whose clips it has decoded, but as many as any other's."""
    shares = [[group for group in groups if group.owner == rank] for rank in range(world)]
    while True:
        most, least = max(shares, key=len), min(shares, key=len)
        if len(most) - len(least) < 2:
            return [sorted(share, key=lambda group: group.number) for share in shares]
        least.append(most.pop())


def split_micro_batches(groups, cfg, pack_tokens):
    """The Rollouts of each micro-batch, in their order: at most pack_tokens tokens, a group's prompt counted once a
    micro-batch, or, where that is None, per_device_train_batch_size of them. A group that fits into one is not cut."""
    batches, size = [], 0
    for group in groups:
        whole = group.prompt_tokens + sum(len(rollout.ids) for rollout in group.rollouts)
        for k, rollout in enumerate(group.rollouts):
            again = batches and batches[-1][-1].prompt == rollout.prompt
            cost = len(rollout.ids) + (0 if again else group.prompt_tokens)
            full = batches and not pack_tokens and len(batches[-1]) == cfg.per_device_train_batch_size
            needed = whole if k == 0 and pack_tokens and whole <= pack_tokens else cost
            if not batches or full or (pack_tokens and size + needed > pack_tokens):
                batches.append([])
                size, cost = 0, len(rollout.ids) + group.prompt_tokens
            batches[-1].append(rollout)
            size += cost
    return batches


def micro_batch(examples, rollouts):
    """Rollouts, those of a group next to each other -> MicroBatch. examples: {number of the group: Example}."""
    numbers = list(dict.fromkeys(rollout.prompt for rollout in rollouts))
    completions = [[rollout.ids for rollout in rollouts if rollout.prompt == number] for number in numbers]
    packed = pack_groups([examples[number] for number in numbers], completions)
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
    return MicroBatch(
        packed=packed,
        rows=(packed.targets != IGNORE).nonzero()[:, 0],
        completion=torch.arange(len(rollouts)).repeat_interleave(lengths),
        advantages=torch.tensor([rollout.advantage for rollout in rollouts]),
        keep=torch.tensor([not rollout.masked for rollout in rollouts]),
        sampler=torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs]),
    )


def train_on(run, engine, frozen, batches, normalizer, step, num_micro_batches):
    """The reference pass, then num_iterations updates with the same rollouts -> metrics.

    num_micro_batches: of the rank that has most; 0 where no rank has a token to learn from.
    """
    cfg, sums, metrics = run.cfg, Counter(), {"grad_norm": None, "updated": False}
    reference_pass(run, engine.module, frozen, batches, sums)
    if num_micro_batches == 0:
        return metrics | token_metrics(cfg, reduce_sums(run, sums))
    loss_before, loss_of = 0.0, partial(micro_loss, engine, cfg, normalizer, sums)
    for _ in range(cfg.num_iterations):
        grad_norm, updated = trainer.update(engine, batches, loss_of, num_micro_batches)
        totals = reduce_sums(run, sums)
        metrics |= token_metrics(cfg, totals)
        metrics |= {"grad_norm": grad_norm, "updated": metrics["updated"] or updated}
        trainer.check_numbers(run, step, totals["loss"] - loss_before, grad_norm, updated)
        loss_before = totals["loss"]
    return metrics


def reference_pass(run, model, frozen, batches, sums):
    """Put the reference's log-probs into the batches, for the loss, and add up the KL of the policy that sampled.

    Where more was sampled than is counted that is no fair sample: groups chosen because they differ show a larger KL.
    """
    for batch in batches if frozen else ():
        with torch.no_grad(), frozen():
            batch.ref = token_logprobs(model, model, batch, run.cfg)[0]
        sums["sampled_kl"] += k3(batch.ref - batch.sampler).sum().double()
        sums["sampled_tokens"] += len(batch.ref)


def token_logprobs(forward, model, batch, cfg):
    """Log-probs (N,) of the completions' tokens, with gradient, and entropies (N,): as they are sampled, without the
    vision tokens. forward: the model itself, or the engine around it."""
    hidden = forward(batch.packed, rows=batch.rows)  # (N, C)
    banned = torch.tensor(model.config.vision_token_ids, device=hidden.device)
    targets = batch.packed.targets[batch.rows.to(hidden.device, non_blocking=True)]
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


def reduce_sums(run, sums):
    """Sums over this rank's micro-batches -> over all ranks, in one reduction; "sampler_gap_max" is their maximum."""
    named = torch.stack([torch.as_tensor(sums[name], dtype=torch.float64, device=run.device) for name in SUMS])
    every = ranks.gather_numbers(*named.tolist(), float(sums["sampler_gap_max"]))
    return dict(zip(SUMS, every[:, :-1].sum(0).tolist())) | {"sampler_gap_max": float(every[:, -1].max())}


def token_metrics(cfg, total):
    """The sums of an update over all ranks -> means over the tokens that were trained on, and updates."""
    means, tokens = {}, total["tokens"]
    if total["sampled_tokens"]:
        means["kl"] = total["sampled_kl"] / total["sampled_tokens"]
    if not tokens:
        return means
    for name in ("ratio", "clip_low", "clip_high", "entropy", "sampler_gap"):
        means[name] = total[name] / tokens
    if cfg.beta:
        means["kl_trained"] = total["kl"] / tokens
    if cfg.sampler_is_cap is not None:
        means["sampler_capped"] = total["sampler_capped"] / tokens
    means |= {"loss": total["loss"] / cfg.num_iterations, "clipped": means["clip_low"] + means["clip_high"]}
    return means | {"sampler_gap_max": total["sampler_gap_max"]}


if __name__ == "__main__":
    cli(main)

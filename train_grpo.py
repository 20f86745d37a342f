"""GRPO: sample groups of completions -> score them -> advantages in each group -> update. Read it from top to bottom.

    python train_grpo.py                                         goes on from the SFT run made last
    deepspeed train_grpo.py --config configs/3b_grpo.py          all GPUs of the machine
    python train_grpo.py --rewards accuracy,format,my_rewards.py:brief --reward_weights 1,0.2,0.5
    python train_grpo.py --output_dir output/grpo_video_lora --resume

In sampling and in the update alike the prompt stands once for its G completions. grpo.py has the mathematics. Of
several ranks each samples and trains on the groups of its own prompts, as far as that is even; all know all rewards.
"""

# ruff: noqa: E402
from config import GRPO, cli, parse

if __name__ == "__main__":
    cli(lambda: parse(GRPO), each_rank=False)  # before torch is imported: a mistyped flag is reported at once

import math
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import torch

import ranks
import trainer
from data import pack_groups, read_records
from evaluate import answerable, evaluate_and_log, held_out_records
from grpo import group_advantages, grpo_loss, loss_normalizer
from latest import follow
from loader import Loader
from lora import disabled, lora_layers, reference, reference_snapshot
from memory import units_per_step
from model.decode import Sampling
from model.packed import IGNORE
from model.qwen import target_logprobs
from rewards import load_rewards, temporal, try_rewards
from rollouts import Group, reward_metrics, score_group, write_rollouts
from startup import build_model, dry_run, launch, start

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
    engine = start(run, model, processor, loader, records, held_out)
    log = trainer.Log(run, COLUMNS)
    evaluate = partial(evaluate_and_log, run, log, held_out, sampled=True) if held_out else None
    trainer.before_first_step(run, engine, evaluate)
    if evaluate and run.step == 0:
        evaluate()
    if run.start_accuracy == 1:
        run.warn("nothing to learn: the start is right 100 % of the time; take harder questions")

    batches, wanted = loader.iterate(run.rounds), loader.global_batch  # groups that a step counts
    for step in range(run.step + 1, run.total + 1):
        began = time.perf_counter()
        lr = trainer.begin_step(run, engine, step)

        # sample a group of completions for each prompt and score them, until enough groups differ in accuracy
        groups, examples, made, waited = sample_groups(run, rewards, batches, step, wanted)
        # how much better is each completion than the mean of its group, and which groups does the step count?
        metrics, normalizer = compare_within_groups(run, groups, wanted)
        write_rollouts(run, step, groups)
        sampled = time.perf_counter()
        # update the policy with the groups that the step counts
        metrics |= learn(run, engine, frozen, groups, examples, normalizer, step)

        run.step, run.rounds, ended = step, run.rounds + made, time.perf_counter()
        seen, oom_retries = ranks.gather_numbers(len(loader.skipped), run.sampler.oom_retries).sum(0).tolist()
        metrics |= {"rounds": made, "epoch": run.rounds / loader.steps_per_epoch, "lr": lr, "oom_retries": oom_retries}
        metrics |= {"skipped": trainer.count_skipped(run, seen), "rollout_seconds": sampled - began - waited}
        log.step(step, metrics, ended - began, waited, metrics["prompt_tokens"] + metrics["completion_tokens"])
        if trainer.after_step(run, engine, evaluate):
            break
    trainer.finish(run, log)


def make_loader(cfg, records, processor, rank, world):
    """This rank's prompts of each round of sampling, one list: as many as a step trains on."""
    whole = replace(cfg, gradient_accumulation_steps=1, pack_tokens=None)  # those split the update, not the sampling
    options = {"rank": rank, "world_size": world, "answer": False, "collate": list}
    return Loader(records, processor, whole, global_batch=units_per_step(cfg) * world, **options)


def freeze_reference(model, cfg):
    """-> frozen: inside `with frozen():` the model is the reference, the policy as the run began. None if beta is 0.
    Dropout is off from now on: the policy that is updated is the one that was sampled."""
    for _, layer in lora_layers(model):
        layer.dropout = 0.0
    if cfg.beta == 0:
        return None
    return partial(disabled, model) if cfg.reference == "base" else partial(reference, model, reference_snapshot(model))


def sample_groups(run, rewards, batches, step, wanted):
    """Rounds of sampling, each with the next prompts, until `wanted` groups of all ranks together differ in accuracy,
    or max_resample more rounds were made (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2). Returns the groups of
    all ranks, {number: Example} of this rank's, the rounds, and the seconds waited for data."""
    groups, examples, waited = [], {}, 0.0
    for made in count(1):
        began = time.perf_counter()
        (prompts,) = next(batches)
        waited += time.perf_counter() - began
        own = sample_round(run, rewards, prompts, step, stream=2 * (made - 1))
        for rank, theirs in enumerate(ranks.gather(own)):
            if rank == run.rank:
                examples |= dict(enumerate(prompts, start=len(groups)))
            for group in theirs:
                group.number, group.owner = len(groups), rank
                for rollout in group.rollouts:
                    rollout.group = group.number
                groups.append(group)
        enough = made > run.cfg.max_resample or sum(group.differs for group in groups) >= wanted
        if groups and enough:  # none: no prompt could be read
            return groups, examples, made, waited


def sample_round(run, rewards, prompts, step, stream):
    """A Group of scored completions for each of this rank's prompts. stream: of random numbers in this step; the next
    one is for the same prompts with their frames shuffled, where a reward needs that."""
    cfg, sampler = run.cfg, run.sampler
    sampling = Sampling(cfg.max_completion_length, cfg.temperature, cfg.top_k, cfg.top_p, stop_ids=sampler.stop_ids)
    # by a prompt's number, not its rank's: it gets the same completions on any rank
    seeds = [trainer.seed_of(cfg, step, prompt.number, stream) for prompt in prompts]
    drawn = sampler(prompts, sampling, cfg.num_generations, seeds)
    shuffled = {}  # prompt's number: texts
    if any(reward.fn is temporal for reward in rewards):
        movable = [prompt for prompt in prompts if any(steps > 1 for steps, _, _ in prompt.grid_thw)]
        able = {prompt.number: prompt.record for prompt in movable}
        others = [sampler.processor.encode(record, answer=False, control="shuffled") for record in able.values()]
        seeds = [trainer.seed_of(cfg, step, number, stream + 1) for number in able]
        texts = sampler(others, sampling, max(1, cfg.num_generations // 2), seeds)
        shuffled = {number: [sampler.rollout(0, one).text for one in each] for number, each in zip(able, texts)}
    groups = []
    for prompt, completions in zip(prompts, drawn):
        group = Group(prompt.number, len(prompt), [sampler.rollout(0, each) for each in completions])
        score_group(rewards, group, prompt.record, shuffled.get(prompt.number, []), cfg.max_completion_length)
        groups.append(group)
    return groups


def compare_within_groups(run, groups, wanted):
    """Advantages of all Rollouts, and which groups the step counts: `wanted` of them, those first that differ in
    accuracy, then those that differ in their reward alone, then the rest. Returns the metrics of everything that was
    sampled, and the loss' normalizer.

    The loss is divided by what is counted: or the last few groups that differ would get the whole step. With a KL every
    counted group is trained on, for the policy may drift where rewards are equal too.
    """
    cfg, everyone = run.cfg, [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([rollout.reward for rollout in everyone], dtype=torch.float64).view(len(groups), -1)
    advantages, std = group_advantages(rewards, cfg.scale_rewards)
    for rollout, advantage in zip(everyone, advantages.flatten().tolist()):
        rollout.advantage = advantage
        rollout.masked = cfg.mask_truncated_completions and not rollout.finished
    priority = lambda group: 0 if group.differs else 1 if std[group.number] > 0 else 2
    counted = sorted(groups, key=priority)[:wanted]  # of equals the first
    for group in counted:
        gives_gradient = (std[group.number] > 0 or cfg.beta > 0) and not all(r.masked for r in group.rollouts)
        group.trained = gives_gradient and group.finite
    if lost := sum(not rollout.finite for rollout in everyone):
        problem = f"{lost} of {len(everyone)} completions have log-probs that are not finite"
        run.warn(f"{problem}: their groups are not trained on")
    completions = [rollout for group in counted for rollout in group.rollouts]
    tokens = sum(len(rollout.ids) for rollout in completions if not rollout.masked)
    normalizer = loss_normalizer(cfg.aggregation, tokens, len(completions), cfg.max_completion_length)
    metrics = {"groups_counted": len(counted), "groups_differing": sum(group.differs for group in groups)}
    return reward_metrics(groups, std.tolist()) | metrics, normalizer


def learn(run, engine, frozen, groups, examples, normalizer, step):
    """Update with the groups that are trained on -> metrics. examples: {number: Example} of this rank's own groups.
    Where memory runs out the step is repeated with smaller micro-batches."""
    mine, updates = share([group for group in groups if group.trained], run.rank, run.world), run.updates
    for group in mine:
        if group.number not in examples:  # another rank's prompt
            examples[group.number] = run.sampler.processor.encode(run.loader.records[group.record], answer=False)
    while True:
        rollouts = split_micro_batches(mine, run.cfg, run.plan.pack_tokens)
        batches = [micro_batch(examples, each, run.device) for each in rollouts]
        most = int(ranks.gather_numbers(len(batches)).max())
        try:
            metrics = update_policy(run, engine, frozen, batches, normalizer, step, most)
            break
        except torch.OutOfMemoryError:
            largest = max((len(batch.packed.input_ids) for batch in batches), default=0)
        # after an update of this step the weights are no longer those that the step began with
        trainer.shrink(run, engine, largest, step, repeatable=run.updates == updates)
    if not any(group.finite for group in groups):  # the model itself may be beyond repair
        trainer.check_numbers(run, step, math.nan, math.nan, updated=False)
    return metrics


def share(groups, rank, world):
    """This rank's groups to train on: its own, whose clips it has decoded, but as many as any other's."""
    shares = [[group for group in groups if group.owner == each] for each in range(world)]
    while len(max(shares, key=len)) - len(min(shares, key=len)) > 1:
        min(shares, key=len).append(max(shares, key=len).pop())
    return sorted(shares[rank], key=lambda group: group.number)


def split_micro_batches(groups, cfg, pack_tokens):
    """The Rollouts of each micro-batch, in their order: at most pack_tokens tokens, a group's prompt counted once, or,
    where that is None, per_device_train_batch_size of them. Only a group that is too large for one is cut."""
    if pack_tokens is None:
        rollouts, size = [r for group in groups for r in group.rollouts], cfg.per_device_train_batch_size
        return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
    batches, room = [], 0
    for group in groups:
        whole = group.prompt_tokens + sum(len(rollout.ids) for rollout in group.rollouts)
        pieces = [group.rollouts] if whole <= pack_tokens else [[rollout] for rollout in group.rollouts]
        room -= group.prompt_tokens
        for piece in pieces:
            tokens = sum(len(rollout.ids) for rollout in piece)
            if tokens > room:
                batches.append([])
                room = pack_tokens - group.prompt_tokens
            batches[-1] += piece
            room -= tokens
    return batches


def micro_batch(examples, rollouts, device):
    """What one forward pass takes. rollouts: those of a group next to each other; N tokens in G completions."""
    numbers = list(dict.fromkeys(rollout.group for rollout in rollouts))
    completions = [[rollout.ids for rollout in rollouts if rollout.group == number] for number in numbers]
    packed = pack_groups([examples[number] for number in numbers], completions)
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
    sampler = [logprob for rollout in rollouts for logprob in rollout.logprobs]
    return SimpleNamespace(
        packed=packed.to(device),
        rows=(packed.targets != IGNORE).nonzero()[:, 0],  # (N,) on the host: positions that predict a completion
        completion=torch.arange(len(rollouts)).repeat_interleave(lengths).to(device),  # (N,): whose token it is
        advantages=torch.tensor([rollout.advantage for rollout in rollouts], device=device),  # (G,)
        keep=torch.tensor([not rollout.masked for rollout in rollouts], device=device),  # (G,): it gives a gradient
        sampler=torch.tensor(sampler, device=device),  # (N,): log-probs as drawn
        ref=None,  # (N,): log-probs under the frozen reference
        old=None,  # (N,): and before the first update, with several updates a set of rollouts
    )


def update_policy(run, engine, frozen, batches, normalizer, step, num_micro_batches):
    """num_iterations updates with the same rollouts -> metrics. num_micro_batches: of the rank that has most; 0 where
    no rank has a token to learn from."""
    cfg, metrics = run.cfg, {"grad_norm": None, "updated": False}
    sums, loss = Counter(), 0.0  # of all updates so far: the metrics are means over them
    loss_of = partial(micro_loss, engine, cfg, normalizer, sums)
    if frozen:
        reference_pass(engine.module, frozen, batches, cfg)
    for _ in range(cfg.num_iterations if num_micro_batches else 0):
        before = loss
        grad_norm, updated = trainer.update(engine, batches, loss_of, num_micro_batches)
        means, loss = reduce_sums(run, sums)
        trainer.check_numbers(run, step, loss - before, grad_norm, updated)  # the difference: this update's own loss
        metrics |= means | {"grad_norm": grad_norm, "updated": updated or metrics["updated"]}
    return metrics


def reference_pass(model, frozen, batches, cfg):
    """Put the frozen reference's log-probs into the batches, for the KL."""
    with torch.no_grad(), frozen():
        for batch in batches:
            batch.ref = token_logprobs(model, model, batch, cfg, with_entropy=False)[0]


def token_logprobs(forward, model, batch, cfg, with_entropy=True):
    """Log-probs (N,) of the completions' tokens, with gradient, and entropies (N,): as they are sampled, without the
    vision tokens. forward: the model itself, or the engine around it."""
    hidden = forward(batch.packed, rows=batch.rows)  # (N, C)
    banned = torch.tensor(model.config.vision_token_ids, device=hidden.device)
    targets = batch.packed.targets[batch.rows.to(hidden.device, non_blocking=True)]
    return target_logprobs(hidden, model.head_weight, targets, cfg.temperature, banned, with_entropy)[:2]


def micro_loss(engine, cfg, normalizer, sums, batch):
    """One micro-batch's share of the loss. Adds to sums what is logged; nothing here waits for the GPU."""
    logprobs, entropy = token_logprobs(engine, engine.module, batch, cfg)
    if cfg.num_iterations > 1 and batch.old is None:  # no update has been made yet: this is the policy that sampled
        batch.old = logprobs.detach()
    tensors = {"old": batch.old, "ref": batch.ref, "sampler": batch.sampler, "entropy": entropy, "keep": batch.keep}
    loss, metrics = grpo_loss(logprobs, batch.advantages, batch.completion, normalizer, cfg, **tensors)
    for name, value in (metrics | {"loss": loss.detach()}).items():
        sums[name] += value
    return loss


def reduce_sums(run, sums):
    """Sums over this rank's micro-batches, in all updates so far -> ({name: mean over the tokens of all ranks}, sum of
    the loss)."""
    cfg, names = run.cfg, ["loss", "tokens", "ratio", "clip_low", "clip_high", "entropy", "sampler_gap"]
    names += ["kl"] * (cfg.beta > 0) + ["sampler_capped"] * (cfg.sampler_is_cap is not None)
    own = torch.stack([torch.as_tensor(sums[name], dtype=torch.float64, device=run.device) for name in names])
    totals = dict(zip(names, ranks.gather_numbers(*own.tolist()).sum(0).tolist()))
    loss, tokens = totals.pop("loss"), totals.pop("tokens")
    means = {name: value / tokens for name, value in totals.items()}
    means |= {"loss": loss / cfg.num_iterations, "clipped": means["clip_low"] + means["clip_high"]}
    return means, loss


if __name__ == "__main__":
    cli(main)

"""GRPO: sample groups of completions -> score them -> advantages in each group -> update. Read it from top to bottom.

    python train_grpo.py                                         goes on from the newest adapter under output/
    deepspeed train_grpo.py --config configs/qwen_3b_grpo_24gb.py     all GPUs of the machine
    python train_grpo.py --rewards accuracy,format,my_rewards.py:brief --reward_weights 1,0.2,0.5
    python train_grpo.py --output_dir output/grpo_video_lora --resume

A clip goes through the same preprocessing and positions when its group is sampled, in the update, and in infer.py. In
sampling and in the update alike the prompt stands once for its G completions. training/grpo.py has the mathematics,
training/groups.py what is told of the completions.
"""

# ruff: noqa: E402
from config import GRPO, cli, parse

if __name__ == "__main__":
    cli(lambda: parse(GRPO))  # before torch is imported, so that --help and a mistyped flag answer at once

import copy
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from data import Loader, Processor, load_tokenizer, pack_groups, read_records
from lora import disabled, lora_layers, reference, reference_snapshot
from model import UserError
from model.decode import Sampling
from model.loss import IGNORE, target_logprobs
from model.qwen2_5_vl import Packed, resolve_folder
from reporting.rollouts import telling_rows
from rewards import load_rewards
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
from training.checkpoint import STATE, find_adapter, read_json
from training.engine import gather, global_max, update
from training.evaluation import answerable, evaluate, evaluation_facts, held_out_records, prompt_batches
from training.full import sample, told_when_full
from training.groups import (
    ROLLOUTS,
    Alarm,
    Rollout,
    best_and_worst,
    facts,
    needs_shuffled,
    reward_metrics,
    row,
    score_group,
)
from training.grpo import group_advantages, grpo_loss, k3, loss_normalizer
from training.meeting import together
from training.plan import brief, dry_run
from training.runlog import Log, append

# Prompt and completion tokens sampled together: their keys and values take 4.8 GB at the 3B shape
# (36 layers x 2 x 2 heads x 128 numbers x 2 bytes a token).
SAMPLED_TOKENS = 131_072
SUMS = ("loss", "tokens", "ratio", "clip_low", "clip_high", "entropy", "kl", "sampler_gap", "sampler_capped")

COLUMNS_BEFORE = (("reward", "reward", "6.3f"), ("reward_std", "+-", "5.3f"))
COLUMNS_AFTER = (
    ("all_right", "right", "4.0%"), ("all_wrong", "wrong", "4.0%"), ("no_variance", "flat", "4.0%"),
    ("length", "len", "5.1f"), ("truncated", "cut", "4.0%"), ("kl", "kl", "8.1e"), ("clipped", "clip", "5.1%"),
    ("entropy", "ent", "5.3f"), ("grad_norm", "gnorm", "7.3f"), ("lr", "lr", "7.1e"),
    ("sampler_gap_max", "gap", "6.0e"), ("rollout_seconds", "sample s", "6.2f"), ("update_seconds", "update s", "6.2f"),
)  # fmt: skip


@dataclass(eq=False)
class MicroBatch:
    """Completions of one forward pass. N completion tokens, G completions."""

    packed: Packed
    rows: Tensor  # (N,) int64: packed positions that predict a completion's token
    completion: Tensor  # (N,) int64: whose token it is
    group: Tensor  # (G,) int64: of which of the rank's groups
    advantages: Tensor  # (G,) float32
    keep: Tensor  # (G,) bool: whether it gives a gradient
    sampler: Tensor  # (N,) float32: log-probs as drawn
    trained_tokens: int  # of those that are kept
    ref: Tensor | None = None  # (N,) under the frozen reference
    old: Tensor | None = None  # (N,) before the first update, with several updates a set of rollouts

    def to(self, device):
        names = ("packed", "rows", "completion", "group", "advantages", "keep", "sampler")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@together
def main():
    cfg = parse(GRPO)
    rewards = load_rewards(cfg.rewards, cfg.reward_weights)
    told = follow_adapter(cfg)
    records, left_out = answerable(cfg, "training", read_records(cfg.data_path))
    held_out, held_left_out = answerable(cfg, "held-out", held_out_records(cfg))
    if cfg.dry_run:
        return dry_run(cfg, "train_grpo.py", prompt_loader, records, held_out, SAMPLED_TOKENS)
    run = launch(cfg, records, held_out)
    run.notes += told + left_out + held_left_out
    model = build_model(cfg, run)
    for _, layer in lora_layers(model):
        layer.dropout = 0.0  # the policy that is updated is the one that was sampled
    frozen = freeze_reference(model, cfg)
    tokenizer = load_tokenizer(resolve_folder(cfg.model_id, cfg.local_files_only))
    processor = Processor(tokenizer, model.config, cfg)
    loader = prompt_loader(run, records, processor)
    keep_count(run, loader)
    total = total_steps(cfg, loader)
    run.plan = brief(run, model, processor, records, loader, held_out, SAMPLED_TOKENS)
    run.notes += notes(run, loader, records, held_out)
    engine = start(run, model, total)
    tell_data(run, processor, records, held_out)
    columns = tuple((f"reward/{reward.name}", reward.name[:8], "6.3f") for reward in rewards)
    log = Log(run, total, COLUMNS_BEFORE + columns + COLUMNS_AFTER)
    alarm = Alarm(run.state.get("loop", {}).get("alarm"))
    batches = loader.iterate(run.step, total)
    if held_out and run.step == 0:
        evaluate_and_tell(run, model, processor, held_out, log)

    for step in range(run.step + 1, total + 1):
        began = time.perf_counter()
        (prompts,) = next(batches)
        waited = time.perf_counter() - began

        # sample a group of completions for each prompt, and score them
        run.seed_step(step)
        groups = sample_groups(run, model, processor, prompts, run.seeds(step, prompts))
        shuffled = sample_shuffled(run, model, processor, prompts, rewards, step)
        for prompt, group, texts in zip(prompts, groups, shuffled, strict=True):
            score_group(rewards, prompt, group, texts, cfg.max_completion_length)
        health, counts = compare_within_groups(run, groups, groups_per_step(cfg) * run.world)
        rows = write_rollouts(run, step, processor, prompts, groups)
        sampled = time.perf_counter()

        # update the policy with the groups that differ within themselves
        lr = schedule(engine, cfg, step - 1, total)
        metrics = learn(run, engine, frozen, prompts, groups, counts, step, lost=health.get("not_finite"))

        run.step = step
        now = time.perf_counter()
        metrics |= health | {"lr": lr, "epoch": step / loader.steps_per_epoch}
        metrics |= {"rollout_seconds": sampled - began - waited, "update_seconds": now - sampled}
        metrics |= counted(run, prompts)
        log.step(step, metrics, now - began, waited, metrics["prompt_tokens"] + metrics["completion_tokens"])
        seen = []
        if cfg.log_completions and step % cfg.log_completions == 0:
            seen = best_and_worst(groups)
            log.rollouts(step, telling_rows(rows))
        for text in [*(f"ALARM {text}" for text in alarm.look(step, metrics)), *seen]:
            run.say(f"step {step:>6}  {text}")

        # answer accuracy, checkpoint, end
        better = False
        if held_out and is_due(cfg.eval_steps, step, total):
            better = evaluate_and_tell(run, model, processor, held_out, log)
            report(run)
        stop = run.stop_requested()
        every = {"steps": cfg.save_steps, "epoch": loader.steps_per_epoch, "no": 0}[cfg.save_strategy]
        if better or stop or is_due(every, step, total):
            save(run, engine, step, {"alarm": alarm.state})
        if stop:
            break

    log.close()
    report(run)
    finish(run, total)


# Start


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
    """Prompts of each step: `oversample` times as many as are trained on, on any number of ranks. Read ahead, in one
    batch a rank."""
    plain = copy.copy(run.cfg)
    plain.gradient_accumulation_steps, plain.pack_tokens = 1, None  # those cut the update, not the sampling
    size = math.ceil(groups_per_step(run.cfg) * run.world * run.cfg.oversample)
    at = {"rank": run.rank, "world_size": run.world}
    return Loader(records, processor, plain, **at, answer=False, collate=list, global_batch=size)


def notes(run, loader, records, held_out):
    cfg, trained = run.cfg, groups_per_step(run.cfg) * run.world
    if run.adapter is None:
        yield "no adapter to go on from: a new one on the base" if cfg.lora_enable else "trains the base itself"
    yield f"{len(records)} samples, {loader.steps_per_epoch} steps an epoch; {len(held_out)} held out"
    yield f"a step samples {loader.global_batch} prompts x {cfg.num_generations} and trains on {trained} groups of them"


def freeze_reference(model, cfg):
    """-> frozen: inside `with frozen():` the model is the reference. None if beta is 0.

    It is called before a checkpoint's state is put back, so it is the policy as the run began, also in a resumed run.
    """
    if cfg.beta == 0:
        return None
    if cfg.reference == "base":
        return partial(disabled, model)
    return partial(reference, model, reference_snapshot(model))


# Sampling


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
    """Advantages of all Rollouts; the `wanted` groups of all ranks whose rewards differ most are marked as trained.

    A group whose rewards are all equal teaches nothing and is not trained, but it counts where the loss is divided: or
    the last few groups that differ would get the whole step. Returns the metrics of everything that was sampled, and
    (tokens, completions) of the `wanted` groups.
    """
    ranks = gather([facts(group) for group in groups])
    everyone = [group for rank in ranks for group in rank]
    if not everyone:
        return {"completion_tokens": 0, "groups_trained": 0}, (0, 0)
    rewards = torch.tensor([fact.reward for group in everyone for fact in group], dtype=torch.float64)
    index = torch.arange(len(everyone)).repeat_interleave(run.cfg.num_generations)
    advantages, std = group_advantages(rewards, index, run.cfg.scale_rewards)
    wanted = std.argsort(descending=True, stable=True)[:wanted].tolist()
    sound = [all(fact.sound for fact in group) for group in everyone]
    chosen = {number for number in wanted if std[number] > 0 and sound[number]}
    lost = sum(not fact.sound for group in everyone for fact in group)
    if lost:
        told = f"{lost} of {len(rewards)} completions have log-probs that are not finite"
        run.say(f"{told}: their groups are not trained on")
    first = sum(map(len, ranks[: run.rank]))
    for number, group in enumerate(groups, first):
        for k, rollout in enumerate(group):
            rollout.advantage = advantages[number * run.cfg.num_generations + k].item()
            rollout.number, rollout.trained = number, number in chosen
    counted = [fact for number in wanted for fact in everyone[number]]
    masked = run.cfg.mask_truncated_completions
    counts = sum(fact.tokens for fact in counted if fact.finished or not masked), len(counted)
    return reward_metrics(everyone, std.tolist()) | {"groups_trained": len(chosen)}, counts


# The update


def learn(run, engine, frozen, prompts, groups, counts, step, lost):
    """KL of what was sampled, and the updates with the groups that were chosen. counts: see train_on. lost: completions
    of all ranks whose log-probs are not finite."""
    trained = [[rollout for rollout in group if rollout.trained] for group in groups]
    batches = micro_batches(prompts, trained, run.cfg)
    with told_when_full(run, f"training step {step}", [batch.packed for batch in batches]):
        batches = [batch.to(run.device) for batch in batches]
        drift = reference_pass(run, engine.module, frozen, prompts, groups, batches)
        metrics = drift | train_on(run, engine, batches, counts, step)
    if lost and not metrics["trained_tokens"]:  # for want of finite log-probs: the model itself may be beyond repair
        check_numbers(run, step, math.nan, math.nan, updated=False)
    return metrics


def micro_batches(prompts, groups, cfg):
    """Groups of Rollouts as MicroBatches of at most per_device_train_batch_size completions and pack_tokens tokens."""
    bins, tokens = [], 0
    for rollout in (rollout for group in groups for rollout in group):
        prompt = len(prompts[rollout.group])
        cost = len(rollout.ids) + (0 if bins and bins[-1][-1].group == rollout.group else prompt)
        full = bins and len(bins[-1]) == cfg.per_device_train_batch_size
        if not bins or full or (cfg.pack_tokens and tokens + cost > cfg.pack_tokens):
            bins.append([])
            tokens, cost = 0, len(rollout.ids) + prompt
        bins[-1].append(rollout)
        tokens += cost
    return [micro_batch(prompts, rollouts, cfg) for rollouts in bins]


def micro_batch(prompts, rollouts, cfg):
    """Rollouts, those of a group beside each other -> MicroBatch in which each group's prompt stands once."""
    numbers = list(dict.fromkeys(rollout.group for rollout in rollouts))
    completions = [[rollout.ids for rollout in rollouts if rollout.group == number] for number in numbers]
    packed = pack_groups([prompts[number] for number in numbers], completions)
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
    keep = [rollout.finished or not cfg.mask_truncated_completions for rollout in rollouts]
    return MicroBatch(
        packed=packed,
        rows=(packed.targets != IGNORE).nonzero()[:, 0],
        completion=torch.arange(len(rollouts)).repeat_interleave(lengths),
        group=torch.tensor([rollout.group for rollout in rollouts]),
        advantages=torch.tensor([rollout.advantage for rollout in rollouts]),
        keep=torch.tensor(keep),
        sampler=torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs]),
        trained_tokens=int(lengths[torch.tensor(keep)].sum()),
    )


def reference_pass(run, model, frozen, prompts, groups, batches):
    """Put the reference's log-probs into the batches that are trained on, and tell the KL to it.

    The KL is that over the first groups as they were sampled, a quarter as many as a step trains on: the groups trained
    on are no fair sample; chosen for rare outcomes, they show a KL many times too large.
    """
    if not frozen:
        return {}
    fair = max(1, groups_per_step(run.cfg) // 4)
    untrained = [[rollout for rollout in group if not rollout.trained] for group in groups[:fair]]
    untrained = [group for group in untrained if all(rollout.sound for rollout in group)]
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)  # of the KL, and of its tokens
    for batch in (*batches, *(batch.to(run.device) for batch in micro_batches(prompts, untrained, run.cfg))):
        with torch.no_grad(), frozen():
            batch.ref = token_logprobs(model, model, batch, run.cfg)[0]
        counted = batch.group[batch.completion] < fair
        sums += torch.stack([(k3(batch.ref - batch.sampler) * counted).sum(), counted.sum()])
    kl, tokens = run.sum(*sums.tolist())
    return {"kl": kl / max(tokens, 1)}


def train_on(run, engine, batches, counts, step):
    """num_iterations updates with the same rollouts. counts: (tokens, completions) that the loss is divided by.

    Returns metrics, means over tokens and updates.
    """
    cfg = run.cfg
    (n_tokens,) = run.sum(sum(batch.trained_tokens for batch in batches))
    metrics = {"grad_norm": None, "updated": False, "trained_tokens": n_tokens}
    if not n_tokens:  # no group differs within itself: told by the alarm, and no fault of the numbers
        return metrics
    normalizer = loss_normalizer(cfg.aggregation, *counts, cfg.max_completion_length)
    sums = Counter()
    for _ in range(cfg.num_iterations):
        before = sums["loss"]
        grad_norm, updated = update(engine, batches, partial(micro_loss, engine, cfg, normalizer, sums))
        (loss,) = run.sum(float(sums["loss"] - before))
        check_numbers(run, step, loss, grad_norm, updated)
    metrics |= {"grad_norm": grad_norm, "updated": updated}
    return metrics | token_metrics(run, sums)


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


def token_metrics(run, sums):
    """Sums of this rank's tokens -> means over those of all ranks."""
    found = dict(zip(SUMS, run.sum(*(float(sums[name]) for name in SUMS)), strict=True))
    tokens = found.pop("tokens")
    means = {name: value / tokens for name, value in found.items() if name != "loss"}
    means["kl_trained"] = means.pop("kl")
    if run.cfg.beta == 0:
        del means["kl_trained"]
    if run.cfg.sampler_is_cap is None:
        del means["sampler_capped"]
    means |= {"loss": found["loss"] / run.cfg.num_iterations, "clipped": means["clip_low"] + means["clip_high"]}
    return means | {"sampler_gap_max": global_max([float(sums["sampler_gap_max"])], run.device)[0]}


# What one sees


def counted(run, prompts):
    """Metrics summed over the ranks at the end of a step; ends the run where too much of the data is broken."""
    names = "prompt_tokens", "skipped", "rollout_halved"
    *found, broken = run.sum(sum(map(len, prompts)), run.loader.left_out, run.halved, run.loader.broken)
    check_left_out(run, broken)
    return dict(zip(names, found, strict=True))


def write_rollouts(run, step, processor, prompts, groups):
    """Append every completion of the step, of all ranks, to rollouts.jsonl. Returns what was written (rank 0)."""
    spell = cache(lambda token: processor.backend.decode([token], skip_special_tokens=False))
    ranks = gather([row(step, prompts[r.group], r, spell) for group in groups for r in group])
    rows = [row for rows in ranks for row in rows]
    if run.rank == 0:
        append(run.folder / ROLLOUTS, rows)
    return rows


def evaluate_and_tell(run, model, processor, held_out, log):
    """Log answer accuracy after this step, greedy and sampled; True if the greedy one is the best so far (of equals the
    latest)."""
    began = time.perf_counter()
    greedy = evaluate(run, model, processor, held_out)
    sampled = evaluate(run, model, processor, held_out, run.cfg.temperature, run.cfg.seed)
    seconds, accuracy, count = time.perf_counter() - began, greedy.accuracy, greedy.count
    better = count > 0 and run.step > 0 and (run.best is None or accuracy >= run.best["accuracy"])
    if better:
        run.best = {"step": run.step, "accuracy": accuracy}
    if count and sampled.count:
        text = f"answers right: {accuracy:.1%} greedy, {sampled.accuracy:.1%} sampled, of {count} held-out samples"
        run.say(f"step {run.step:>6}  {text}{', the best so far' if better else ''}  ({seconds:.1f} s)")
    told = {"eval_accuracy": accuracy, "eval_sampled_accuracy": sampled.accuracy, "eval_count": count}
    told["evaluation"] = evaluation_facts(run, model, processor, held_out, greedy, log.total)
    log.write(run.step, told | {"eval_seconds": seconds})
    return better


if __name__ == "__main__":
    cli(main)

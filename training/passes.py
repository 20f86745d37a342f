"""Completions of groups packed for the update's forward passes: each group's prompt stands once in a pass."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset.batch import pack_groups
from model.qwen import IGNORE, Packed
from training.groups import Rollout


@dataclass(eq=False)
class MicroBatch:
    """Completions of one forward pass. N completion tokens, G completions."""

    packed: Packed
    rows: Tensor  # (N,) int64: packed positions that predict a completion's token
    completion: Tensor  # (N,) int64: whose token it is
    group: Tensor  # (G,) int64: of which of the step's groups
    advantages: Tensor  # (G,) float32
    keep: Tensor  # (G,) bool: whether it gives a gradient
    sampler: Tensor  # (N,) float32: log-probs as drawn
    ref: Tensor | None = None  # (N,) under the frozen reference
    old: Tensor | None = None  # (N,) before the first update, with several updates a set of rollouts

    def to(self, device):
        names = ("packed", "rows", "completion", "group", "advantages", "keep", "sampler")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def micro_batches(prompts, groups: list[list[Rollout]], cfg) -> list[MicroBatch]:
    """Groups of Rollouts as MicroBatches of at most per_device_train_batch_size completions and pack_tokens tokens.
    prompts: Examples by the groups' numbers, a list or dict."""
    tokens = {rollout.group: len(prompts[rollout.group]) for group in groups for rollout in group}
    return [micro_batch(prompts, rollouts, cfg) for rollouts in cut(groups, tokens, cfg)]


def cut(groups: list[list[Rollout]], tokens: dict[int, int], cfg) -> list[list[Rollout]]:
    """The Rollouts of each pass, in their order. tokens: of each group's prompt."""
    bins, size = [], 0
    for rollout in (rollout for group in groups for rollout in group):
        prompt = tokens[rollout.group]
        cost = len(rollout.ids) + (0 if bins and bins[-1][-1].group == rollout.group else prompt)
        full = bins and len(bins[-1]) == cfg.per_device_train_batch_size
        if not bins or full or (cfg.pack_tokens and size + cost > cfg.pack_tokens):
            bins.append([])
            size, cost = 0, len(rollout.ids) + prompt
        bins[-1].append(rollout)
        size += cost
    return bins


def micro_batch(prompts, rollouts: list[Rollout], cfg) -> MicroBatch:
    """Rollouts, those of a group beside each other -> MicroBatch."""
    numbers = list(dict.fromkeys(rollout.group for rollout in rollouts))
    completions = [[rollout.ids for rollout in rollouts if rollout.group == number] for number in numbers]
    packed = pack_groups([prompts[number] for number in numbers], completions)
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
    return MicroBatch(
        packed=packed,
        rows=(packed.targets != IGNORE).nonzero()[:, 0],
        completion=torch.arange(len(rollouts)).repeat_interleave(lengths),
        group=torch.tensor([rollout.group for rollout in rollouts]),
        advantages=torch.tensor([rollout.advantage for rollout in rollouts]),
        keep=torch.tensor([rollout.kept(cfg) for rollout in rollouts]),
        sampler=torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs]),
    )

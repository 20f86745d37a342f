"""Completions: sampled, scored, written to rollouts.jsonl. train_grpo.py trains on groups of them; evaluate.py and
infer.py sample one a prompt."""

import logging
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from checkpoint import ROLLOUTS, append_lines
from data import Example, pack
from memory import out_of_memory
from model.decode import Completion, Sampling, generate
from records import clip_name, record_name
from rewards import Reward, Sample, accuracy, judge, judge_all, sample_from_record, score, total

log = logging.getLogger("rollouts")
SAMPLED_TOKENS = 131_072  # of prompts and completions sampled together; their keys and values take 4.8 GB at 3B


@dataclass(eq=False)
class Rollout:
    """One completion, and what becomes of it."""

    group: int  # number of its group among those of the step
    ids: list[int]  # with the end token, if it came to one
    logprobs: list[float]  # of ids as they were drawn
    finished: bool  # by an end token, not by the length limit
    text: str
    components: dict[str, float] = field(default_factory=dict)  # unweighted value of each reward
    reward: float = 0.0  # their weighted sum
    right: float = 0.0  # the accuracy reward, whether or not it is one of the components
    advantage: float = 0.0
    masked: bool = False  # it gives no gradient where its group is trained on

    @property
    def finite(self) -> bool:
        """Whether the logits that it was drawn from were finite."""
        return all(map(math.isfinite, self.logprobs))


@dataclass(eq=False)
class Group:
    """The completions of one prompt. It is known by its number: several prompts may have the same text."""

    record: int  # number of the prompt's record
    prompt_tokens: int
    rollouts: list[Rollout]
    number: int = 0  # among the groups of the step
    owner: int = 0  # rank that sampled it
    facts: dict = field(default_factory=dict)  # id, video, question and answer of the record, for rollouts.jsonl
    differs: bool = False  # its completions differ in accuracy, and are finite
    trained: bool = False  # it is trained on in this step

    @property
    def finite(self) -> bool:
        return all(rollout.finite for rollout in self.rollouts)


class Sampler:
    """Samples completions of Examples, what is too large in two halves. Where memory runs out, whatever is as large is
    too large from then on."""

    def __init__(self, model, processor, cfg):
        self.model, self.processor, self.cfg, self.device = model, processor, cfg, model.head_weight.device
        self.stop_ids = processor.im_end, processor.token_id("<|endoftext|>")
        self.oom_retries = 0  # times that it was done in halves
        self.max_tokens = SAMPLED_TOKENS  # as many are not tried at once

    def __call__(self, batch: list[Example], sampling: Sampling, count: int, seeds: list[int], on_token=None):
        """`count` Completions of each Example, a list of lists. seeds: what each draws from, so that it does not matter
        which are sampled together. on_token(row, id): called for every token as it is drawn."""
        if not batch:
            return []
        # keys and values are held for as many: prompts as long as the longest, completions as long as they may get
        tokens = len(batch) * (max(map(len, batch)) + count * sampling.max_new_tokens)
        if tokens < self.max_tokens or len(batch) == 1:
            packed = pack(batch).to(self.device)
            generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
            try:
                return generate(self.model, packed, sampling, count, generators, on_token)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    lower = "--max_completion_length, --max_new_tokens or --nframes"
                    raise out_of_memory(self.device, f"sampling {count} x 1 prompt", lower) from None
            self.oom_retries += 1
            self.max_tokens = tokens
            self.model.ops.graphs = None  # the memory of the graphs of small passes is worth more now
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the halves need other sizes
            what = f"{count} x {len(batch)} prompts (at most {tokens:,} tokens)"
            log.warning(f"out of GPU memory while sampling {what}: in halves from now on")
        half = (len(batch) + 1) // 2
        first = self(batch[:half], sampling, count, seeds[:half], on_token)
        return first + self(batch[half:], sampling, count, seeds[half:], on_token)

    def rollout(self, group: int, completion: Completion) -> Rollout:
        text = self.processor.backend.decode(completion.ids, skip_special_tokens=True)
        return Rollout(group, completion.ids, completion.logprobs, completion.finished, text)


def prompt_batches(examples: Iterator[Example], budget: int) -> Iterator[list[Example]]:
    """Examples in lists of at most `budget` prompt tokens (one Example at least)."""
    batch = []
    for example in examples:
        if batch and sum(map(len, batch)) + len(example) > budget:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def score_group(rewards: list[Reward], group: Group, record: dict, shuffled: list[str], limit: int) -> None:
    """Fill in a group's facts and rewards. shuffled: texts of completions on shuffled frames, [] where no reward needs
    them. limit: tokens that a completion may take."""
    sample, texts = sample_from_record(record), [rollout.text for rollout in group.rollouts]
    for rollout in group.rollouts:
        rollout.right = accuracy(rollout.text, sample)
    context = {}
    if shuffled:
        context["accuracy"] = statistics.fmean(rollout.right for rollout in group.rollouts)
        context["shuffled_accuracy"] = statistics.fmean(accuracy(text, sample) for text in shuffled)
    for reward in rewards:
        if reward.fn is judge:  # asks for all of a group at once
            judge_all(texts, sample)
    for rollout in group.rollouts:
        length = {"n_tokens": len(rollout.ids), "max_tokens": limit, "truncated": not rollout.finished}
        rollout.components = score(rewards, rollout.text, replace(sample, **length, context=context))
        rollout.reward = total(rewards, rollout.components)
    group.facts, group.differs = facts_of(record, sample), group.finite and differ(group.rollouts)


def differ(rollouts: list[Rollout]) -> bool:
    """Whether completions differ in accuracy (in reward, where that is no component), and in reward too, which a weight
    of 0 may prevent. Values that are apart by rounding alone are equal."""
    apart = lambda values: max(values) - min(values) > 1e-9 * max(1.0, max(map(abs, values)))
    accuracies = [rollout.components.get("accuracy", rollout.reward) for rollout in rollouts]
    return apart([rollout.reward for rollout in rollouts]) and apart(accuracies)


def reward_metrics(groups: list[Group], group_std: list[float]) -> dict[str, float]:
    """All groups of a step, and the std of rewards in each -> metrics over everything that was sampled."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    columns = {"reward": [rollout.reward for rollout in rollouts]}
    columns |= {f"reward/{name}": [r.components[name] for r in rollouts] for name in rollouts[0].components}
    metrics = {name: statistics.fmean(values) for name, values in columns.items()}
    metrics |= {f"{name}_std": statistics.stdev(values) for name, values in columns.items()}
    right = [statistics.fmean(rollout.right for rollout in group.rollouts) for group in groups]
    return metrics | {
        "accuracy": statistics.fmean(right),
        "all_right": right.count(1) / len(groups),
        "all_wrong": right.count(0) / len(groups),
        "no_variance": group_std.count(0) / len(groups),
        "length": statistics.fmean(len(rollout.ids) for rollout in rollouts),
        "prompt_tokens": sum(group.prompt_tokens for group in groups),
        "completion_tokens": sum(len(rollout.ids) for rollout in rollouts),
        "truncated": statistics.fmean(not rollout.finished for rollout in rollouts),
        "not_finite": sum(not rollout.finite for rollout in rollouts),
    }


def write_rollouts(run, step: int, groups: list[Group]) -> None:
    """Append every completion of the step, of all ranks, to rollouts.jsonl: text and rewards; question and answer once
    a group, tokens and log-probs only of the groups that report.py may show: best, worst and widest in reward."""
    if run.rank:
        return
    decode_token = cache(lambda token: run.sampler.processor.backend.decode([token], skip_special_tokens=False))
    rewards = {group: [rollout.reward for rollout in group.rollouts] for group in groups}
    height, width = lambda group: sum(rewards[group]), lambda group: max(rewards[group]) - min(rewards[group])
    detailed = max(groups, key=height), min(groups, key=height), max(groups, key=width)
    rows = []
    for group in groups:
        for k, rollout in enumerate(group.rollouts):
            facts = {"id": group.facts["id"]} if k else group.facts
            rows.append(row(step, facts, group, rollout, decode_token if group in detailed else None))
    append_lines(run.folder / ROLLOUTS, rows)


def facts_of(record: dict, sample: Sample) -> dict:
    """What rollouts.jsonl says of a prompt."""
    name = {"id": record.get("id", record_name(record)), "video": clip_name(record)}
    return name | {"question": sample.question, "answer": sample.answer}


def row(step: int, facts: dict, group: Group, rollout: Rollout, decode_token: Callable[[int], str] | None) -> dict:
    """One line of rollouts.jsonl. decode_token: token id -> its text; None: without tokens and their log-probs."""
    line = {"step": step, "prompt": rollout.group, **facts, "completion": rollout.text, "reward": rollout.reward}
    line |= {"rewards": rollout.components, "advantage": round(rollout.advantage, 4), "trained": group.trained}
    line |= {"finished": rollout.finished, "n_tokens": len(rollout.ids)}
    if decode_token:
        line["tokens"] = [decode_token(token) for token in rollout.ids]
        line["logprobs"] = [round(value, 4) if math.isfinite(value) else None for value in rollout.logprobs]
    return line

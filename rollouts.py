"""Completions: sampled, scored, written to rollouts.jsonl and shown.

train_grpo.py trains on groups of them; evaluate.py and infer.py sample one a prompt.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import torch

import ranks
from checkpoint import ROLLOUTS, append_lines
from data import Example, pack
from memory import out_of_memory
from model.decode import Completion, Sampling, generate
from records import clip_name, record_name
from rewards import Reward, Sample, ServerJudge, accuracy, sample_from_record, score, temporal, total

log = logging.getLogger("rollouts")

# Fewer prompt and completion tokens than this are sampled together: their keys and values take 4.8 GB at the 3B shape
# (36 layers x 2 x 2 heads x 128 numbers x 2 bytes a token).
SAMPLED_TOKENS = 131_072
ALARM_STEPS = 10  # steps that reward and zero-variance groups are watched over


@dataclass(eq=False)
class Rollout:
    """One completion, and what becomes of it."""

    prompt: int  # number of its group among those of the step
    ids: list[int]  # with the end token, if it came to one
    logprobs: list[float]  # of ids as they were drawn
    finished: bool  # by an end token, not by the length limit
    text: str
    components: dict[str, float] = field(default_factory=dict)  # unweighted value of each reward
    reward: float = 0.0  # their weighted sum
    right: float = 0.0  # the accuracy reward, whether or not it is one of the components
    advantage: float = 0.0
    masked: bool = False  # it gives no gradient where its group is trained on
    finite: bool = field(init=False)  # the logits that it was drawn from were finite, and it could be drawn

    def __post_init__(self):
        self.finite = all(map(math.isfinite, self.logprobs))


@dataclass(eq=False)
class Group:
    """The completions of one prompt. It is known by its number: several prompts may have the same text."""

    record: int  # number of the prompt's record
    prompt_tokens: int
    rollouts: list[Rollout]
    number: int = 0  # among the groups of the step
    owner: int = 0  # rank that sampled it
    facts: dict = field(default_factory=dict)  # id, video, question and answer of the record, for rollouts.jsonl
    finite: bool = field(init=False)  # all its rollouts are
    differs: bool = False  # it can be trained on, and its completions differ in accuracy: see `differ`
    trained: bool = False  # it is trained on in this step

    def __post_init__(self):
        self.finite = all(rollout.finite for rollout in self.rollouts)


# -- Sampling


class Sampler:
    """Samples completions of Examples; what is too large for the memory in two halves, each prompt sampled once. Where
    memory runs out, whatever is as large is too large from then on."""

    def __init__(self, model, processor, cfg):
        self.model, self.processor, self.cfg = model, processor, cfg
        self.device = model.head_weight.device
        self.stop_ids = processor.im_end, processor.token_id("<|endoftext|>")
        self.oom_retries = 0  # times that it was done in halves
        self.max_tokens = SAMPLED_TOKENS  # as many are not tried at once

    def __call__(self, batch: list[Example], sampling: Sampling, count: int, seeds: list[int], on_token=None):
        """`count` Completions of each Example, a list of lists. UserError where a single prompt is too much.

        seeds: what each prompt draws from, so in exact arithmetic halves give the same completions. (Products over
        fewer rows may be rounded otherwise; where that moves a logit past another draw, the completion differs.)
        on_token(row, id): called for every token as it is drawn.
        """
        # keys and values are held for as many: prompts as long as the longest, completions as long as they may get
        tokens = len(batch) * (max(map(len, batch)) + count * sampling.max_new_tokens)
        if tokens < self.max_tokens or len(batch) == 1:
            packed, training = pack(batch), self.model.training
            generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
            try:
                return generate(self.model, packed.to(self.device), sampling, count, generators, on_token)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    lower = "--max_completion_length, --max_new_tokens or --nframes"
                    raise out_of_memory(self.device, f"sampling {count} x 1 prompt", [packed], lower) from None
            self.sample_less(tokens, f"{count} x {len(batch)} prompts", training)
        half = (len(batch) + 1) // 2
        first = self(batch[:half], sampling, count, seeds[:half], on_token)
        return first + self(batch[half:], sampling, count, seeds[half:], on_token)

    def sample_less(self, tokens, what, training):
        """After memory ran out: free what can be freed, and remember the size."""
        self.oom_retries += 1
        self.max_tokens = tokens
        self.model.ops.graphs = None  # the memory of the graphs of small passes, if there are any, is worth more now
        self.model.train(training)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the halves need other sizes
        log.warning(f"out of GPU memory while sampling {what} (at most {tokens:,} tokens): in halves from now on")

    def rollout(self, prompt: int, completion: Completion) -> Rollout:
        text = self.processor.backend.decode(completion.ids, skip_special_tokens=True)
        return Rollout(prompt, completion.ids, completion.logprobs, completion.finished, text)


def prompt_batches(examples: Iterator[Example], budget: int) -> Iterator[list[Example]]:
    """Examples in lists of at most `budget` prompt tokens (one Example at least)."""
    batch, tokens = [], 0
    for example in examples:
        if batch and tokens + len(example) > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(example)
        tokens += len(example)
    if batch:
        yield batch


class GroupSampler:
    """Samples and scores the groups of GRPO's steps.

    batches: of the Loader, one list of this rank's prompts for each round of sampling. rounds: made so far, over all
    steps; a resumed run goes on with the next prompts.
    """

    def __init__(self, run, rewards: list[Reward], batches: Iterator, rounds: int):
        self.run, self.rewards, self.batches, self.rounds = run, rewards, batches, rounds
        self.needs_shuffled = any(reward.fn is temporal for reward in rewards)
        self.waited = 0.0  # seconds that the last step waited for data

    def sample_step(self, step: int, wanted: int) -> tuple[list[Group], dict[int, Example]]:
        """Rounds of sampling until `wanted` groups of all ranks together differ in accuracy, or max_resample more
        rounds were made (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2).

        Returns the groups of all ranks in the order of their prompts, and {number of the group: Example} of this
        rank's.
        """
        groups, examples, self.waited = [], {}, 0.0
        for resampled in range(1 + self.run.cfg.max_resample):
            began = time.perf_counter()
            (prompts,) = next(self.batches)
            self.waited += time.perf_counter() - began
            before = len(groups)
            for rank, theirs in enumerate(ranks.gather(self.sample_round(step, resampled, prompts))):
                if rank == self.run.rank:
                    examples |= zip(range(len(groups), len(groups) + len(theirs)), prompts, strict=True)
                for group in theirs:
                    group.number, group.owner = len(groups), rank
                    for rollout in group.rollouts:
                        rollout.prompt = group.number
                    groups.append(group)
            self.rounds += 1
            if len(groups) == before or sum(group.differs for group in groups) >= wanted:  # no prompt was read; enough
                break
        return groups, examples

    def sample_round(self, step: int, resampled: int, prompts: list[Example]) -> list[Group]:
        """A Group of scored completions for each of this rank's prompts. resampled: rounds before, in this step."""
        cfg, groups = self.run.cfg, []
        rollouts = self.sample(prompts, self.prompt_seeds(step, prompts, 2 * resampled), cfg.num_generations)
        shuffled = [None] * len(prompts)
        if self.needs_shuffled:
            shuffled = self.sample_shuffled(prompts, self.prompt_seeds(step, prompts, 2 * resampled + 1))
        records = [prompt.record for prompt in prompts]
        samples = score_groups(self.rewards, records, rollouts, shuffled, cfg.max_completion_length)
        for prompt, sample, theirs in zip(prompts, samples, rollouts, strict=True):
            group = Group(prompt.number, len(prompt), theirs)
            group.differs = group.finite and differ(theirs)
            group.facts = facts_of(prompt.record, sample)
            groups.append(group)
        return groups

    def prompt_seeds(self, step: int, prompts: list[Example], stream: int) -> list[int]:
        """What each prompt draws from, the same on any number of ranks. stream: 0, 1, … within a step."""
        seed = self.run.cfg.seed + 1_000_003 * (step + 1) + 15_485_863 * stream
        return [seed + 7_919 * prompt.number for prompt in prompts]

    def sample(self, prompts: list[Example], seeds: list[int], count: int) -> list[list[Rollout]]:
        """`count` Rollouts of each prompt under the policy as it is. seeds: one a prompt, so that it does not matter
        which prompts a rank has, or samples together."""
        cfg, sampler = self.run.cfg, self.run.sampler
        limit, stop_ids = cfg.max_completion_length, sampler.stop_ids
        sampling = Sampling(limit, cfg.temperature, cfg.top_k, cfg.top_p, stop_ids=stop_ids)
        sampled = sampler(prompts, sampling, count, seeds) if prompts else []
        return [[sampler.rollout(k, completion) for completion in each] for k, each in enumerate(sampled)]

    def sample_shuffled(self, prompts: list[Example], seeds: list[int]) -> list[list[str] | None]:
        """Texts of half as many completions of each prompt with its frames in random order; None where there is no
        order to change: a text, an image, a clip of two frames."""
        able = [k for k, prompt in enumerate(prompts) if any(steps > 1 for steps, _, _ in prompt.grid_thw)]
        encode = self.run.sampler.processor.encode
        examples = [encode(prompts[k].record, answer=False, control="shuffled") for k in able]
        count = max(1, self.run.cfg.num_generations // 2)
        rollouts = self.sample(examples, [seeds[k] for k in able], count)
        texts = {k: [rollout.text for rollout in each] for k, each in zip(able, rollouts, strict=True)}
        return [texts.get(k) for k in range(len(prompts))]


# -- Rewards


def score_groups(
    rewards: list[Reward], records: list[dict], rollouts: list[list[Rollout]], shuffled: list, limit: int
) -> list[Sample]:
    """Fill in right, components and reward of each record's Rollouts; returns the records as Samples.

    shuffled: texts of completions on shuffled frames for each record, where a reward needs them, else None. limit:
    tokens that a completion may take. UserError where a reward fails, with its name and the completion.
    """
    samples = [sample_from_record(record) for record in records]
    for sample, theirs in zip(samples, rollouts, strict=True):
        for rollout in theirs:
            rollout.right = accuracy(rollout.text, sample)
    for sample, theirs, on_shuffled in zip(samples, rollouts, shuffled, strict=True):
        texts = [rollout.text for rollout in theirs]
        context = {}
        if on_shuffled:
            context["accuracy"] = statistics.fmean(rollout.right for rollout in theirs)
            context["shuffled_accuracy"] = statistics.fmean(accuracy(text, sample) for text in on_shuffled)
        for reward in rewards:
            if isinstance(reward.fn, ServerJudge):  # asks for all of a group at once
                reward.fn.score_group(texts, sample)
        for rollout in theirs:
            length = {"n_tokens": len(rollout.ids), "max_tokens": limit, "truncated": not rollout.finished}
            rollout.components = score(rewards, rollout.text, replace(sample, **length, context=context))
            rollout.reward = total(rewards, rollout.components)
    return samples


def differ(rollouts: list[Rollout]) -> bool:
    """Whether completions of a prompt differ in accuracy (where that is no component: in reward), and that in the
    reward too, which a weight of 0 may prevent. Values that are apart by rounding alone are equal."""
    apart = lambda values: max(values) - min(values) > 1e-9 * max(1.0, max(map(abs, values)))
    rewards = [rollout.reward for rollout in rollouts]
    accuracies = [rollout.components.get("accuracy", rollout.reward) for rollout in rollouts]
    return apart(rewards) and apart(accuracies)


def reward_metrics(groups: list[Group], group_std: list[float]) -> dict[str, float]:
    """All groups of a step, and the std of rewards in each -> metrics over everything that was sampled."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    columns = {"reward": [rollout.reward for rollout in rollouts]}
    columns |= {f"reward/{name}": [r.components[name] for r in rollouts] for name in rollouts[0].components}
    metrics = {}
    for name, values in columns.items():
        metrics |= {name: statistics.fmean(values), f"{name}_std": statistics.stdev(values)}
    right = [statistics.fmean(rollout.right for rollout in group.rollouts) for group in groups]
    return metrics | {
        "accuracy": statistics.fmean(right),
        "all_right": right.count(1) / len(groups),
        "all_wrong": right.count(0) / len(groups),
        "no_variance": group_std.count(0) / len(groups),
        "group_std": statistics.fmean(group_std),
        "length": statistics.fmean(len(rollout.ids) for rollout in rollouts),
        "prompt_tokens": sum(group.prompt_tokens for group in groups),
        "completion_tokens": sum(len(rollout.ids) for rollout in rollouts),
        "truncated": statistics.fmean(not rollout.finished for rollout in rollouts),
        "not_finite": sum(not rollout.finite for rollout in rollouts),
    }


# -- rollouts.jsonl and the console


def write_rollouts(run, step: int, groups: list[Group]):
    """Append every completion of the step, of all ranks, to rollouts.jsonl: text and rewards; question and answer once
    a group, tokens and log-probs only of the groups that report.py may show: best, worst and widest in reward."""
    if run.rank or not groups:
        return
    decode_token = cache(lambda token: run.sampler.processor.backend.decode([token], skip_special_tokens=False))
    mean = lambda group: sum(rollout.reward for rollout in group.rollouts)
    detailed = max(groups, key=mean), min(groups, key=mean), max(groups, key=reward_range)
    rows = []
    for group in groups:
        facts, decode = group.facts, decode_token if group in detailed else None
        for rollout in group.rollouts:
            rows.append(row(step, facts, group, rollout, decode))
            facts = {"id": facts["id"]}
    append_lines(run.folder / ROLLOUTS, rows)


def reward_range(group: Group) -> float:
    rewards = [rollout.reward for rollout in group.rollouts]
    return max(rewards) - min(rewards)


def facts_of(record: dict, sample: Sample) -> dict:
    """What rollouts.jsonl says of a prompt."""
    name = {"id": record.get("id", record_name(record)), "video": clip_name(record)}
    return name | {"question": sample.question, "answer": sample.answer}


def row(step: int, facts: dict, group: Group, rollout: Rollout, decode_token: Callable[[int], str] | None) -> dict:
    """One line of rollouts.jsonl, in the words that report.py reads. decode_token: token id -> its text; None: without
    tokens and their log-probs."""
    line = {
        "step": step,
        "prompt": rollout.prompt,
        **facts,
        "completion": rollout.text,
        "reward": rollout.reward,
        "rewards": rollout.components,
        "advantage": round(rollout.advantage, 4),
        "trained": group.trained,
        "finished": rollout.finished,
        "n_tokens": len(rollout.ids),
    }
    if decode_token:
        line["tokens"] = [decode_token(token) for token in rollout.ids]
        line["logprobs"] = [round(value, 4) if math.isfinite(value) else None for value in rollout.logprobs]
    return line


def shown_rollouts(cfg, step: int, groups: list[Group]) -> list[str]:
    """Every log_completions steps two completions of the group whose rewards differ most: the best and the worst."""
    if not cfg.log_completions or step % cfg.log_completions or not groups:
        return []
    rollouts, lines = max(groups, key=reward_range).rollouts, []
    for word, choose in (("best", max), ("worst", min)):
        rollout = choose(rollouts, key=lambda r: r.reward)
        components = ", ".join(f"{name} {value:g}" for name, value in rollout.components.items())
        end = "" if rollout.finished else " … (truncated)"
        lines.append(f"{word:>5} of a group: reward {rollout.reward:g} ({components}): {rollout.text!r}{end}")
    return lines


class Alarm:
    """Notices when learning stands still or falls back. Its state is saved: a resumed run says the same."""

    def __init__(self, state: dict | None = None):
        start = {"flat": 0, "rewards": [], "best": None, "widest": 0.0, "reported": 0}
        self.state = start | (state or {})

    def look(self, step: int, metrics: dict) -> list[str]:
        """Warnings after this step: [] when all is well."""
        return [*self.standing_still(metrics), *(self.falling_back(step, metrics) if "reward" in metrics else [])]

    def standing_still(self, metrics):
        """After every ALARM_STEPS steps in a row in which rewards were equal within each group."""
        self.state["flat"] = flat = 0 if metrics.get("no_variance", 0) < 1 else self.state["flat"] + 1
        if flat and flat % ALARM_STEPS == 0:
            right, wrong = (metrics.get(name, 0.0) for name in ("all_right", "all_wrong"))
            text = f"nothing to learn for {flat} steps: the rewards are equal in each group"
            yield f"{text} (groups all right {right:.0%}, all wrong {wrong:.0%})"

    def falling_back(self, step, metrics):
        """The mean reward of ALARM_STEPS steps fell below its best by half of the widest spread within a step."""
        state = self.state
        state["rewards"] = [*state["rewards"], metrics["reward"]][-ALARM_STEPS:]
        state["widest"] = max(state["widest"], metrics["reward_std"])
        if len(state["rewards"]) < ALARM_STEPS:
            return
        mean = sum(state["rewards"]) / ALARM_STEPS
        state["best"] = mean if state["best"] is None else max(mean, state["best"])
        if mean < state["best"] - state["widest"] / 2 and step >= state["reported"] + ALARM_STEPS:
            state["reported"] = step
            text = f"reward collapses: {mean:.3f} over {ALARM_STEPS} steps, it was {state['best']:.3f}"
            yield f"{text}; lower --learning_rate or raise --beta"

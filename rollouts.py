"""Completions: sampled, scored, packed for the update, and written to rollouts.jsonl.

train_grpo.py trains on groups of them; evaluate.py and infer.py sample one a prompt.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from data import Example, pack, pack_groups
from memory import out_of_memory, smaller_sampling
from model.decode import Completion, Sampling, generate
from model.packed import IGNORE, Packed
from records import clip_name, record_name
from rewards import Reward, accuracy, group_context, sample_from_record, score, total

ALARM_STEPS = 10  # steps that reward and group health are watched over

COLUMNS_BEFORE = (("reward", "reward", "6.3f"), ("reward_std", "+-", "5.3f"))
COLUMNS_AFTER = (
    ("all_right", "right", "4.0%"), ("all_wrong", "wrong", "4.0%"), ("no_variance", "flat", "4.0%"),
    ("length", "len", "5.1f"), ("truncated", "cut", "4.0%"), ("kl", "kl", "8.1e"), ("clipped", "clip", "5.1%"),
    ("entropy", "ent", "5.3f"), ("grad_norm", "gnorm", "7.3f"), ("lr", "lr", "7.1e"),
    ("sampler_gap_max", "gap", "6.0e"), ("rollout_seconds", "sample s", "6.2f"), ("update_seconds", "update s", "6.2f"),
)  # fmt: skip


@dataclass(eq=False)
class Rollout:
    """One completion, and what becomes of it. Its group is a number: several prompts may have the same text."""

    group: int  # number of its prompt among those of the step
    ids: list[int]  # with the end token, if it came to one
    logprobs: list[float]  # of ids as they were drawn
    finished: bool  # by an end token, not by the length limit
    text: str
    components: dict[str, float] = field(default_factory=dict)  # unweighted value of each reward
    reward: float = 0.0  # their weighted sum
    right: float = 0.0  # the accuracy reward, whether or not it is one of the components
    advantage: float = 0.0
    finite: bool = field(init=False)  # the logits that it was drawn from were finite, and it could be drawn

    def __post_init__(self):
        self.finite = all(map(math.isfinite, self.logprobs))

    def unmasked(self, cfg) -> bool:
        """Whether it gives a gradient where its group is trained on."""
        return self.finished or not cfg.mask_truncated_completions


@dataclass(eq=False)
class Group:
    """The completions of one prompt. It is known by its number: several prompts may have the same text."""

    record: int  # number of the prompt's record
    prompt_tokens: int
    rollouts: list[Rollout]
    number: int = 0  # among the groups of the step
    owner: int = 0  # rank that sampled it
    trained: bool = False  # it is trained on in this step

    def set_number(self, number: int, owner: int) -> None:
        self.number, self.owner = number, owner
        for rollout in self.rollouts:
            rollout.group = number


def differs(group: Group) -> bool:
    """Whether its completions differ in accuracy (where that is no component: in reward), and that in the reward too,
    which a weight of 0 may prevent. Values that are apart by rounding alone are equal."""
    apart = lambda values: max(values) - min(values) > 1e-9 * max(1.0, max(map(abs, values)))
    rewards = [rollout.reward for rollout in group.rollouts]
    accuracy = [rollout.components.get("accuracy", rollout.reward) for rollout in group.rollouts]
    finite = all(rollout.finite for rollout in group.rollouts)  # else it cannot be trained on
    return finite and apart(rewards) and apart(accuracy)


class Sampler:
    """Samples completions of Examples. Where memory runs out it is done in two halves, each prompt sampled once, and so
    is whatever is as large from then on."""

    def __init__(self, model, processor, cfg):
        self.model, self.processor, self.cfg = model, processor, cfg
        self.device = model.head_weight.device
        self.stop_ids = processor.im_end, processor.token_id("<|endoftext|>")
        self.oom_retries = 0  # times that it was done in halves
        self.max_tokens = math.inf  # as many are no longer tried at once since

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
                    settings = smaller_sampling(self.cfg, sampling.max_new_tokens)
                    raise out_of_memory(self.device, f"sampling {count} x 1 prompt", [packed], settings) from None
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
        tqdm.write(f"out of GPU memory while sampling {what} (at most {tokens:,} tokens): done in halves from now on")

    def rollout(self, group: int, completion: Completion) -> Rollout:
        text = self.processor.backend.decode(completion.ids, skip_special_tokens=True)
        return Rollout(group, completion.ids, completion.logprobs, completion.finished, text)


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


def needs_shuffled(rewards: list[Reward]) -> bool:
    return any("shuffled_accuracy" in reward.needs for reward in rewards)


def score_group(rewards: list[Reward], prompt: Example, group: list[Rollout], shuffled: list[str] | None, limit: int):
    """Fill in components, reward and right. shuffled: texts of completions on shuffled frames, where a reward asks for
    them; limit: tokens that a completion may take. UserError where a reward fails, with its name and the completion."""
    sample = sample_from_record(prompt.record)
    context, texts = {}, [rollout.text for rollout in group]
    if any(reward.needs for reward in rewards):
        context = group_context(sample, texts, shuffled)
    for reward in rewards:
        reward.prepare(texts, sample)
    for rollout in group:
        length = {"n_tokens": len(rollout.ids), "max_tokens": limit, "truncated": not rollout.finished}
        rollout.components = score(rewards, rollout.text, replace(sample, **length, context=context))
        rollout.reward = total(rewards, rollout.components)
        rollout.right = accuracy(rollout.text, sample)


def reward_metrics(groups: list[Group], spread: list[float]) -> dict[str, float]:
    """All groups of a step, and the std of rewards in each -> metrics over everything that was sampled."""
    rows = [rollout for group in groups for rollout in group.rollouts]
    values = {"reward": [rollout.reward for rollout in rows]}
    values |= {f"reward/{name}": [rollout.components[name] for rollout in rows] for name in rows[0].components}
    metrics = {}
    for name, column in values.items():
        metrics |= {name: statistics.fmean(column), f"{name}_std": statistics.stdev(column)}
    right = [statistics.fmean(rollout.right for rollout in group.rollouts) for group in groups]
    return metrics | {
        "accuracy": statistics.fmean(right),
        "all_right": right.count(1) / len(groups),
        "all_wrong": right.count(0) / len(groups),
        "no_variance": spread.count(0) / len(groups),
        "group_std": statistics.fmean(spread),
        "length": statistics.fmean(len(rollout.ids) for rollout in rows),
        "prompt_tokens": sum(group.prompt_tokens for group in groups),
        "completion_tokens": sum(len(rollout.ids) for rollout in rows),
        "truncated": statistics.fmean(not rollout.finished for rollout in rows),
        "not_finite": sum(not rollout.finite for rollout in rows),
    }


# -- Packed for the update


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
        names = ("packed", "rows", "completion", "advantages", "keep", "sampler")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def micro_batch(prompts: dict[int, Example], rollouts: list[Rollout], cfg) -> MicroBatch:
    """Rollouts, those of a group beside each other -> MicroBatch. prompts: by group."""
    numbers = list(dict.fromkeys(rollout.group for rollout in rollouts))
    completions = [[rollout.ids for rollout in rollouts if rollout.group == number] for number in numbers]
    packed = pack_groups([prompts[number] for number in numbers], completions)
    lengths = torch.tensor([len(rollout.ids) for rollout in rollouts])
    return MicroBatch(
        packed=packed,
        rows=(packed.targets != IGNORE).nonzero()[:, 0],
        completion=torch.arange(len(rollouts)).repeat_interleave(lengths),
        advantages=torch.tensor([rollout.advantage for rollout in rollouts]),
        keep=torch.tensor([rollout.unmasked(cfg) for rollout in rollouts]),
        sampler=torch.tensor([logprob for rollout in rollouts for logprob in rollout.logprobs]),
    )


def cut(groups: list[Group], cfg) -> list[list[Rollout]]:
    """The Rollouts of each forward pass, in their order: at most per_device_train_batch_size of them and pack_tokens
    tokens, the prompt of a group counted once a pass."""
    passes, size = [], 0
    for group in groups:
        for rollout in group.rollouts:
            again = passes and passes[-1][-1].group == rollout.group
            cost = len(rollout.ids) + (0 if again else group.prompt_tokens)
            full = passes and len(passes[-1]) == cfg.per_device_train_batch_size
            if not passes or full or (cfg.pack_tokens and size + cost > cfg.pack_tokens):
                passes.append([])
                size, cost = 0, len(rollout.ids) + group.prompt_tokens
            passes[-1].append(rollout)
            size += cost
    return passes


def assign(groups: list[Group], world: int) -> list[list[Group]]:
    """Groups to train on -> those of each rank: its own, whose clips it has decoded, but as many as any other's."""
    shares = [[group for group in groups if group.owner == rank] for rank in range(world)]
    while True:
        most, least = max(shares, key=len), min(shares, key=len)
        if len(most) - len(least) < 2:
            return [sorted(share, key=lambda group: group.number) for share in shares]
        least.append(most.pop())


# -- Shown


def columns(rewards: list[Reward]):
    """Of a step's line on the console: see trainer.Log."""
    components = tuple((f"reward/{reward.name}", reward.name[:8], "6.3f") for reward in rewards)
    return COLUMNS_BEFORE + components + COLUMNS_AFTER


def token_metrics(cfg, total: dict[str, float]) -> dict[str, float]:
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


def row(step: int, record: dict, group: Group, rollout: Rollout, decode_token: Callable[[int], str]) -> dict:
    """One line of rollouts.jsonl, in the words that report.py reads. decode_token: token id -> its text."""
    sample = sample_from_record(record)
    return {
        "step": step,
        "prompt": rollout.group,
        "id": record.get("id", record_name(record)),
        "video": clip_name(record),
        "question": sample.question,
        "answer": sample.answer,
        "completion": rollout.text,
        "reward": rollout.reward,
        "rewards": rollout.components,
        "advantage": round(rollout.advantage, 4),
        "trained": group.trained,
        "finished": rollout.finished,
        "n_tokens": len(rollout.ids),
        "ids": rollout.ids,
        "tokens": [decode_token(token) for token in rollout.ids],
        "logprobs": [round(logprob, 4) if math.isfinite(logprob) else None for logprob in rollout.logprobs],
    }


def best_and_worst(groups: list[Group]) -> list[str]:
    """Two lines: completions of the group whose rewards differ most."""
    spread = lambda rollouts: max(r.reward for r in rollouts) - min(r.reward for r in rollouts)
    group = max((group.rollouts for group in groups), key=spread, default=[])
    lines = []
    for word, choose in (("best", max), ("worst", min)) if group else ():
        rollout = choose(group, key=lambda r: r.reward)
        components = ", ".join(f"{name} {value:g}" for name, value in rollout.components.items())
        cut = "" if rollout.finished else " … (cut)"
        lines.append(f"{word:>5} of a group: reward {rollout.reward:g} ({components}): {rollout.text!r}{cut}")
    return lines


class Alarm:
    """Tells when learning stands still or falls back. Its state goes into checkpoints: a resumed run tells the same."""

    def __init__(self, state: dict | None = None):
        start = {"flat": 0, "rewards": [], "best": None, "widest": 0.0, "reported": 0}
        self.state = start | (state or {})

    def look(self, step: int, metrics: dict) -> list[str]:
        """Lines to tell after this step: [] when all is well."""
        return [*self.standing_still(metrics), *(self.falling_back(step, metrics) if "reward" in metrics else [])]

    def standing_still(self, metrics):
        """After every ALARM_STEPS steps in a row in which rewards were equal within each group."""
        self.state["flat"] = flat = 0 if metrics.get("no_variance", 0) < 1 else self.state["flat"] + 1
        if flat and flat % ALARM_STEPS == 0:
            right, wrong = (metrics.get(name, 0.0) for name in ("all_right", "all_wrong"))
            text = f"for {flat} steps nothing is learned: the rewards are equal in each group"
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

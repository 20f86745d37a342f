"""A group: the completions of one prompt; scored, told on the console and in rollouts.jsonl, watched over the steps."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dataset.batch import Example
from dataset.records import clip_name
from rewards import Reward, group_context, is_correct, sample_from_record, score, total

ROLLOUTS = "rollouts.jsonl"
ALARM_STEPS = 10  # steps that reward and group health are watched over


@dataclass(eq=False)
class Rollout:
    """One completion, and what becomes of it. Its group is a number: several prompts may have the same text."""

    group: int  # number of its prompt among those of this rank and step
    ids: list[int]  # with the end token, if it came to one
    logprobs: list[float]  # of ids as they were drawn
    finished: bool  # by an end token, not by the length limit
    text: str
    parts: dict[str, float] = field(default_factory=dict)  # unweighted value of each reward
    reward: float = 0.0  # their weighted sum
    right: bool = False  # the answer is the dataset's
    number: int = 0  # of its group among those of all ranks
    advantage: float = 0.0
    trained: bool = False  # its group was chosen for the update

    @property
    def sound(self) -> bool:
        """The logits that it was drawn from were finite, and it could be drawn."""
        return all(map(math.isfinite, self.logprobs))


def needs_shuffled(rewards: list[Reward]) -> bool:
    return any("shuffled_accuracy" in reward.needs for reward in rewards)


def score_group(rewards: list[Reward], prompt: Example, group: list[Rollout], shuffled: list[str] | None, limit: int):
    """Fill in parts, reward and right. shuffled: texts of completions on shuffled frames, where a reward asks for them;
    limit: tokens that a completion may take. UserError where a reward fails, with its name and the completion."""
    sample = sample_from_record(prompt.record)
    context = {}
    if any(reward.needs for reward in rewards):
        context = group_context(sample, [rollout.text for rollout in group], shuffled)
    for rollout in group:
        length = {"n_tokens": len(rollout.ids), "max_tokens": limit, "truncated": not rollout.finished}
        rollout.parts = score(rewards, rollout.text, replace(sample, **length, context=context))
        rollout.reward = total(rewards, rollout.parts)
        rollout.right = is_correct(rollout.text, sample)


class Facts(NamedTuple):
    """What other ranks need to know of a completion."""

    reward: float
    right: bool
    tokens: int
    finished: bool
    parts: dict[str, float]
    sound: bool = True


def facts(group: list[Rollout]) -> list[Facts]:
    return [Facts(r.reward, r.right, len(r.ids), r.finished, r.parts, r.sound) for r in group]


def reward_metrics(groups: list[list[Facts]], spread: list[float]) -> dict[str, float]:
    """Facts of all groups of a step, and the std of rewards in each -> metrics over everything that was sampled."""
    rows = [fact for group in groups for fact in group]
    values = {"reward": [fact.reward for fact in rows]}
    values |= {f"reward/{name}": [fact.parts[name] for fact in rows] for name in rows[0].parts}
    metrics = {}
    for name, column in values.items():
        metrics |= {name: statistics.fmean(column), f"{name}_std": statistics.stdev(column)}
    right = [statistics.fmean(fact.right for fact in group) for group in groups]
    return metrics | {
        "accuracy": statistics.fmean(right),
        "all_right": right.count(1) / len(groups),
        "all_wrong": right.count(0) / len(groups),
        "no_variance": spread.count(0) / len(groups),
        "group_std": statistics.fmean(spread),
        "length": statistics.fmean(fact.tokens for fact in rows),
        "completion_tokens": sum(fact.tokens for fact in rows),
        "truncated": statistics.fmean(not fact.finished for fact in rows),
        "not_finite": sum(not fact.sound for fact in rows),
    }


# What one sees of them


def row(step: int, prompt: Example, rollout: Rollout, spell: Callable[[int], str]) -> dict:
    """One line of rollouts.jsonl, in the words that report.py reads. spell: token id -> its text."""
    sample, record = sample_from_record(prompt.record), prompt.record
    return {
        "step": step,
        "prompt": rollout.number,
        "id": record.get("id", prompt.name),
        "video": clip_name(record),
        "question": sample.question,
        "answer": sample.answer,
        "completion": rollout.text,
        "reward": rollout.reward,
        "rewards": rollout.parts,
        "advantage": round(rollout.advantage, 4),
        "trained": rollout.trained,
        "finished": rollout.finished,
        "n_tokens": len(rollout.ids),
        "ids": rollout.ids,
        "tokens": [spell(token) for token in rollout.ids],
        "logprobs": [round(logprob, 4) if math.isfinite(logprob) else None for logprob in rollout.logprobs],
    }


def best_and_worst(groups: list[list[Rollout]]) -> list[str]:
    """Two lines: completions of the group whose rewards differ most."""
    group = max(groups, key=lambda group: max(r.reward for r in group) - min(r.reward for r in group), default=[])
    lines = []
    for word, choose in (("best", max), ("worst", min)) if group else ():
        rollout = choose(group, key=lambda r: r.reward)
        parts = ", ".join(f"{name} {value:g}" for name, value in rollout.parts.items())
        cut = "" if rollout.finished else " … (cut)"
        lines.append(f"{word:>5} of a group: reward {rollout.reward:g} ({parts}): {rollout.text!r}{cut}")
    return lines


class Alarm:
    """Tells when learning stands still or falls back. Its state goes into checkpoints: a resumed run tells the same."""

    def __init__(self, state: dict | None = None):
        start = {"flat": 0, "rewards": [], "best": None, "widest": 0.0, "told": 0}
        self.state = start | (state or {})

    def look(self, step: int, metrics: dict) -> list[str]:
        """Lines to tell after this step: [] when all is well."""
        return [*self.standing_still(metrics), *(self.falling_back(step, metrics) if "reward" in metrics else [])]

    def standing_still(self, metrics):
        """After every ALARM_STEPS steps in a row in which nothing was trained."""
        self.state["flat"] = flat = 0 if metrics["trained_tokens"] else self.state["flat"] + 1
        if flat and flat % ALARM_STEPS == 0:
            right, wrong = (metrics.get(name, 0.0) for name in ("all_right", "all_wrong"))
            text = f"for {flat} steps nothing is learned: the rewards are equal in each group, or all of it is masked"
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
        if mean < state["best"] - state["widest"] / 2 and step >= state["told"] + ALARM_STEPS:
            state["told"] = step
            text = f"reward collapses: {mean:.3f} over {ALARM_STEPS} steps, it was {state['best']:.3f}"
            yield f"{text}; lower --learning_rate or raise --beta"

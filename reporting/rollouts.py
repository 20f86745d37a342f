"""rollouts.jsonl -> the groups of completions that are shown.

The file may be gigabytes. Only its first and its last WINDOW bytes are read, which shows before and after.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from reporting.frames import strip
from reporting.numbers import dict_of, is_number, short

WINDOW = 6 * 2**20  # bytes read at either end of the file
MAX_TOKENS = 600  # shown of one completion
UNFOLDED = 4  # completions of a group that are not folded away: the two best and the two worst
TINTS = (0.9, 0.7, 0.5, 0.3, 0.1)  # probabilities at which a token's tint deepens


@dataclass
class Group:
    """The completions of one prompt at one step."""

    step: int
    sample: str
    lines: list[bytes]  # parsed again where they are shown: a window as objects takes ten times its bytes
    rewards: list[float]

    rows = property(lambda self: [json.loads(line) for line in self.lines])
    mean = property(lambda self: sum(self.rewards) / len(self.rewards))
    spread = property(lambda self: max(self.rewards) - min(self.rewards))


@dataclass
class Rollouts:
    first: list[Group]  # from the beginning of the file
    last: list[Group]  # from its end; the same list for a short file


def read_rollouts(path: Path) -> Rollouts | None:
    """None if the file is not there or holds nothing."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = groups_of(file.read(WINDOW).split(b"\n"))
        size = file.seek(0, os.SEEK_END)
        if size <= WINDOW:
            return Rollouts(first, first) if first else None
        file.seek(size - WINDOW)
        last = groups_of(file.read().split(b"\n"))
    # the group at the cut of a window is incomplete, unless it is the only one
    return Rollouts(first[:-1] or first, last[1:] or last) if first and last else None


def groups_of(lines) -> list[Group]:
    """Groups in the order of the file. Lines cut at the window's edges are no JSON and left out."""
    groups = {}
    for line in lines:
        try:
            row = dict_of(json.loads(line))
        except ValueError:
            continue
        step = row["step"] if is_number(row.get("step")) else 0
        sample = str(row.get("id", row.get("video", "")))
        group = groups.setdefault((step, str(row.get("prompt")), sample), Group(step, sample, [], []))
        group.lines.append(line)
        group.rewards.append(total_reward(row))
    return list(groups.values())


def components(row: dict) -> dict:
    """The components of a completion's reward."""
    return dict_of(row.get("rewards"))


def total_reward(row: dict) -> float:
    """The total; of a row without one, the sum of its components."""
    if is_number(row.get("reward")):
        return row["reward"]
    return sum(value for value in components(row).values() if is_number(value))


# -- What is shown


def informative(groups: list[Group], step: int) -> list[Group]:
    """Of one step: the best group, the worst, and the one whose rewards differ most."""
    groups = [group for group in groups if group.step == step]
    chosen = [max(groups, key=lambda g: g.mean), min(groups, key=lambda g: g.mean), max(groups, key=lambda g: g.spread)]
    return list({id(group): group for group in chosen}.values())


def before_and_after(rollouts: Rollouts) -> list[list[Group]]:
    """[[a prompt's earliest group, its latest]]: of the prompt that gained most, and of the one that gained least."""
    early = {group.sample: group for group in reversed(rollouts.first)}
    late = {group.sample: group for group in rollouts.last}
    pairs = [[early[s], late[s]] for s in sorted(early) if s and s in late and late[s].step > early[s].step]
    pairs.sort(key=lambda pair: pair[0].mean - pair[1].mean)
    return pairs[:1] + pairs[1:][-1:]


def rollout_cards(rollouts: Rollouts, folders: list[Path]) -> dict[str, list[dict]]:
    """{heading: cards}: the same prompt at two steps, the last step, the first."""
    first, last = min(group.step for group in rollouts.first), max(group.step for group in rollouts.last)
    shown = {
        "The same prompt, before and after": before_and_after(rollouts),
        "Last rollouts": [[group] for group in informative(rollouts.last, last)],
        "First rollouts": [[group] for group in informative(rollouts.first, first)] if first < last else [],
    }
    return {title: [card(groups, folders) for groups in cards] for title, cards in shown.items()}


def card(groups: list[Group], folders: list[Path]) -> dict:
    """One clip and question; a column for each group of this prompt."""
    row = groups[0].rows[0]
    return {
        "sample": groups[0].sample,
        "frames": strip(row.get("video"), folders),
        "question": str(row.get("question", "")).replace("<video>\n", "").replace("<image>\n", ""),
        "answer": row.get("answer"),
        "groups": [column(group) for group in groups],
    }


def column(group: Group) -> dict:
    """The best and the worst completions of a group; the others are folded away."""
    ranked = [completion(row) for row in sorted(group.rows, key=total_reward, reverse=True)]
    half = UNFOLDED // 2
    shown, folded = (ranked[:half] + ranked[-half:], ranked[half:-half]) if len(ranked) > UNFOLDED else (ranked, [])
    return {"step": group.step, "mean": group.mean, "size": len(ranked), "shown": shown, "folded": folded}


def completion(row: dict) -> dict:
    """One completion with its reward; without tokens and log-probs its text alone, not tinted."""
    tokens, logprobs, advantage = row.get("tokens"), row.get("logprobs"), row.get("advantage")
    length = len(tokens) if isinstance(tokens, list) else 0
    if not length or not isinstance(logprobs, list) or len(logprobs) != length:
        tokens = [row["completion"]] if row.get("completion") else []
        logprobs = [None] * len(tokens)
    return {
        "reward": short(total_reward(row)),
        "components": [(name, short(v) if is_number(v) else "–") for name, v in components(row).items()],
        "advantage": advantage if is_number(advantage) else None,
        "length": length,
        "truncated": row.get("finished") is False,
        "tokens": [(text, *tint(logprob)) for text, logprob in zip(tokens[:MAX_TOKENS], logprobs)],
        "hidden_tokens": max(0, len(tokens) - MAX_TOKENS),
    }


def tint(logprob: float | None) -> tuple[int, float]:
    """(0 for a likely token … 5 for an unlikely one: the classes p0 … p5; its probability)."""
    if not is_number(logprob) or not math.isfinite(logprob):
        return 0, 0.0
    probability = math.exp(logprob)
    return sum(probability < limit for limit in TINTS), probability

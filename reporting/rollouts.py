"""rollouts.jsonl -> the groups of completions that are shown.

The file may be gigabytes. Only its first and its last WINDOW bytes are read, which shows before and after.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from reporting.numbers import dict_of, is_number

WINDOW = 6 * 2**20  # bytes read at either end of the file
MAX_TOKENS = 600  # shown of one completion
TINTS = (0.9, 0.7, 0.5, 0.3, 0.1)  # probabilities at which a token's tint deepens


@dataclass
class Group:
    """The completions of one prompt at one step."""

    step: int
    sample: str
    lines: list[bytes]  # parsed again where they are shown: a window as objects takes ten times its bytes
    rewards: list[float]

    @property
    def ranked(self) -> list[dict]:
        """The completions from the best to the worst."""
        return sorted(map(json.loads, self.lines), key=total_reward, reverse=True)

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


def rollout_cards(rollouts: Rollouts) -> dict[str, list[list[Group]]]:
    """{heading: cards}: the same prompt at two steps, the last step, the first. A card is groups of one prompt."""
    first, last = min(group.step for group in rollouts.first), max(group.step for group in rollouts.last)
    return {
        "The same prompt, before and after": before_and_after(rollouts),
        "Last rollouts": [[group] for group in informative(rollouts.last, last)],
        "First rollouts": [[group] for group in informative(rollouts.first, first)] if first < last else [],
    }


def shown_tokens(row: dict) -> list[tuple[str, int, float]]:
    """(text, tint, probability) of each token; without tokens and log-probs the completion's text alone.

    tint: 0 for a likely token … 5 for an unlikely one, the classes p0 … p5 of the page.
    """
    tokens, logprobs = row.get("tokens"), row.get("logprobs")
    if not (isinstance(tokens, list) and isinstance(logprobs, list) and len(tokens) == len(logprobs) > 0):
        return [(row["completion"], 0, 1.0)] if row.get("completion") else []
    probabilities = [math.exp(value) if is_number(value) else 1.0 for value in logprobs]
    return [(text, sum(p < limit for limit in TINTS), p) for text, p in zip(tokens, probabilities)][:MAX_TOKENS]

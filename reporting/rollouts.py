"""rollouts.jsonl -> groups of completions, and the cards of them that a page shows."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from reporting.values import json_lines

WINDOW = 4 * 2**20  # bytes read at either end of the file, which may have gigabytes
MAX_TOKENS = 600  # shown of one completion
TINTS = (0.9, 0.7, 0.5, 0.3, 0.1)  # probabilities at which a token's tint deepens


@dataclass
class Group:
    """The completions of one prompt at one step, from the best to the worst."""

    rows: list[dict]

    def __post_init__(self):
        self.rows.sort(key=lambda row: row["reward"], reverse=True)
        self.step, self.sample = self.rows[0]["step"], self.rows[0]["id"]
        self.clip = self.rows[0]["video"]
        self.mean = sum(row["reward"] for row in self.rows) / len(self.rows)
        self.spread = self.rows[0]["reward"] - self.rows[-1]["reward"]


def read_groups(path: Path) -> list[Group]:
    """Groups in the order of the file; of a long file those at its beginning and at its end. [] without a file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        text = file.read(WINDOW)
        gap = path.stat().st_size - 2 * WINDOW
        if gap > 0:
            file.seek(gap, os.SEEK_CUR)
            text += b"\n"
        text += file.read()
    groups = {}
    for row in json_lines(text)[0]:
        rows = groups.setdefault((row["step"], row["prompt"], row["id"]), [])
        rows.append(rows[0] | row if rows else row)  # clip, question and answer stand in the first of a group
    return [Group(rows) for rows in groups.values() if "question" in rows[0]]


def before_and_after(groups: list[Group]) -> list[list[Group]]:
    """[[a prompt's earliest group, its latest]], from the prompt that gained most to the one that gained least."""
    early = {group.sample: group for group in reversed(groups)}
    late = {group.sample: group for group in groups}
    pairs = [[early[s], late[s]] for s in sorted(early, key=str) if late[s].step > early[s].step]
    return sorted(pairs, key=lambda pair: pair[0].mean - pair[1].mean)


def of_step(groups: list[Group], step: int) -> list[list[Group]]:
    """The best group of a step, the worst, and the one whose rewards differ most; each is a card."""
    groups = [group for group in groups if group.step == step]
    chosen = [max(groups, key=lambda g: g.mean), min(groups, key=lambda g: g.mean), max(groups, key=lambda g: g.spread)]
    return [[group] for group in {id(group): group for group in chosen}.values()]


def rollout_cards(groups: list[Group]) -> dict[str, list[list[Group]]]:
    """{heading: cards}: the same prompt at two steps, the last step, the first. A card is groups of one prompt."""
    if not groups:
        return {}
    pairs, first, last = before_and_after(groups), groups[0].step, groups[-1].step
    return {
        "The same prompt, before and after": pairs[:1] + pairs[1:][-1:],
        "Last rollouts": of_step(groups, last),
        "First rollouts": of_step(groups, first) if first < last else [],
    }


def new_cards(groups: list[Group], clips: set[str]) -> dict[str, list[list[Group]]]:
    """One card each: before and after, and of the last step, of clips that are not among `clips`; they are added."""
    result = {}
    for heading, cards in list(rollout_cards(groups).items())[:2]:
        result[heading] = [card for card in cards if card[0].clip not in clips][:1]
        clips.update(card[0].clip for card in result[heading])
    return result


def shown_tokens(row: dict) -> list[tuple[str, int, float]]:
    """(text, tint, probability) of each token; tint: 0 for a likely token … 5 for an unlikely one, p0 … p5 of the page.

    A log-prob that was not finite is null: no tint. Most rows of GRPO come without tokens: the text, untinted.
    """
    if "tokens" not in row:
        return [(row["completion"], 0, 1.0)]
    probabilities = [1.0 if value is None else math.exp(value) for value in row["logprobs"]]
    return [(text, sum(p < limit for limit in TINTS), p) for text, p in zip(row["tokens"], probabilities)][:MAX_TOKENS]

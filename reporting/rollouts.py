"""rollouts.jsonl -> cards one can read: a clip as a strip of frames, the question, what each completion said.

The file may be gigabytes: only its first and its last WINDOW bytes are read, which is what tells before from after.
"""

import io
import json
import math
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from reporting.charts import number, short
from reporting.frames import Strips

WINDOW = 6 * 2**20  # bytes read at either end of the file
TOKENS = 600  # of one completion that are shown
OPEN = 4  # completions of a group that are not folded away: the two best and the two worst
TINTS = (0.9, 0.7, 0.5, 0.3, 0.1)  # probabilities at which a token's tint deepens


# -- Reading


@dataclass
class Group:
    """The completions of one prompt at one step."""

    step: int
    sample: str
    lines: list[memoryview]
    rewards: list[float]

    # Parsed again where they are shown: a window as objects takes ten times its bytes, and who writes the page is the
    # trainer, which keeps what it once took.
    rows = property(lambda self: [json.loads(bytes(line)) for line in self.lines])
    mean = property(lambda self: sum(self.rewards) / len(self.rewards))
    spread = property(lambda self: max(self.rewards) - min(self.rewards))


@dataclass
class Rollouts:
    first: list[Group]  # from the beginning of the file
    last: list[Group]  # from its end; the same list for a short file


def reward(row: dict) -> float:
    """The total; of a row without one, the sum of its parts."""
    if number(row.get("reward")):
        return row["reward"]
    return sum(value for value in parts(row).values() if number(value))


def parts(row: dict) -> dict:
    found = row.get("rewards")
    return found if isinstance(found, dict) else {}


def read_rollouts(path: Path) -> Rollouts | None:
    """None if the file is not there or holds nothing."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.read(WINDOW)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - WINDOW))
        last = file.read() if size > WINDOW else None
    if last is None:
        groups = grouped(first)
        return Rollouts(groups, groups) if groups else None
    # the group at the cut of a window is not whole, unless it is all there is
    early, late = grouped(first), grouped(last)
    return Rollouts(early[:-1] or early, late[1:] or late) if early and late else None


def grouped(data: bytes) -> list[Group]:
    """Groups in the order of the file. Lines cut at the window's edges are no JSON and left out."""

    def rows():
        view, end = memoryview(data), 0
        for line in io.BytesIO(data):
            start, end = end, end + len(line)
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row, view[start:end]

    return groups_of(rows())


def groups_of(rows) -> list[Group]:
    """(row, its line) pairs -> Groups."""
    groups = {}
    for row, line in rows:
        step = row["step"] if number(row.get("step")) else 0
        sample = str(row.get("id", row.get("video", "")))
        key = step, row.get("prompt") if isinstance(row.get("prompt"), int | str) else None, sample
        group = groups.setdefault(key, Group(step, sample, [], []))
        group.lines.append(line)
        group.rewards.append(reward(row))
    return list(groups.values())


# -- Cards


def tint(logprob) -> int:
    """0 (sure) … 5 (a surprise): the class p0 … p5 of a token."""
    if not number(logprob) or not math.isfinite(logprob):
        return 0
    return sum(logprob < math.log(limit) for limit in TINTS)


def tokens_html(row: dict) -> str:
    """The completion, each token tinted by its probability; plain text where tokens or log-probs are not there."""
    tokens, logprobs = row.get("tokens"), row.get("logprobs")
    text = row.get("completion")
    fits = isinstance(tokens, list) and isinstance(logprobs, list) and len(tokens) == len(logprobs) > 0
    if not fits or not all(isinstance(token, str) for token in tokens):
        text = text if isinstance(text, str) else ""
        more = f" … {len(text) - 4 * TOKENS:,} more characters" if len(text) > 4 * TOKENS else ""
        shown = escape(text[: 4 * TOKENS]) or "<small>(empty)</small>"
        return f'<div class="tokens">{shown}<small>{more}</small></div>'
    parts = []
    for token, logprob in zip(tokens[:TOKENS], logprobs, strict=False):
        level = tint(logprob)
        if level:
            parts.append(f'<i class="p{level}" title="{math.exp(logprob):.1%}">{escape(token)}</i>')
        else:
            parts.append(escape(token))
    more = f"<small> … {len(tokens) - TOKENS:,} more tokens</small>" if len(tokens) > TOKENS else ""
    return f'<div class="tokens">{"".join(parts)}{more}</div>'


def said_html(row: dict) -> str:
    """One completion with its rewards."""
    facts = [f"<b>{short(reward(row))}</b>"]
    for name, value in parts(row).items():
        facts.append(f"<span>{escape(name)} {short(value) if number(value) else '–'}</span>")
    advantage = row.get("advantage")
    if number(advantage):
        kind = "good" if advantage > 0 else "bad" if advantage < 0 else "soft"
        facts.append(f'<span class="{kind}">advantage {advantage:+.2f}</span>'.replace("-", "−"))
    if isinstance(row.get("tokens"), list):
        facts.append(f"<span>{len(row['tokens'])} tokens</span>")
    if row.get("finished") is False:
        facts.append('<span class="bad">cut by the limit</span>')
    return f'<div class="said"><div class="head">{"".join(facts)}</div>{tokens_html(row)}</div>'


def good_and_bad_first(rows: list[dict]) -> list[dict]:
    """Best, worst, second best, second worst, then what is between them."""
    ranked = sorted(rows, key=reward, reverse=True)
    ends = [row for pair in zip(ranked, reversed(ranked), strict=True) for row in pair]
    return list({id(row): row for row in ends}.values())


def group_html(group: Group) -> str:
    rows = [said_html(row) for row in good_and_bad_first(group.rows)]
    rest = rows[OPEN:]
    folded = f"<details><summary>{len(rest)} more completions</summary>{''.join(rest)}</details>" if rest else ""
    told = f"mean reward {short(group.mean)} of {len(group.rows)} completions" if len(group.rows) > 1 else ""
    title = f"Step {short(group.step)} <small>{told}</small>"
    return f"<div><h5>{title}</h5>{''.join(rows[:OPEN])}{folded}</div>"


def card(groups: list[Group], strips: Strips) -> str:
    """One clip and question; a column for each group, which are the same prompt at different steps."""
    row = groups[0].rows[0]
    question, answer = (row.get(name) if isinstance(row.get(name), str) else "" for name in ("question", "answer"))
    question = question.replace("<video>\n", "").replace("<image>\n", "")
    right = f'<p class="question"><span class="soft">Right answer:</span> {escape(answer)}</p>' if answer else ""
    columns = "".join(group_html(group) for group in groups)
    return (
        f'<article class="card"><h4>{escape(groups[0].sample) or "a prompt"}</h4><div class="asked">'
        f'<div>{strips.html(row.get("video"))}</div><div><p class="question">{escape(question)}</p>{right}</div></div>'
        f'<div class="columns">{columns}</div></article>'
    )


def telling(groups: list[Group], last: bool) -> list[Group]:
    """Of the outermost steps: the best group, the worst, and the one whose rewards differ most."""
    steps = sorted({group.step for group in groups}, reverse=last)
    pool = [group for group in groups if group.step == steps[0]]
    picks = [max(pool, key=lambda g: g.mean), min(pool, key=lambda g: g.mean), max(pool, key=lambda g: g.spread)]
    return list({id(group): group for group in picks}.values())


def telling_rows(rows: list[dict]) -> list[dict]:
    """Of the completions of a step those of the telling groups."""
    groups = groups_of((row, json.dumps(row).encode()) for row in rows)
    return [row for group in telling(groups, True) for row in group.rows] if groups else []


def before_and_after(rollouts: Rollouts) -> list[list[Group]]:
    """[[a prompt's earliest group, its latest]]: of the prompt that gained most, and of the one that gained least."""
    early, late = {}, {}
    for group in rollouts.first:
        early.setdefault(group.sample, group)
    for group in rollouts.last:
        late[group.sample] = group
    pairs = [[early[s], late[s]] for s in early if s and s in late and late[s].step > early[s].step]
    if not pairs:
        return []
    gain = [after.mean - before.mean for before, after in pairs]
    return [pairs[k] for k in dict.fromkeys([int(np.argmax(gain)), int(np.argmin(gain))])]


def rollouts_html(rollouts: Rollouts, folders: list[Path]) -> str:
    """The section's inside: the tints' key, then before and after, the last steps, the first ones."""
    strips = Strips(folders)
    names = ["≥ 90 %", "≥ 70 %", "≥ 50 %", "≥ 30 %", "≥ 10 %", "less"]
    scale = "".join(f'<i class="p{k}">{name}</i>' for k, name in enumerate(names))
    html = [f'<p class="scale soft">Tokens are tinted by the probability they were drawn with: {scale}</p>']
    if pairs := before_and_after(rollouts):
        html.append("<h3>The same clip, before and after</h3>" + "".join(card(pair, strips) for pair in pairs))
    html.append("<h3>Last rollouts</h3>" + "".join(card([group], strips) for group in telling(rollouts.last, True)))
    if rollouts.first[0].step != rollouts.last[-1].step:
        html.append("<h3>First rollouts</h3>" + "".join(card([g], strips) for g in telling(rollouts.first, False)))
    return "".join(html)

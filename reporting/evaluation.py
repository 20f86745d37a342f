"""Confusion table, controls, accuracy of each class: what evaluations found besides one number."""

import math
from html import escape

import numpy as np

from reporting.charts import COLOURS, number, percent, short
from reporting.pieces import bar
from reporting.reading import Run, evaluation_of

MOST = 30  # different answers in a confusion table


def evaluation(run: Run) -> str:
    """The newest confusion table and the newest controls among what was measured."""
    newest = {
        name: next((found for found in reversed(run.measured) if found.get(name)), None)
        for name in ("confusion", "controls")
    }
    parts = []
    if newest["confusion"] and (found := confusion(newest["confusion"]["confusion"])):
        lead = f"{summary(newest['confusion'])}Rows: the truth; columns: the answer."
        parts.append(f'<div><h3>Confusion</h3><p class="soft">{lead}</p>{found}</div>')
    if newest["controls"] and (found := controls(newest["controls"])):
        chance = newest["controls"].get("chance")
        lead = "The same questions with the frames changed: a model that watches the clip loses accuracy."
        lead += f" Chance is {percent(chance)}." if number(chance) else ""
        lead += " Changed: answers other than for the clip as it is; flipped: become the opposite."
        parts.append(f'<div><h3>Does it watch?</h3><p class="soft">{lead}</p>{found}</div>')
    return f'<div class="side">{"".join(parts)}</div>' if parts else ""


def summary(found: dict) -> str:
    """ "Step 192: 99.8 % right (98.6 % to 100.0 %) of 400. " as far as it is known."""
    if not number(found.get("accuracy")):
        return ""
    step = f"Step {short(found['step'])}: " if number(found.get("step")) else ""
    count = f" of {found['count']:,}" if number(found.get("count")) else ""
    return f"{step}{percent(found['accuracy'])} right{interval(found, ' (', ')')}{count}. "


def interval(found: dict, before="", after="") -> str:
    ends = found.get("interval")
    known = isinstance(ends, list) and len(ends) == 2 and all(map(number, ends))
    return f"{before}{percent(ends[0])} to {percent(ends[1])}{after}" if known else ""


def clean(table) -> dict[str, dict]:
    """{truth: {answer: count}} of what is that in a confusion table."""
    found = {truth: said for truth, said in table.items() if isinstance(said, dict)} if isinstance(table, dict) else {}
    counts = {t: {a: n for a, n in said.items() if number(n) and 0 <= n < math.inf} for t, said in found.items()}
    return counts


def class_accuracy(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {"class/…": (steps, share right)}, like charts.columns; {} for too many classes."""
    found = {}
    for row in rows:
        table = clean((evaluation_of(row) or {}).get("confusion")) if number(row.get("step")) else {}
        for truth, said in table.items():
            if total := sum(said.values()):
                found.setdefault(truth, {})[row["step"]] = said.get(truth, 0) / total
    if not 1 < len(found) <= COLOURS:
        return {}
    return {
        f"class/{truth}": (np.array(sorted(points), float), np.array([points[step] for step in sorted(points)], float))
        for truth, points in sorted(found.items())
    }


def confusion(table: dict) -> str:
    """{truth: {answer: count}} -> a table tinted by the share of each truth's answers; "" beyond MOST answers."""
    counts = clean(table)
    answers = list(dict.fromkeys([*counts, *(answer for said in counts.values() for answer in said)]))
    if not counts or len(answers) > MOST:
        return ""
    rows = []
    for truth, said in counts.items():
        total, cells = sum(said.values()) or 1, []
        for answer in answers:
            n = said.get(answer, 0)
            cells.append(f'<td class="h{min(5, math.ceil(n / total * 5))}" title="{n / total:.1%}">{n}</td>')
        share = f'<td class="soft">{percent(said.get(truth, 0) / total)}</td>'
        rows.append(f"<tr><th>{escape(truth)}</th>{''.join(cells)}{share}</tr>")
    top = "".join(f"<th>{escape(answer)}</th>" for answer in answers)
    head = f"<thead><tr><th></th>{top}<th>right</th></tr></thead>"
    return f'<div class="wide"><table class="confusion">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def controls(found: dict) -> str:
    """{"accuracy", "interval", "controls": {name: share, or an object like this one}} -> a table with bars."""
    plain = {name: value for name, value in found.items() if name not in ("changed", "flipped")}
    lines = [("as it is", plain), *found["controls"].items()]
    lines = [(name, value if isinstance(value, dict) else {"accuracy": value}) for name, value in lines]
    rows = [control(name, value) for name, value in lines if number(value.get("accuracy"))]
    table = f'<table class="controls"><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="wide">{table}</div>' if len(rows) > 1 else ""


def control(name: str, found: dict) -> str:
    """A row: name, accuracy, a bar with its 95 % interval, and what became of the answers."""
    share, ends = found["accuracy"], found["interval"] if interval(found) else None
    told = [interval(found) + (f" of {found['count']:,}" if number(found.get("count")) else "")]
    told += [f"{key} {percent(found[key])}" for key in ("changed", "flipped") if number(found.get(key))]
    cells = (percent(share), bar(share, ends), f"<small>{'<br>'.join(filter(None, told))}</small>")
    return f"<tr><th>{escape(name)}</th><td class=n>{cells[0]}</td><td>{cells[1]}</td><td>{cells[2]}</td></tr>"

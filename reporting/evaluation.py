"""Confusion table, controls, accuracy of each class: what evaluations found besides one number."""

import math
from html import escape

from reporting.charts import number, percent
from reporting.reading import Run


def evaluation(run: Run) -> str:
    """The newest confusion table and the newest controls among what was measured."""
    newest = {
        name: next((found for found in reversed(run.measured) if isinstance(found.get(name), dict)), None)
        for name in ("confusion", "controls")
    }
    parts = []
    if newest["confusion"] and (found := confusion(newest["confusion"]["confusion"])):
        parts.append(f"<div><h3>Confusion <small>rows: the truth; columns: the answer</small></h3>{found}</div>")
    if newest["controls"] and (found := controls(newest["controls"])):
        chance = newest["controls"].get("chance")
        lead = "The same questions with the frames changed: a model that watches the clip loses accuracy."
        lead += f" Chance is {percent(chance)}." if number(chance) else ""
        parts.append(f'<div><h3>Does it watch?</h3><p class="soft">{lead}</p>{found}</div>')
    return f'<div class="side">{"".join(parts)}</div>' if parts else ""


def confusion(table: dict) -> str:
    """{truth: {answer: count}} -> a table tinted by the share of each truth's answers; "" beyond 30 answers."""
    counts = {
        truth: {answer: n for answer, n in said.items() if number(n) and 0 <= n < math.inf}
        for truth, said in table.items() if isinstance(said, dict)
    }  # fmt: skip
    answers = list(dict.fromkeys([*counts, *(answer for said in counts.values() for answer in said)]))
    if not counts or len(answers) > 30:
        return ""
    rows = []
    for truth, said in counts.items():
        total, cells = sum(said.values()) or 1, []
        for answer in answers:
            n = said.get(answer, 0)
            cells.append(f'<td class="h{min(5, math.ceil(n / total * 5))}" title="{n / total:.1%}">{n}</td>')
        rows.append(f"<tr><th>{escape(truth)}</th>{''.join(cells)}</tr>")
    top = "".join(f"<th>{escape(answer)}</th>" for answer in answers)
    head = f"<thead><tr><th></th>{top}</tr></thead>"
    return f'<div class="wide"><table class="confusion">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def controls(found: dict) -> str:
    """{"accuracy", "interval", "controls": {name: share, or an object like this one}} -> a table with bars."""
    lines = [("as it is", found), *found["controls"].items()]
    lines = [(name, value if isinstance(value, dict) else {"accuracy": value}) for name, value in lines]
    rows = [control(name, value) for name, value in lines if number(value.get("accuracy"))]
    return f'<div class="wide"><table><tbody>{"".join(rows)}</tbody></table></div>' if len(rows) > 1 else ""


def control(name: str, found: dict) -> str:
    """A row: name, accuracy, a bar with its 95 % interval, and what became of the answers."""
    share, ends, told = found["accuracy"], found.get("interval"), []
    whisker = ""
    if isinstance(ends, list) and len(ends) == 2 and all(map(number, ends)):
        whisker = f'<path class="whisker" d="M{100 * ends[0]:.1f} 4H{100 * ends[1]:.1f}"/>'
        told.append(f"{percent(ends[0])} to {percent(ends[1])}")
    told += [f"{percent(found[key])} of the answers {key}" for key in ("changed", "flipped") if number(found.get(key))]
    bar = f'<path class="track" d="M0 1h100v6H0z"/><path class="bar" d="M0 1h{100 * share:.1f}v6H0z"/>{whisker}'
    picture = f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'
    return (
        f"<tr><th>{escape(name)}</th><td class=n>{percent(share)}</td><td>{picture}</td>"
        f"<td><small>{'; '.join(told)}</small></td></tr>"
    )

"""Small pieces of HTML that several sections of the report are made of. Cells and bodies are
ready HTML: who makes them escapes what comes from a model, a file or a command line."""

import json

from reporting.charts import COLOURS, short


def plain(value) -> str:
    """Any JSON value as text."""
    if isinstance(value, str):
        return value
    return short(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def table(rows, head: list[str] = ()) -> str:
    """Rows of ready HTML cells, the first of each a heading."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def section(anchor: str, title: str, body: str) -> str:
    """'' for an empty body: what is not there has no heading either."""
    return f'<section id="{anchor}"><h2>{title}</h2>{body}</section>' if body else ""


def key_dot(k: int) -> str:
    """The colour of run k among several."""
    return f'<i class="key s{k % COLOURS}"></i>'


def flat_text(value: dict, before: str = ""):
    """(key, value) of everything in nested objects, but the config."""
    for key, inner in value.items():
        if isinstance(inner, dict) and key != "config":
            yield from flat_text(inner, f"{before}{key}/")
        elif key != "config":
            yield before + key, inner


def bar(share: float, whisker: list | None = None) -> str:
    """A bar from 0 to 1, with the two ends of an interval over it."""
    line = f'<path class="whisker" d="M{100 * whisker[0]:.1f} 4H{100 * whisker[1]:.1f}"/>' if whisker else ""
    inner = f'<path class="track" d="M0 1h100v6H0z"/><path class="bar" d="M0 1h{100 * share:.1f}v6H0z"/>{line}'
    return f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{inner}</svg>'

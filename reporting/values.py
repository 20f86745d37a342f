"""JSON: lines of a file as objects, values as text."""

import json
import re


def json_lines(text: bytes) -> tuple[list[dict], int]:
    """The objects of a .jsonl, and the number of lines that are none: a crash may cut the last."""
    rows, broken = [], 0
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            broken += 1
    return rows, broken


def flatten(tree: dict, prefix: str = ""):
    """(key, value) of each leaf of nested objects; keys are joined with "/"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def short(value: float) -> str:
    """Four digits; thousands as 12.3k."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return re.sub(r"e([+-])0*", r"e\1", f"{value:.4g}")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def plain(value) -> str:
    """Any JSON value as text."""
    if isinstance(value, float):
        return short(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

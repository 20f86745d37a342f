"""Numbers and JSON values as text."""

import json
import math
import re


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short(value: float) -> str:
    """Four digits; thousands as 12.3k."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return re.sub(r"e([+-])0*", r"e\1", f"{value:.4g}").replace("e+", "e")


def percent(share) -> str:
    return f"{100 * share:.1f} %" if is_number(share) and math.isfinite(share) else "–"


def plain(value) -> str:
    """Any JSON value as text."""
    if isinstance(value, str):
        return value
    return short(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def flatten(tree: dict, prefix: str = ""):
    """(key, value) of each leaf of nested objects; keys are joined with "/"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def dict_of(value) -> dict:
    """The value where it is an object, else {}: a file may lack a key or hold something else there."""
    return value if isinstance(value, dict) else {}

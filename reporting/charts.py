"""Rows of metrics.jsonl -> what a page charts: titles, legends, points. The script of assets/report.html draws them."""

import json
import math
import re

import numpy as np

# Title, unit ("%": of shares, drawn times 100), pattern of the keys, section where runs are compared. The first fits.
GROUPS = [
    ("Accuracy", "%", r"^(?!class/|reward).*accuracy", "Results"),
    ("Accuracy by class", "%", r"^class/", "Results"),
    ("Reward", "points", r"^reward(?!.*std)", "Results"),
    ("Loss", "", r"^(?!class/).*loss$", "Training"),
    ("Reward standard deviation", "", r"^(reward|group).*std", "Training"),
    ("Zero-variance groups", "% of the groups", r"all_(right|wrong)|variance", "Training"),
    ("KL to the reference", "nats a token", r"^kl", "Training"),
    ("Truncated completions", "%", r"truncated", "Training"),
    ("Completion length", "tokens", r"length", "Results"),
    ("Clipped fraction", "% of the tokens", r"^clip|capped", "Training"),
    ("Importance ratio", "", r"^ratio$", "Training"),
    ("Entropy", "nats a token", r"entropy", "Training"),
    ("Gradient norm", "before clipping", r"grad_norm", "Training"),
    ("Learning rate", "", r"^(lr|learning_rate)", "Training"),
    ("Log-prob gap, sampler to trainer", "nats", r"gap", "Training"),
    ("Tokens per step", "", r"tokens$", "Speed and memory"),
    ("Throughput", "tokens per second", r"per_second", "Speed and memory"),
    ("Step time", "ms", r"^ms$", "Speed and memory"),
    ("Time", "seconds", r"seconds", "Speed and memory"),
    ("Waiting for data", "% of the step", r"^wait", "Speed and memory"),
    ("Memory", "GiB, peak", r"gib", "Speed and memory"),
    ("Other", "", "", "Training"),
]
# Of several runs two charts of each section are shown, these before others, and the rest is folded
LEADING = ("eval_accuracy", "reward", "loss", "kl", "tokens_per_second", "gib")
LOGARITHMIC = ("Loss", "Gradient norm", "Log-prob gap, sampler to trainer")
ALWAYS_DRAWN = ("Loss", "Accuracy", "Accuracy by class", "Reward")  # even where nothing changes
NOT_CHARTED = {"step", "epoch", "timestamp", "seed", "count", "eval_count", "confusion", "evaluation"}
COLOURS = 8  # classes s0 ... s7 of the page
POINTS = 400  # a longer curve is thinned to this many means, with a band from the lowest to the highest value


def columns(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {key: (steps (N,), values (N,))}, sorted; of a step written twice the later row counts.
    A null is not finite (JSON has no NaN); a key with nothing else is left out. "class/X" is the accuracy on class X.
    """
    points = {}
    for row in rows:
        confusion = row.get("evaluation", {}).get("confusion", {})
        shares = {f"class/{truth}": n.get(truth, 0) / sum(n.values()) for truth, n in sorted(confusion.items())}
        for key, value in (dict(flatten(row)) | (shares if 1 < len(shares) <= COLOURS else {})).items():
            if (value is None or type(value) in (int, float)) and not NOT_CHARTED & {*key.split("/")}:
                points.setdefault(key, {})[row["step"]] = math.nan if value is None else value
    result = {key: tuple(np.array(sorted(value_at.items()), float).T) for key, value_at in points.items()}
    return {key: (steps, values) for key, (steps, values) in result.items() if not np.isnan(values).all()}


def label(key: str) -> str:
    """A key as a legend: 'reward/accuracy' -> 'reward accuracy', 'class/Ascending' -> 'Ascending'."""
    return key.removeprefix("class/").replace("/", " ").replace("_", " ").replace("kl", "KL")


def curve(name: str, steps: np.ndarray, values: np.ndarray, colour: int) -> dict:
    """What the page's script draws: points "step,value", thinned "step,mean,lowest,highest"; not finite: ""."""
    size = -(-len(values) // POINTS)
    stretches = np.ma.masked_invalid(np.r_[values, np.full(-len(values) % size, np.nan)].reshape(-1, size))
    middle = np.minimum(np.arange(len(stretches)) * size + size // 2, len(values) - 1)
    points = [steps[middle], stretches.mean(1), *([stretches.min(1), stretches.max(1)] if size > 1 else [])]
    finite = values[np.isfinite(values)]
    points = " ".join(",".join("" if v is np.ma.masked else f"{v:.6g}" for v in point) for point in zip(*points))
    facts = {"last": short(finite[-1]) if len(finite) else "not finite", "missing": len(values) - len(finite)}
    return {"name": name, "colour": colour % COLOURS, "points": points} | facts


def chart(title: str, group: tuple[str, str, str, str], series: list[tuple[str, np.ndarray, np.ndarray, int]]) -> dict:
    """One chart of [(name, steps, values, colour)]."""
    if group[1].startswith("%"):  # shares; what is beyond 1 is a percentage already
        series = [(name, x, y * 100 if np.nanmax(np.abs(y)) <= 1 else y, k) for name, x, y, k in series]
    curves = [curve(*each) for each in series]
    return {"title": title, "unit": group[1], "section": group[3], "log": group[0] in LOGARITHMIC, "curves": curves}


def charts(runs: list[tuple[str, dict]]) -> tuple[list[dict], list[str]]:
    """[(name of the run, columns)] -> charts in the order of GROUPS, and "key value" of what never changes.

    One run: a chart a group. Several, laid over each other: a chart a key, with its section, LEADING keys first.
    """
    keys = list(dict.fromkeys(key for _, run in runs for key in run))
    result, constant = [], {}
    for group in GROUPS:
        mine = [key for key in keys if next(g for g in GROUPS if re.search(g[2], key)) is group]
        values = {key: np.unique([v for _, run in runs if key in run for v in run[key][1]]) for key in mine}
        same = {key: v[0] for key, v in values.items() if len(v) == 1 and np.isfinite(v[0])}
        if group[0] not in ALWAYS_DRAWN and (group[0] == "Other" or len(same) == len(mine)):
            constant |= same
            mine = [key for key in mine if key not in same]
        if len(runs) == 1 and group[0] != "Other":
            series = [(label(key), *runs[0][1][key], k) for k, key in enumerate(mine)]
            result += [chart(group[0], group, series[k : k + COLOURS]) for k in range(0, len(series), COLOURS)]
            continue
        for key in mine:
            series = [(name or label(key), *run[key], k) for k, (name, run) in enumerate(runs) if key in run]
            title = group[0] if len(mine) == 1 and group[0] != "Other" else label(key)[0].upper() + label(key)[1:]
            result.append(chart(title, group, series) | {"leading": key in LEADING})
    return result, [f"{label(key)} {short(value)}" for key, value in constant.items()]


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

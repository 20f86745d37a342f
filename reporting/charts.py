"""Rows of metrics.jsonl -> what a page charts: titles, legends, points. The script of assets/report.html draws them."""

import re

import numpy as np

# Title, unit ("%": of shares, drawn times 100), pattern of the keys, section where runs are compared. The first fits.
GROUPS = [
    ("Accuracy", "%", r"^(?!class/|reward).*accuracy", "Results"),
    ("Accuracy by class", "%", r"^class/", "Results"),
    ("Reward", "points", r"^reward(?!.*std)", "Results"),
    ("Loss", "", r"loss$", "Training"),
    ("Reward standard deviation", "", r"^(reward|group).*std", "Training"),
    ("Zero-variance groups", "% of the groups", r"all_(right|wrong)|variance", "Training"),
    ("KL to the reference", "nats a token", r"^kl", "Training"),
    ("Truncated completions", "%", r"truncated", "Training"),
    ("Completion length", "tokens", r"length", "Results"),
    ("Clipped fraction", "% of the tokens", r"^clip|capped", "Training"),
    ("Entropy", "nats a token", r"entropy", "Training"),
    ("Gradient norm", "before clipping", r"grad_norm", "Training"),
    ("Learning rate", "", r"^lr$", "Training"),
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
NOT_CHARTED = {"step", "epoch", "eval_count", "evaluation"}
COLOURS = 8  # classes s0 ... s7 of the page
POINTS = 1000  # a longer curve is thinned to so many of its points


def columns(rows: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {key: (steps (N,), values (N,))}, sorted; of a step written twice the later row counts.
    A null is NaN (JSON has none); a key with nothing else is left out. "class/X" is the accuracy on class X."""
    points = {}
    for row in rows:
        table = row.get("evaluation", {}).get("confusion", {})
        classes = {f"class/{true}": said.get(true, 0) / sum(said.values()) for true, said in table.items()}
        for key, value in (row | (classes if 1 < len(classes) <= COLOURS else {})).items():
            if (value is None or type(value) in (int, float)) and key not in NOT_CHARTED:
                points.setdefault(key, {})[row["step"]] = np.nan if value is None else value
    result = {key: tuple(np.array(sorted(value_at.items()), float).T) for key, value_at in points.items()}
    return {key: (steps, values) for key, (steps, values) in result.items() if not np.isnan(values).all()}


def charts(runs: dict[str, dict]) -> tuple[list[dict], list[str]]:
    """{name of the run: columns} -> charts in the order of GROUPS, and "key value" of what never changes. One run: a
    chart a group. Several, laid over each other: a chart a key."""
    result, constant, several = {}, [], len(runs) > 1
    groups = {key: next(g for g in GROUPS if re.search(g[2], key)) for run in runs.values() for key in run}
    for key, (title, unit, _, section) in sorted(groups.items(), key=lambda item: GROUPS.index(item[1])):
        values = np.concatenate([run[key][1] for run in runs.values() if key in run])
        if values.min() == values.max():
            constant.append(f"{label(key)} {values[0]:.4g}")
            continue
        facts = {"unit": unit, "section": section, "log": title in LOGARITHMIC, "leading": key in LEADING}
        alone = sum(group[0] == title for group in groups.values()) == 1
        if title == "Other" or several and not alone:
            title = label(key)[0].upper() + label(key)[1:]
        curves = result.setdefault(title, facts | {"title": title, "curves": []})["curves"]
        for number, (name, run) in enumerate(runs.items()):
            if key in run and several:
                curves.append(curve(name, *run[key], number, unit))
            elif key in run:
                curves.append(curve(label(key), *run[key], len(curves), unit))
    return list(result.values()), constant


def curve(name: str, steps: np.ndarray, values: np.ndarray, colour: int, unit: str) -> dict:
    """What the page's script draws: points "step,value"; "step," where the value is not finite."""
    scale = 100 if unit.startswith("%") and np.nanmax(np.abs(values)) <= 1 else 1
    every = -(-len(values) // POINTS)
    points = zip(steps[::every], values[::every] * scale)
    points = " ".join(f"{step:.6g}," + (f"{value:.6g}" if np.isfinite(value) else "") for step, value in points)
    return {"name": name, "colour": colour % COLOURS, "points": points}


def label(key: str) -> str:
    """A key as a legend: 'reward/accuracy' -> 'reward accuracy', 'class/Ascending' -> 'Ascending'."""
    return key.removeprefix("class/").replace("/", " ").replace("_", " ").replace("kl", "KL")

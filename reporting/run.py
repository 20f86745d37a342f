"""A run's folder -> a Run: what it holds, its set-up, its first numbers, its newest evaluation."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import GRPO, SFT, as_dict
from model import UserError, nearest_path
from reporting.charts import columns
from reporting.rollouts import Group, read_groups
from reporting.values import flatten, json_lines, percent, plain

MAX_ANSWERS = 30  # different answers in a confusion matrix that is shown


@dataclass
class Run:
    """What a run's folder holds; {} and [] for a file that is not there."""

    name: str
    info: dict  # run.json, but for its config
    config: dict
    metrics: list[dict]  # metrics.jsonl
    best: dict  # best.json
    data: dict  # data.json
    groups: list[Group]  # rollouts.jsonl
    notes: list[str]  # what could not be read


def read_run(folder: Path) -> Run:
    """UserError if the folder is not there or holds no run."""
    if not (folder / "run.json").is_file():
        inner = " or ".join(sorted(str(path.parent) for path in folder.glob("*/run.json"))[:3])
        hint = f"; did you mean {inner}?" if inner else nearest_path(folder)
        expected = f"expected a run's folder, the --output_dir of a training{hint}"
        raise UserError(f"{folder}: {'no run.json in it' if folder.is_dir() else 'no such folder'}; {expected}")
    info, best, data = (read_json(folder / name) for name in ("run.json", "best.json", "data.json"))
    path = folder / "metrics.jsonl"
    metrics, broken = json_lines(path.read_bytes() if path.is_file() else b"")
    notes = [f"{path}: {broken} of {len(metrics) + broken} lines are not JSON and are left out"] * (broken > 0)
    name, config, groups = folder.resolve().name, info.pop("config", {}), read_groups(folder / "rollouts.jsonl")
    return Run(name, info, config, metrics, best, data, groups, notes)


def read_json(path: Path) -> dict:
    """{} if the file is not there."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore it or remove it") from None


def describe(run: Run) -> dict:
    """Name, facts, command, changed options, first numbers, versions and machine, all options."""
    info = {key.rpartition("/")[2]: value for key, value in flatten(run.info)}
    commit = f"commit {info['commit'][:10]}" if info.get("commit") else None
    facts = [info.get("script"), run.config.get("model_id"), commit, *(info.get("gpus") or [info.get("cpu")])]
    default = as_dict(GRPO() if "num_generations" in run.config else SFT())
    options = [(name, plain(value), plain(default.get(name, "–"))) for name, value in run.config.items()]
    return {
        "name": run.name,
        "config": run.config,
        "facts": [fact for fact in facts if fact],
        "command": shlex.join(["python", *run.info.get("command", [])]),
        "tiles": first_numbers(run),
        "info": [(key.replace("/", " "), value) for key, value in flatten(run.info) if key != "command"],
        "options": options,
        "changed": [option for option in options if option[0] in default and option[1] != option[2]],
    }


def first_numbers(run: Run) -> dict[str, tuple[str, str]]:
    """{label: (value, remark)} of the first numbers one asks for."""
    data = {key: y[np.isfinite(y)] for key, (_, y) in columns(run.metrics).items()}
    tiles = {}
    if "eval_accuracy" in data:
        y = data["eval_accuracy"]
        tiles["Held-out accuracy"] = percent(y[-1]), f"from {percent(y[0])} at first" if len(y) > 1 else ""
    if run.best:
        tiles["Best checkpoint"] = percent(run.best["accuracy"]), f"step {run.best['step']}"
    name = "reward" if "reward" in data else "loss"  # the value of GRPO's loss says little
    if name in data:
        y = data[name]
        few = max(1, min(10, len(y) // 4))
        remark = f"from {y[:few].mean():.3g}; means of {few} steps" if len(y) > 1 else ""
        tiles[name.capitalize()] = f"{y[-few:].mean():.3g}", remark
    if run.metrics:
        minutes = data["ms"].sum() / 60_000 if "ms" in data else 0
        remark = f"{minutes / 60:.1f} h of training" if minutes > 60 else f"{minutes:.1f} min of training"
        tiles["Steps"] = f"{max(row['step'] for row in run.metrics):,}", remark
    if "tokens_per_second" in data:
        tiles["Throughput"] = f"{np.median(data['tokens_per_second']):,.0f}", "tokens per second, median"
    if "gib" in data:
        tiles["Memory"] = f"{data['gib'].max():.2f} GiB", "peak"
    return tiles


def evaluation(run: Run) -> dict:
    """The newest confusion matrix, unless it has too many answers, and the newest evaluation with controls."""
    rows = [row["evaluation"] | {"step": row["step"]} for row in reversed(run.metrics) if row.get("evaluation")]
    newest = next((row for row in rows if row.get("confusion")), {"confusion": {}})
    answers = list(dict.fromkeys([*newest["confusion"], *(a for row in newest["confusion"].values() for a in row)]))
    return {
        "confusion": newest | {"answers": answers} if 0 < len(answers) <= MAX_ANSWERS else None,
        "controls": next((row for row in rows if row.get("controls")), None),
    }

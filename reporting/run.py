"""Read a run's folder into a Run: what it holds, its first numbers, its newest evaluation."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import GRPO, SFT, as_dict
from model import UserError, nearest_path
from reporting.charts import COLOURS, columns
from reporting.numbers import dict_of, flatten, is_number, percent, plain
from reporting.rollouts import Rollouts, read_rollouts

RUN_FILES = ("run.json", "metrics.jsonl", "rollouts.jsonl")
MAX_ANSWERS = 30  # different answers in a confusion matrix that is shown


@dataclass
class Run:
    """What a run's folder holds; {} and [] for a file that is not there."""

    name: str
    info: dict  # run.json
    metrics: list[dict]  # metrics.jsonl
    best: dict  # best.json
    data: dict  # data.json
    rollouts: Rollouts | None
    evaluations: list[dict]  # with a confusion matrix or controls: of metrics.jsonl, then of eval*.json
    notes: list[str]  # what could not be read

    @property
    def config(self) -> dict:
        return dict_of(self.info.get("config"))

    @property
    def data_path(self) -> Path | None:
        path = self.config.get("data_path")
        return Path(path) if isinstance(path, str) and path else None


def read_run(folder: Path) -> Run:
    """UserError if the folder is not there or holds no run. What cannot be read becomes a note on the page."""
    if not folder.is_dir():
        expected = f"expected a run's folder, the --output_dir of a training{nearest_path(folder)}"
        raise UserError(f"{folder}: no such folder; {expected}")
    if not any((folder / name).is_file() for name in RUN_FILES):
        runs = sorted(str(path.parent) for path in folder.glob("*/run.json"))[:3]
        hint = f"; did you mean {' or '.join(runs)}?" if runs else ""
        raise UserError(f"{folder}: none of {', '.join(RUN_FILES)} is there; expected the --output_dir of a run{hint}")
    notes = []
    info, best, data = (read_object(folder / name, notes) for name in ("run.json", "best.json", "data.json"))
    metrics = read_lines(folder / "metrics.jsonl", notes)
    rows = metrics + [read_object(path, notes) for path in sorted(folder.glob("eval*.json"))]
    evaluations = [{"step": row.get("step"), **inner} for row in rows if (inner := evaluation_of(row))]
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    return Run(folder.resolve().name, info, metrics, best, data, rollouts, evaluations, notes)


def read_object(path: Path, notes: list[str]) -> dict:
    """A JSON object; {} if the file is not there, or with a note if it holds something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        notes.append(f"{path} is left out: not JSON ({error})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path} is left out: a JSON {type(value).__name__}, expected an object")
    return dict_of(value)


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The JSON objects of a .jsonl file; other lines (cut by a crash, say) are counted in a note."""
    rows, broken = [], 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        notes.append(f"{path}: {broken} of {broken + len(rows)} lines are no JSON objects and are left out")
    return rows


# -- Set-up


def describe(run: Run) -> dict:
    """Name, facts, command, changed options, first numbers, versions and machine, all options."""
    info = {key.rpartition("/")[2]: value for key, value in flatten(run.info)}
    commit = f"commit {info['commit'][:10]}" if isinstance(info.get("commit"), str) else None
    gpus = info["gpus"] if isinstance(info.get("gpus"), list) else []
    facts = [run.info.get("script"), run.config.get("model_id"), commit, *(gpus or [info.get("cpu")])]
    command = run.info.get("command")
    default = {
        name: plain(value) for name, value in as_dict(GRPO() if "num_generations" in run.config else SFT()).items()
    }
    options = [(name, plain(value), default.get(name, "–")) for name, value in run.config.items()]
    rest = {key: value for key, value in run.info.items() if key not in ("command", "config")}
    return {
        "name": run.name,
        "facts": [plain(fact) for fact in facts if fact],
        "command": shlex.join(["python", *map(str, command)]) if isinstance(command, list) else "",
        "tiles": first_numbers(run),
        "info": [(key.replace("/", " "), value) for key, value in flatten(rest)],
        "options": options,
        "changed": [option for option in options if option[0] in default and option[1] != option[2]],
    }


def first_numbers(run: Run) -> dict[str, tuple[str, str]]:
    """{label: (value, remark)} of the first numbers one asks for."""
    data = {key: y[np.isfinite(y)] for key, (_, y) in columns(run.metrics).items() if np.isfinite(y).any()}
    tiles = {}
    if "eval_accuracy" in data:
        y = data["eval_accuracy"]
        tiles["Held-out accuracy"] = percent(y[-1]), f"from {percent(y[0])} at first" if len(y) > 1 else ""
    if is_number(run.best.get("accuracy")):
        tiles["Best checkpoint"] = percent(run.best["accuracy"]), f"step {run.best.get('step')}"
    name = "reward" if "reward" in data else "loss"  # the value of GRPO's loss says little
    if name in data:
        y = data[name]
        few = max(1, min(10, len(y) // 4))
        remark = f"from {y[:few].mean():.3g}; means of {few} steps" if len(y) > 1 else ""
        tiles[name.capitalize()] = f"{y[-few:].mean():.3g}", remark
    steps = [row["step"] for row in run.metrics if is_number(row.get("step"))]
    if steps:
        seconds = data["ms"].sum() / 1000 if "ms" in data else 0
        tiles["Steps"] = f"{max(steps):,.0f}", f"{duration(seconds)} of training" if seconds else ""
    if "tokens_per_second" in data:
        tiles["Throughput"] = f"{np.median(data['tokens_per_second']):,.0f}", "tokens per second, median"
    if "gib" in data:
        tiles["Memory"] = f"{data['gib'].max():.2f} GiB", "peak"
    return tiles


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


# -- Evaluation


def evaluation_of(row: dict) -> dict | None:
    """The object with a confusion matrix or controls: the row itself, or its "evaluation"."""
    for value in (row, dict_of(row.get("evaluation"))):
        if isinstance(value.get("confusion"), dict) or isinstance(value.get("controls"), dict):
            return value
    return None


def evaluation(run: Run) -> dict:
    """The newest confusion matrix, unless it has too many answers, and the newest evaluation with controls."""
    stats = next((e for e in reversed(run.evaluations) if e.get("confusion")), {})
    counts = counts_of(stats)
    answers = list(dict.fromkeys([*counts, *(answer for row in counts.values() for answer in row)]))
    return {
        "confusion": {"stats": stats, "counts": counts, "answers": answers}
        if 0 < len(answers) <= MAX_ANSWERS
        else None,
        "controls": next((e for e in reversed(run.evaluations) if e.get("controls")), None),
    }


def counts_of(stats: dict) -> dict[str, dict[str, int]]:
    """{true class: {answer: count}} of an evaluation."""
    rows = {truth: dict_of(row) for truth, row in dict_of(stats.get("confusion")).items()}
    return {truth: {answer: n for answer, n in row.items() if is_number(n)} for truth, row in rows.items()}


def class_accuracy(metrics: list[dict]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of metrics.jsonl -> {"class/…": (steps, accuracy)}, like charts.columns; {} for too many classes."""
    points = {}
    for row in metrics:
        for truth, counts in counts_of(evaluation_of(row) or {}).items():
            if is_number(row.get("step")) and sum(counts.values()):
                points.setdefault(truth, {})[row["step"]] = counts.get(truth, 0) / sum(counts.values())
    if not 1 < len(points) <= COLOURS:
        return {}
    series = {truth: np.array(sorted(shares.items()), float).T for truth, shares in sorted(points.items())}
    return {f"class/{truth}": (steps, shares) for truth, (steps, shares) in series.items()}

"""A run's folder -> one HTML page that needs nothing else: set-up, curves, evaluation, rollouts, data.

    python report.py RUN                            RUN/report.html, as the trainers write it at every evaluation
    python report.py RUN1 RUN2 … [--output FILE]    compare.html beside them: curves over each other, what differs

This file and reporting/ make plain values, assets/report.html, a Jinja2 template, the HTML. Every text is escaped, and
the page's policy lets nothing run or load but its own style and script, known by their hashes.
"""

# ruff: noqa: E402, I001
from config import GRPO, SFT, Report, as_dict, cli, parse  # first: it handles Ctrl-C

import base64
import hashlib
import json
import math
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment

from model import UserError, nearest_path
from reporting.charts import charts, columns, flatten, percent, plain, short
from reporting.frames import strip

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
MAX_ANSWERS = 30  # different answers in a confusion matrix that is shown
WINDOW = 4 * 2**20  # bytes read at either end of rollouts.jsonl, which may have gigabytes
MAX_TOKENS = 600  # shown of one completion
TINTS = (0.9, 0.7, 0.5, 0.3, 0.1)  # probabilities at which a token's tint deepens


@dataclass
class Group:
    """The completions of one prompt at one step, from the best to the worst: rows of rollouts.jsonl."""

    rows: list[dict]

    def __post_init__(self):
        self.rows.sort(key=lambda row: row["reward"], reverse=True)
        self.step, self.sample, self.clip = (self.rows[0][key] for key in ("step", "id", "video"))
        self.mean = sum(row["reward"] for row in self.rows) / len(self.rows)
        self.spread = self.rows[0]["reward"] - self.rows[-1]["reward"]


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
    metrics, notes = read_lines(folder / "metrics.jsonl")
    groups = {}
    for row in read_lines(folder / "rollouts.jsonl", WINDOW)[0]:
        rows = groups.setdefault((row["step"], row["prompt"], row["id"]), [])
        rows.append(rows[0] | row if rows else row)  # clip, question and answer stand in the first of a group
    groups = [Group(rows) for rows in groups.values() if "question" in rows[0]]
    return Run(folder.resolve().name, info, info.pop("config", {}), metrics, best, data, groups, notes)


def read_json(path: Path) -> dict:
    """{} if the file is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore it or remove it") from None


def read_lines(path: Path, window: int | None = None) -> tuple[list[dict], list[str]]:
    """(objects of a .jsonl, a note of lines that are none: a crash may cut the last). window: bytes read at either end
    of a longer file."""
    data, rows = b"", []
    if path.is_file():
        with path.open("rb") as file:
            gap = path.stat().st_size - 2 * window if window else 0
            if gap > 0:
                data = file.read(window) + b"\n"
                file.seek(gap, os.SEEK_CUR)
            data += file.read()
    for line in (lines := data.splitlines()):
        with suppress(ValueError):
            rows.append(json.loads(line))
    broken = len(lines) - len(rows)
    return rows, [f"{path}: {broken} of {len(lines)} lines are not JSON and are left out"] * (broken > 0)


def describe(run: Run) -> dict:
    """What header, set-up and evaluation show. A confusion matrix of too many answers is left out."""
    info = dict(flatten(run.info))
    last = {key.rpartition("/")[2]: value for key, value in info.items()}
    commit = f"commit {last['commit'][:10]}" if last.get("commit") else None
    facts = [last.get("script"), run.config.get("model_id"), commit, *(last.get("gpus") or [last.get("cpu")])]
    default = as_dict(GRPO() if "num_generations" in run.config else SFT())
    options = [(name, plain(value), plain(default.get(name, "–"))) for name, value in run.config.items()]
    changed = [option for option in options if option[0] in default and option[1] != option[2]]
    command = shlex.join(["python", *info.pop("command", [])])
    info = [(key.replace("/", " "), value) for key, value in info.items()]
    result = {"name": run.name, "config": run.config, "facts": list(filter(None, facts)), "command": command}
    result |= {"tiles": first_numbers(run), "options": options, "changed": changed, "info": info}
    rows = [row["evaluation"] | {"step": row["step"]} for row in reversed(run.metrics) if row.get("evaluation")]
    newest = next((row for row in rows if row.get("confusion")), {"confusion": {}})
    answers = list(dict.fromkeys([*newest["confusion"], *(a for row in newest["confusion"].values() for a in row)]))
    confusion = newest | {"answers": answers} if 0 < len(answers) <= MAX_ANSWERS else None
    return result | {"confusion": confusion, "controls": next((row for row in rows if row.get("controls")), None)}


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
        means = f"; means of {few} steps" if few > 1 else ""
        remark = f"from {y[:few].mean():.3g}{means}" if len(y) > 1 else ""
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


def dataset(run: Run, clips=()) -> dict:
    """What the section shows, without examples whose clip is among `clips`."""
    path = run.config.get("data_path") or ""
    metadata = read_json(Path(path).parent / "metadata.json") if path else {}
    metadata.pop("counts", None)
    options = [(key.removeprefix("options/").replace("/", " "), value) for key, value in flatten(metadata)]
    examples = next((facts["examples"] for facts in run.data.values() if facts["examples"]), [])
    examples = [example for example in examples if example["video"] not in clips]
    return {"path": path, "splits": run.data, "options": options, "examples": examples, "config": run.config}


# -- Rollouts. A card is groups of one prompt


def before_and_after(groups: list[Group]) -> list[list[Group]]:
    """[[a prompt's earliest group, its latest]], from the prompt that gained most to the one that gained least."""
    early, late = ({group.sample: group for group in order} for order in (reversed(groups), groups))
    pairs = [[early[s], late[s]] for s in sorted(early, key=str) if late[s].step > early[s].step]
    return sorted(pairs, key=lambda pair: pair[0].mean - pair[1].mean)


def rollout_cards(groups: list[Group]) -> dict[str, list[list[Group]]]:
    """{heading: cards}: the same prompt at two steps; of the last step and the first the best group, the worst, and the
    one whose rewards differ most."""

    def of_step(step):
        few = [group for group in groups if group.step == step]
        chosen = max(few, key=lambda g: g.mean), min(few, key=lambda g: g.mean), max(few, key=lambda g: g.spread)
        return [[group] for group in {id(group): group for group in chosen}.values()]

    if not groups:
        return {}
    pairs, first, last = before_and_after(groups), groups[0].step, groups[-1].step
    cards = {"The same prompt, before and after": pairs[:1] + pairs[1:][-1:], "Last rollouts": of_step(last)}
    return cards | {"First rollouts": of_step(first) if first < last else []}


def new_cards(groups: list[Group], clips: set[str]) -> dict[str, list[list[Group]]]:
    """One card each: before and after, and of the last step, of clips that are not among `clips`; they are added."""
    result = {}
    for heading, cards in list(rollout_cards(groups).items())[:2]:
        result[heading] = [card for card in cards if card[0].clip not in clips][:1]
        clips.update(card[0].clip for card in result[heading])
    return result


def shown_tokens(row: dict) -> list[tuple[str, int, float]]:
    """(text, tint, probability) of each token; tint: 0 (likely, or no finite log-prob) to 5, p0 … p5 of the page. Most
    rows of GRPO come without tokens: their text in one piece."""
    if "tokens" not in row:
        return [(row["completion"], 0, 1.0)]
    probabilities = [1.0 if value is None else math.exp(value) for value in row["logprobs"]]
    return [(text, sum(p < limit for limit in TINTS), p) for text, p in zip(row["tokens"], probabilities)][:MAX_TOKENS]


# -- The page


def page(run: Run) -> str:
    """The document of one run."""
    drawn, constant = charts([("", columns(run.metrics))])
    views = [describe(run) | {"rollouts": rollout_cards(run.groups)}]
    values = {"best": run.best.get("step"), "datasets": [dataset(run)], "notes": run.notes}
    return render(runs=views, charts=drawn, constant=constant, **values)


def compare_page(runs: list[Run]) -> str:
    """The document of several runs: the prompt that gained most, curves over each other. It shows no clip twice."""
    pairs = [(k, pair) for k, run in enumerate(runs) for pair in before_and_after(run.groups)[:1]]
    example = max(pairs, key=lambda each: each[1][1].mean - each[1][0].mean, default=None)
    clips = {example[1][0].clip} if example else set()
    views, curves = [], []
    for run in runs:
        views.append(describe(run) | {"rollouts": new_cards(run.groups, clips)})
        series = {key: xy for key, xy in columns(run.metrics).items() if not key.startswith("class/")}
        if {"reward", "loss"} <= set(series):  # GRPO's loss is another quantity than SFT's: on an axis of its own
            series["policy_loss"] = series.pop("loss")
        curves.append((run.name, series))
    datasets = [dataset(run, clips) for run in {run.config.get("data_path"): run for run in runs}.values()]
    shared = [name for name in runs[0].config if all(name in run.config for run in runs)]
    differ = [[name, *(plain(run.config[name]) for run in runs)] for name in shared]
    values = {"notes": [note for run in runs for note in run.notes], "differ": [d for d in differ if len({*d[1:]}) > 1]}
    return render(runs=views, example=example, charts=charts(curves)[0], datasets=datasets, **values)


def render(**values) -> str:
    """The template with its values. The policy names style and script by their hashes and allows no other sources."""
    text = TEMPLATE.read_text(encoding="utf-8")
    contents = {tag: re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1].encode() for tag in ("style", "script")}
    hashes = {tag: base64.b64encode(hashlib.sha256(content).digest()).decode() for tag, content in contents.items()}
    own = "; ".join(f"{tag}-src 'sha256-{code}'" for tag, code in hashes.items())
    policy = f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"
    environment = Environment(autoescape=True)
    environment.filters |= {"percent": percent, "plain": plain, "short": short, "frames": strip, "tokens": shown_tokens}
    return environment.from_string(text).render(policy=policy, **values)


def write_report(run_folders: list[Path], output: Path) -> Path:
    """Write the page of one run, or of several laid over each other, to `output`, whole or not at all; returns it.
    UserError if a folder is not there or the page cannot be written; whatever a folder lacks has no section."""
    output = Path(output)
    runs = [read_run(Path(folder)) for folder in run_folders]
    if len({run.name for run in runs}) < len(runs):  # a/sft and b/sft
        for run, folder in zip(runs, run_folders):
            run.name = str(folder)
    text, temporary = page(*runs) if len(runs) == 1 else compare_page(runs), output.with_name(f".{output.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    return output


def main(argv=None):
    cfg = parse(Report, argv)
    runs = [Path(run) for run in cfg.runs]
    folder = os.path.commonpath([run.absolute().parent for run in runs])  # the deepest that holds them all
    output = runs[0] / "report.html" if len(runs) == 1 else Path(folder) / "compare.html"
    print(write_report(runs, cfg.output or output))


if __name__ == "__main__":
    cli(main)

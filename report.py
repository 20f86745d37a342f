"""A run's folder -> one HTML page that needs nothing else: set-up, curves, evaluation, rollouts, data.

    python report.py RUN                            RUN/report.html, as the trainers write it at every evaluation
    python report.py RUN1 RUN2 … [--output FILE]    compare.html beside them: curves over each other, what differs

This file and reporting/ make plain values, assets/report.html, a Jinja2 template, the HTML. Every text is escaped, and
the page's policy lets nothing run or load but its own style and script.
"""

# ruff: noqa: E402, I001
from config import GRPO, SFT, Report, as_dict, cli, parse  # first: it handles Ctrl-C

import json
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np
from jinja2 import Environment

from checkpoint import BEST, METRICS, ROLLOUTS, RUN, read_json
from model import UserError, nearest_path
from reporting.charts import charts, columns
from reporting.frames import strip

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
MAX_CLASSES = 30  # of a confusion matrix that is shown
WINDOW = 16 * 2**20  # bytes read at either end of a .jsonl: rollouts.jsonl may have gigabytes
TILES = [  # label, key, its finite values (N,) -> (value, remark)
    ("Held-out accuracy", "eval_accuracy", lambda y: (f"{100 * y[-1]:.1f} %", f"from {100 * y[0]:.1f} % at first")),
    ("Reward", "reward", lambda y: (f"{y[-10:].mean():.3g}", f"from {y[:10].mean():.3g}; means of 10 steps")),
    ("Loss", "loss", lambda y: (f"{y[-10:].mean():.3g}", f"from {y[:10].mean():.3g}; means of 10 steps")),
    ("Steps", "ms", lambda y: (f"{len(y):,}", f"{y.sum() / 60_000:.1f} min of training")),
    ("Throughput", "tokens_per_second", lambda y: (f"{np.median(y):,.0f}", "tokens per second, median")),
    ("Memory", "gib", lambda y: (f"{y.max():.2f} GiB", "peak")),
]


def read_run(folder: Path) -> dict:
    """What a run's folder holds, and the page shows. {} or [] for a file that is not there. UserError without a run."""
    if not (folder / RUN).is_file():
        expected = f"expected a run's folder, the --output_dir of a training{nearest_path(folder)}"
        raise UserError(f"{folder}: no {RUN} in it; {expected}")
    files = {"info": RUN, "best": BEST, "data": "data.json"}
    run = {key: read_json(folder / name) if (folder / name).exists() else {} for key, name in files.items()}
    run |= {"name": folder.resolve().name, "config": run["info"].pop("config", {})}
    run["default"] = as_dict(GRPO() if "num_generations" in run["config"] else SFT())
    metadata = Path(run["config"].get("data_path") or "").parent / "metadata.json"
    run["data_options"] = read_json(metadata).get("options", {}) if metadata.is_file() else {}
    metrics = read_lines(folder / METRICS)
    run["columns"] = columns(metrics)
    if {"reward", "loss"} <= run[
        "columns"
    ].keys():  # the value of GRPO's loss says little, and is another quantity than SFT's
        run["columns"]["policy_loss"] = run["columns"].pop("loss")
    values = {key: y[np.isfinite(y)] for key, (_, y) in run["columns"].items()}
    run["tiles"] = {label: tile(values[key]) for label, key, tile in TILES if len(values.get(key, ()))}
    if run["best"]:
        run["tiles"]["Best checkpoint"] = f"{100 * run['best']['accuracy']:.1f} %", f"step {run['best']['step']}"
    stats = [row["evaluation"] | {"step": row["step"]} for row in reversed(metrics) if row.get("evaluation")]
    run["confusion"] = next((each for each in stats if 0 < len(each.get("confusion", ())) <= MAX_CLASSES), None)
    run["controls"] = next((each for each in stats if each.get("controls")), None)
    run["groups"] = read_groups(folder / ROLLOUTS)
    return run


def read_lines(path: Path) -> list[dict]:
    """Objects of a .jsonl, without a line that a crash or the WINDOW cut."""
    rows, data = [], b""
    if path.is_file():
        with path.open("rb") as file:
            data = file.read(WINDOW) + b"\n"
            file.seek(max(file.tell(), path.stat().st_size - WINDOW))
            data += file.read()
    for line in data.splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


# -- Rollouts


def read_groups(path: Path) -> list[dict]:
    """The completions of each prompt at each step, from the best to the worst."""
    groups = {}
    for row in read_lines(path):
        rows = groups.setdefault((row["step"], row["prompt"], row["id"]), [])
        rows.append(rows[0] | row if rows else row)  # clip, question and answer stand in the first of a group
    result = []
    for (step, _, sample), rows in groups.items():
        if "question" in rows[0]:
            mean = sum(row["reward"] for row in rows) / len(rows)
            rows.sort(key=lambda row: -row["reward"])
            result.append({"step": step, "sample": sample, "mean": mean, "rows": rows})
    return result


def before_and_after(groups: list[dict]) -> list[list[dict]]:
    """[[a prompt's earliest group, its latest]], from the prompt that gained most to the one that gained least."""
    early, late = ({group["sample"]: group for group in order} for order in (reversed(groups), groups))
    pairs = [[early[name], late[name]] for name in late if late[name]["step"] > early[name]["step"]]
    return sorted(pairs, key=lambda pair: pair[0]["mean"] - pair[1]["mean"])


def choose_cards(groups: list[dict], shown: set[str], most: int) -> dict[str, list[list[dict]]]:
    """{heading: at most so many cards}, a card being groups of one prompt: the same prompt at two steps; of the last
    step and the first the best group and the worst. Prompts in `shown` are left out, and those chosen are added."""
    pairs, steps = before_and_after(groups), [group["step"] for group in groups]
    cards = {"The same prompt, before and after": [*pairs[:1], *pairs[1:][::-1]]}
    for step, heading in {max(steps, default=0): "Last rollouts", min(steps, default=0): "First rollouts"}.items():
        ranked = sorted(([g] for g in groups if g["step"] == step), key=lambda card: -card[0]["mean"])
        cards[heading] = [*ranked[:1], *ranked[1:][::-1]]
    for heading, choice in cards.items():
        cards[heading] = [card for card in choice if card[0]["sample"] not in shown][:most]
        shown.update(card[0]["sample"] for card in cards[heading])
    return cards


# -- The page


def write_report(run_folders: list[Path], output: Path) -> Path:
    """Write the page of one run to `output`, whole or not at all, and return it; or the page of several: curves over
    each other, the prompt that gained most, no prompt twice. UserError if it cannot be written."""
    runs, output = [read_run(Path(folder)) for folder in run_folders], Path(output)
    if len({run["name"] for run in runs}) < len(runs):  # a/sft and b/sft
        for run, folder in zip(runs, run_folders):
            run["name"] = str(folder)
    values, shown, several = {"runs": runs}, set(), len(runs) > 1
    pairs = [(k, pair) for k, run in enumerate(runs) for pair in before_and_after(run["groups"])[:1]]
    if several and pairs:
        values["example"] = max(pairs, key=lambda each: each[1][1]["mean"] - each[1][0]["mean"])
        shown.add(values["example"][1][0]["sample"])
    for run in runs:
        run["rollouts"] = choose_cards(run["groups"], shown, 1 if several else 2)
    values["charts"], values["constant"] = charts({run["name"]: run["columns"] for run in runs})
    environment = Environment(autoescape=True)
    environment.filters["frames"] = strip
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(nonce=secrets.token_hex(16), exp=math.exp, shown=shown, **values)
    temporary = output.with_name(f".{output.name}.tmp")
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

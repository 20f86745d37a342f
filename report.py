"""A run's folder -> one HTML page that needs nothing else: set-up, curves, evaluation, rollouts, data.

    python report.py RUN                            RUN/report.html, as the trainers write it at every evaluation
    python report.py RUN1 RUN2 … [--output FILE]    compare.html beside them: curves over each other, what differs

Every text from a model, a file or a command line is escaped, and the page's policy lets nothing run or load but its own
style and script, known by their hashes.
"""

# ruff: noqa: E402, I001
from config import Report, cli, parse  # first: it handles Ctrl-C

import base64
import hashlib
import os
import re
from pathlib import Path

from jinja2 import Environment

from model import UserError
from reporting.charts import charts, columns
from reporting.dataset import dataset
from reporting.frames import strip
from reporting.values import percent, plain, short
from reporting.rollouts import before_and_after, new_cards, rollout_cards, shown_tokens
from reporting.run import Run, describe, evaluation, read_run

TEMPLATE = Path(__file__).parent / "assets" / "report.html"


def page(run: Run) -> str:
    """The document of one run."""
    drawn, constant = charts([("", columns(run.metrics))])
    views = [describe(run) | evaluation(run) | {"rollouts": rollout_cards(run.groups)}]
    best = run.best.get("step")
    return render(runs=views, charts=drawn, constant=constant, best=best, datasets=[dataset(run)], notes=run.notes)


def compare_page(runs: list[Run]) -> str:
    """The document of several runs: the prompt that gained most, curves over each other. It shows no clip twice."""
    pairs = [(k, pair) for k, run in enumerate(runs) for pair in before_and_after(run.groups)[:1]]
    example = max(pairs, key=lambda each: each[1][1].mean - each[1][0].mean, default=None)
    clips = {example[1][0].clip} if example else set()
    views, curves = [], []
    for run in runs:
        views.append(describe(run) | evaluation(run) | {"rollouts": new_cards(run.groups, clips)})
        series = {key: xy for key, xy in columns(run.metrics).items() if not key.startswith("class/")}
        if {"reward", "loss"} <= set(series):  # GRPO's loss is another quantity than SFT's: on an axis of its own
            series["policy_loss"] = series.pop("loss")
        curves.append((run.name, series))
    datasets = [dataset(run, clips) for run in {run.config.get("data_path"): run for run in runs}.values()]
    values = {"notes": [note for run in runs for note in run.notes], "differ": differing_options(runs)}
    return render(runs=views, example=example, charts=charts(curves)[0], datasets=datasets, **values)


def differing_options(runs: list[Run]) -> list[list[str]]:
    """[name, its value in each run] of the options that all runs have and that differ."""
    shared = [name for name in runs[0].config if all(name in run.config for run in runs)]
    rows = [[name, *(plain(run.config[name]) for run in runs)] for name in shared]
    return [row for row in rows if len(set(row[1:])) > 1]


def render(**values) -> str:
    """The template with its values. The policy names style and script by their hashes and allows no other sources."""
    text = TEMPLATE.read_text(encoding="utf-8")
    hashes = []
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        hashes.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
    policy = "; ".join(["default-src 'none'", "img-src data:", *hashes, "base-uri 'none'", "form-action 'none'"])
    environment = Environment(autoescape=True)
    environment.filters |= {"percent": percent, "plain": plain, "short": short, "frames": strip, "tokens": shown_tokens}
    return environment.from_string(text).render(policy=policy, **values)


def write_report(run_folders: list[Path], output: Path) -> Path:
    """Write the page of one run, or of several laid over each other, to `output`, whole or not at all; returns it.

    UserError if a folder is not there or the page cannot be written; whatever a folder lacks has no section.
    """
    output = Path(output)
    runs = [read_run(Path(folder)) for folder in run_folders]
    if len({run.name for run in runs}) < len(runs):  # a/sft and b/sft
        for run, folder in zip(runs, run_folders):
            run.name = str(folder)
    text = page(runs[0]) if len(runs) == 1 else compare_page(runs)
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
    output = runs[0] / "report.html"
    if len(runs) > 1:  # the deepest folder that holds them all
        output = Path(os.path.commonpath([run.absolute().parent for run in runs])) / "compare.html"
    print(write_report(runs, cfg.output or output))


if __name__ == "__main__":
    cli(main)

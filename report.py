"""A run's folder -> one HTML page that needs nothing else: what ran, curves, evaluation, rollouts, data.

    python report.py RUN                            RUN/report.html, as the trainers write it at every evaluation
    python report.py RUN1 RUN2 … [--output FILE]    compare.html beside them: curves over each other, what differs

Read from a run's folder, each only if it is there:
    run.json         {"script", "command", "config", "versions", "machine", ...}; further keys are shown as they are
    metrics.jsonl    one object a step, and one an evaluation: "step" and numbers; nested objects are flattened;
                     null = not finite
    eval*.json       what `infer.py --data_path … --json` prints: "accuracy", "interval", "chance",
                     "confusion" {truth: {answer: count}}, "controls" {name: {"accuracy", "interval", …}};
                     the same keys in a row of metrics.jsonl, nested or not, are read too; the newest is shown
    rollouts.jsonl   one object a completion: "step", "prompt" (number of its group in the step), "id", "video",
                     "question", "answer" (the right one), "completion", "reward", "rewards" {part: number},
                     "advantage", "finished", "tokens" (texts) with their "logprobs"
    best.json        {"step", "accuracy"} of the best checkpoint
    data.json        {split: counts, classes, question forms, and [least, median, most] of tokens, frames, seconds}
    metadata.json    of the dataset, beside the file that the config's data_path names: how it was made

Every text from a model, a file or a command line is escaped, and the page's policy lets nothing run or load but its own
style and script, known by their hashes. No torch: a page must be quick to make, while training too.
"""

# ruff: noqa: E402, I001
from config import Report, cli, parse  # first: it handles Ctrl-C

import base64
import hashlib
import json
import os
import re
from html import escape
from pathlib import Path

from model import UserError
from reporting import charts
from reporting.charts import columns, number
from reporting.dataset import dataset
from reporting.evaluation import class_accuracy, evaluation
from reporting.frames import clip_folders
from reporting.pieces import key_dot, section
from reporting.reading import Run, read_run
from reporting.rollouts import rollouts_html
from reporting.setup import head, setup, several_heads

TEMPLATE = Path(__file__).parent / "assets" / "report.html"


def each(runs: list[Run], make) -> str:
    """make(run) of each run; under its name if there are several."""
    parts = []
    for k, run in enumerate(runs):
        name = f'<h3 class="run">{key_dot(k)}{escape(run.name)}</h3>' if len(runs) > 1 else ""
        html = make(run)
        parts += [name + html] if html else []
    return "".join(parts)


def said(run: Run) -> str:
    return rollouts_html(run.rollouts, clip_folders(run.config)) if run.rollouts else ""


def page(runs: list[Run]) -> str:
    """The whole document."""
    named = [(run.name, columns(run.rows) | class_accuracy(run.rows)) for run in runs]
    best = runs[0].best.get("step") if len(runs) == 1 else None
    lead = "By optimizer step; pale is each step, bold the running mean. "
    lead += "Point at a curve, or tab to it and use the arrow keys, to read every chart at that step."
    lead = f'<p class="soft">{lead}{" Dashed: the best checkpoint." if number(best) else ""}</p>'
    curves = charts.charts(named, best if number(best) else None)
    parts = [
        ("curves", "Curves", lead + curves if curves else ""),
        ("evaluation", "Evaluation", each(runs, evaluation)),
        ("rollouts", "Rollouts", each(runs, said)),
        ("data", "Data", "".join(dataset(run) for run in {run.data_path: run for run in runs}.values())),
        ("setup", "Setup", each(runs, setup)),
    ]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, body in parts if body)
    notes = "".join(f'<p class="bad">{escape(note)}</p>' for run in runs for note in run.notes)
    nothing = "" if links else "<p>Nothing has been written into this folder yet.</p>"
    links = f"<nav>{links}</nav>" if links else ""
    top = head(runs[0]) if len(runs) == 1 else several_heads(runs)
    body = f"<main>{top}{notes}{nothing}{links}{''.join(section(*part) for part in parts)}</main>"
    return fill(", ".join(run.name for run in runs), body)


def fill(title: str, body: str) -> str:
    """The template with its parts; the policy names style and script by their hashes, and allows no other sources."""
    geometry = [charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM]
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{geometry}}", json.dumps(geometry))
    hashes = {}
    for tag in ("style", "script"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        hashes[tag] = f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    rules = ["default-src 'none'", "img-src data:", *hashes.values(), "base-uri 'none'", "form-action 'none'"]
    parts = {"policy": "; ".join(rules), "title": escape(title), "body": body}
    # one pass: what is put in is not searched again, so a completion that says {{body}} stays what it is
    return re.sub(r"\{\{(policy|title|body)\}\}", lambda match: parts[match[1]], text)


def write_report(run_folders: list[Path], output: Path) -> Path:
    """Write the page of one run, or of several laid over each other, to `output`, whole or not at all; returns it.

    UserError if a folder is not there or the page cannot be written; whatever a folder lacks has no section.
    """
    output = Path(output)
    text = page([read_run(Path(folder)) for folder in run_folders])
    beside = output.with_name(f".{output.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(output)
    except OSError as error:
        if beside.exists():
            beside.unlink()
        raise UserError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    return output


def main(argv=None):
    cfg = parse(Report, argv)
    runs = [Path(run) for run in cfg.runs]
    print(write_report(runs, cfg.output or default_output(runs)))


def default_output(runs: list[Path]) -> Path:
    """report.html in a run's folder; for several runs compare.html in the deepest folder that holds them all."""
    if len(runs) == 1:
        return runs[0] / "report.html"
    return Path(os.path.commonpath([run.absolute().parent for run in runs])) / "compare.html"


if __name__ == "__main__":
    cli(main)

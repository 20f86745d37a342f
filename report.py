"""A run's folder -> one HTML page that needs nothing else: set-up, curves, evaluation, rollouts, data.

    python report.py RUN                            RUN/report.html, as the trainers write it at every evaluation
    python report.py RUN1 RUN2 … [--output FILE]    compare.html beside them: curves over each other, what differs

Read from a run's folder, each only if it is there:
    run.json         {"script", "command", "config", "versions", "machine", ...}; further keys are shown as they are
    metrics.jsonl    one object a step, and one an evaluation: "step" and numbers; nested objects are flattened;
                     null = not finite; "evaluation" {"accuracy", "interval", "chance",
                     "confusion" {truth: {answer: count}}, "controls" {name: {"accuracy", "interval", …}}}
    eval*.json       what `infer.py --data_path … --json` prints: the same keys; the newest evaluation is shown
    rollouts.jsonl   one object a completion: "step", "prompt" (number of its group in the step), "id", "video",
                     "question", "answer" (the reference), "completion", "reward", "rewards" {component: number},
                     "advantage", "finished", "tokens" (texts) with their "logprobs"
    best.json        {"step", "accuracy"} of the best checkpoint
    data.json        {split: facts}: see reporting/dataset.py
    metadata.json    of the dataset, beside the file that the config's data_path names: how it was generated

Every text from a model, a file or a command line is escaped, and the page's policy lets nothing run or load but its own
style and script, known by their hashes. No torch: a page must be quick to make, while training too.
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
from reporting import charts
from reporting.dataset import dataset
from reporting.frames import clip_folders, strip
from reporting.numbers import is_number, percent, plain, short
from reporting.rollouts import components, rollout_cards, shown_tokens, total_reward
from reporting.run import Run, class_accuracy, describe, evaluation, read_run

TEMPLATE = Path(__file__).parent / "assets" / "report.html"


def page(runs: list[Run]) -> str:
    """The whole document."""
    views = [view(index, run) for index, run in enumerate(runs)]
    best = runs[0].best.get("step") if len(runs) == 1 else None
    best = best if is_number(best) else None
    columns = [(run.name, charts.columns(run.metrics) | class_accuracy(run.metrics)) for run in runs]
    drawn, constant = charts.charts(columns, best)
    datasets = [facts for run in {run.data_path: run for run in runs}.values() if (facts := dataset(run))]
    present = {
        "curves": drawn,
        "evaluation": any(view["evaluated"] for view in views),
        "rollouts": any(view["rollouts"] for view in views),
        "data": datasets,
        "setup": any(view["described"] for view in views),
    }
    return render(
        runs=views,
        charts=drawn,
        constant=constant,
        best=best,
        datasets=datasets,
        sections=[name for name, body in present.items() if body],
        notes=[note for run in runs for note in run.notes],
        **compare_options(runs),
    )


def view(index: int, run: Run) -> dict:
    """What the template shows of one run."""
    facts = describe(run) | evaluation(run) | {"index": index, "folders": clip_folders(run.config)}
    facts["rollouts"] = rollout_cards(run.rollouts) if run.rollouts else {}
    facts["evaluated"] = bool(facts["confusion"] or facts["controls"])
    facts["described"] = bool(facts["info"] or facts["options"])
    return facts


def compare_options(runs: list[Run]) -> dict[str, list[list[str]]]:
    """Rows of the options that differ between runs, and of those that only some of them have."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    rows = {name: [plain(run.config[name]) if name in run.config else "–" for run in runs] for name in names}
    shared = [name for name in names if all(name in run.config for run in runs)]
    return {
        "differ": [[name, *rows[name]] for name in shared if len(set(rows[name])) > 1],
        "only_some": [[name, *rows[name]] for name in names if name not in shared],
    }


def render(**values) -> str:
    """The template with its values. The policy names style and script by their hashes and allows no other sources."""
    text = TEMPLATE.read_text(encoding="utf-8")
    hashes = []
    for tag in ("style", "script"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        hashes.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
    policy = "; ".join(["default-src 'none'", "img-src data:", *hashes, "base-uri 'none'", "form-action 'none'"])
    geometry = [charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM]
    environment = Environment(autoescape=True)
    environment.filters |= {"percent": percent, "plain": plain, "short": short, "frames": strip}
    environment.filters |= {"tokens": shown_tokens, "reward": total_reward, "components": components}
    return environment.from_string(text).render(policy=policy, geometry=geometry, **values)


def write_report(run_folders: list[Path], output: Path) -> Path:
    """Write the page of one run, or of several laid over each other, to `output`, whole or not at all; returns it.

    UserError if a folder is not there or the page cannot be written; whatever a folder lacks has no section.
    """
    output = Path(output)
    text = page([read_run(Path(folder)) for folder in run_folders])
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
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

"""A run's folder -> one HTML page that needs nothing else: what ran, curves, evaluation, rollouts, data.

    python report.py RUN [RUN ...] [--output FILE]     RUN/report.html; several runs are laid over each other

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
    metadata.json    of the dataset, beside the file that the config's data_path names; preview.png too

Every text from a model, a file or a command line is escaped, and the page's policy lets nothing run or load but its own
style and script, known by their hashes. No torch: a page must be quick to make, while training too.
"""

import argparse
import base64
import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from config import GRPO, SFT, as_dict, cli
from model import UserError
from reporting import charts
from reporting.charts import columns, number, percent, short
from reporting.rollouts import Rollouts, read_rollouts, rollouts_html

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
MAX_PREVIEW = 400_000  # bytes of a dataset's preview.png that is put into the page


# -- Reading


@dataclass
class Run:
    """What a run's folder holds; {} and [] for what is not there."""

    name: str
    folder: Path
    about: dict  # run.json
    rows: list[dict]  # metrics.jsonl
    best: dict  # best.json
    rollouts: Rollouts | None
    measured: list[dict]  # objects with a confusion table or controls: of metrics.jsonl, then of eval*.json
    notes: list[str]  # what could not be read

    @property
    def config(self) -> dict:
        found = self.about.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def data_path(self) -> Path | None:
        found = self.config.get("data_path")
        return Path(found) if isinstance(found, str) and found else None


def read_object(path: Path, notes: list[str]) -> dict:
    """A JSON object; {} if the file is not there, or with a note for the page if it holds something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        notes.append(f"{path} is left out: not JSON ({error})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path} is left out: a JSON {type(value).__name__}, expected an object")
        return {}
    return value


def read_rows(path: Path, notes: list[str]) -> list[dict]:
    """The JSON objects of a .jsonl file; other lines (cut by a crash, say) are counted in a note."""
    if not path.is_file():
        return []
    rows, broken = [], 0
    for line in path.read_bytes().splitlines():
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


def read_run(folder: Path) -> Run:
    """UserError if there is no such folder; whatever is missing inside is missing on the page."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a run's folder, the --output_dir of a training")
    notes = []
    about, best = (read_object(folder / name, notes) for name in ("run.json", "best.json"))
    rows = read_rows(folder / "metrics.jsonl", notes)
    found = rows + [read_object(path, notes) for path in sorted(folder.glob("eval*.json"))]
    measured = [inner for row in found if (inner := evaluation_of(row))]
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    return Run(folder.resolve().name, folder, about, rows, best, rollouts, measured, notes)


# -- Small pieces of HTML


def plain(value) -> str:
    """Any JSON value as text."""
    if isinstance(value, str):
        return value
    return short(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def table(rows, head: list[str] = ()) -> str:
    """Rows of ready HTML cells, the first of each a heading."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def section(anchor: str, title: str, body: str) -> str:
    """'' for an empty body: what is not there has no heading either."""
    return f'<section id="{anchor}"><h2>{title}</h2>{body}</section>' if body else ""


def key_dot(k: int) -> str:
    """The colour of run k among several."""
    return f'<i class="key s{k % charts.COLOURS}"></i>'


# -- What ran


def defaults(run: Run) -> dict:
    """The defaults of the script that made the run."""
    return as_dict(GRPO() if "num_generations" in run.config else SFT())


def changes(run: Run) -> list[tuple[str, str, str]]:
    """[(option, value, default)] of the config's options that are not at their default."""
    usual = defaults(run)
    differ = {name: value for name, value in run.config.items() if name in usual and value != usual[name]}
    return [(name, plain(value), plain(usual[name])) for name, value in differ.items()]


def command(run: Run) -> str:
    """The command line, or one that does the same, from the script's name and what differs from the defaults."""
    told = run.about.get("command")
    if isinstance(told, list):
        return shlex.join(map(str, told))
    if isinstance(told, str):
        return told
    script = run.about.get("script")
    flags = (f"--{name} {shlex.quote(value)}" for name, value, _ in changes(run))
    return " ".join([f"python {script}.py", *flags]) if isinstance(script, str) else ""


def summary(run: Run) -> list[tuple[str, str, str]]:
    """[(label, value, remark)] of the numbers one asks for first."""
    found = {key: (x, y[np.isfinite(y)]) for key, (x, y) in columns(run.rows).items() if np.isfinite(y).any()}
    values, tiles = {key: y for key, (_, y) in found.items()}, []
    accuracy = next((key for key in ("eval_accuracy", "eval/accuracy") if key in values), None)
    if accuracy:
        y = values[accuracy]
        tiles.append(("Held-out accuracy", percent(y[-1]), f"from {percent(y[0])} at first" if len(y) > 1 else ""))
    if number(run.best.get("accuracy")):
        tiles.append(("Best checkpoint", percent(run.best["accuracy"]), f"step {run.best.get('step')}"))
    for name in ("reward", "loss"):
        if name in values and not (name == "loss" and "reward" in values):  # GRPO's loss tells nothing by itself
            y = values[name]
            few = max(1, min(10, len(y) // 4))
            remark = f"from {y[:few].mean():.3g}; means of {few} steps" if len(y) > 1 else ""
            tiles.append((name.capitalize(), f"{y[-few:].mean():.3g}", remark))
    if found:
        spent = values["ms"].sum() / 1000 if "ms" in values else 0
        steps = max(x[-1] for x, _ in found.values())
        tiles.append(("Steps", f"{steps:,.0f}", f"{duration(spent)} of training" if spent else ""))
    if "tokens_per_second" in values:
        tiles.append(("Throughput", f"{np.median(values['tokens_per_second']):,.0f}", "tokens a second, median"))
    memory = next((key for key in values if charts.group_of(key)[0] == "Memory"), None)
    if memory:
        tiles.append(("Memory", f"{values[memory].max():.2f} GiB", "peak"))
    return tiles


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def head(run: Run) -> str:
    """Title, one line of facts, the command, what differs from the defaults, the first numbers."""
    about = {key.rpartition("/")[2]: value for key, value in flat_text(run.about)}
    commit = next((value for key, value in about.items() if "commit" in key and isinstance(value, str)), None)
    facts = [about.get("script"), run.config.get("model_id"), commit and f"commit {commit[:10]}", about.get("started")]
    facts += [*about["gpus"]] if isinstance(about.get("gpus"), list) and about["gpus"] else [about.get("cpu")]
    line = " · ".join(escape(str(fact)) for fact in facts if fact)
    chips = "".join(
        f"<li>{escape(name)} = {escape(value) or '&quot;&quot;'}<s>{escape(usual) or '&quot;&quot;'}</s></li>"
        for name, value, usual in changes(run)
    )
    told = f"<pre>{escape(command(run))}</pre>" if command(run) else ""
    told += f'<ul class="chips" title="what differs from the defaults (struck out)">{chips}</ul>' if chips else ""
    tiles = "".join(
        f'<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><dd class="soft">{escape(remark)}</dd></div>'
        for label, value, remark in summary(run)
    )
    tiles = f'<dl class="tiles">{tiles}</dl>' if tiles else ""
    return f'<header><h1>{escape(run.name)}</h1><p class="soft">{line}</p>{told}</header>{tiles}'


def flat_text(value: dict, before: str = ""):
    """(key, value) of everything in nested objects, but the config."""
    for key, inner in value.items():
        if isinstance(inner, dict) and key != "config":
            yield from flat_text(inner, f"{before}{key}/")
        elif key != "config":
            yield before + key, inner


def setup(run: Run) -> str:
    """Versions, machine and whatever else run.json tells; then the whole config, changed options marked."""
    facts = [(escape(key.replace("/", " ")), escape(plain(value))) for key, value in flat_text(run.about)]
    usual, changed = defaults(run), {name for name, *_ in changes(run)}
    rows = []
    for name, value in run.config.items():
        mark = " class=changed" if name in changed else ""
        default = escape(plain(usual[name])) if name in usual else "–"
        rows.append(f"<tr{mark}><th>{escape(name)}</th><td>{escape(plain(value))}</td><td>{default}</td></tr>")
    top = "<thead><tr><th>option</th><th>value</th><th>default</th></tr></thead>"
    config = f'<div class="wide"><table>{top}<tbody>{"".join(rows)}</tbody></table></div>'
    told = f"All {len(rows)} options, {len(changed)} of them changed"
    html = table(facts) if facts else ""
    return html + (f"<details><summary>{told}</summary>{config}</details>" if rows else "")


# -- Evaluation


def evaluation_of(row: dict) -> dict | None:
    """The object in a row that holds a confusion table or controls: the row itself or one nested in it."""
    if isinstance(row.get("confusion"), dict) or isinstance(row.get("controls"), dict):
        return row
    nested = (evaluation_of(value) for value in row.values() if isinstance(value, dict))
    return next((found for found in nested if found), None)


def evaluation(run: Run) -> str:
    """The newest confusion table and the newest controls among what was measured."""
    newest = {
        name: next((found for found in reversed(run.measured) if isinstance(found.get(name), dict)), None)
        for name in ("confusion", "controls")
    }
    parts = []
    if newest["confusion"] and (found := charts.confusion(newest["confusion"]["confusion"])):
        parts.append(f"<div><h3>Confusion <small>rows: the truth; columns: the answer</small></h3>{found}</div>")
    if newest["controls"] and (found := charts.controls(newest["controls"])):
        chance = newest["controls"].get("chance")
        lead = "The same questions with the frames changed: a model that watches the clip loses accuracy."
        lead += f" Chance is {percent(chance)}." if number(chance) else ""
        parts.append(f'<div><h3>Does it watch?</h3><p class="soft">{lead}</p>{found}</div>')
    return f'<div class="side">{"".join(parts)}</div>' if parts else ""


# -- Data


def dataset(run: Run) -> str:
    """metadata.json and preview.png beside the data: how many clips of each kind, how they were made."""
    if run.data_path is None:
        return ""
    found = read_object(run.data_path.parent / "metadata.json", run.notes)
    counts = found.get("counts") if isinstance(found.get("counts"), dict) else {}
    counts = {part: n for part, n in counts.items() if isinstance(n, dict)}
    labels = sorted({label for n in counts.values() for label in n})
    rows = [(escape(label), *(escape(plain(n.get(label, 0))) for n in counts.values())) for label in labels]
    rows += [("all", *(str(sum(filter(number, n.values()))) for n in counts.values()))] if rows else []
    parts = [f"<div><h3>Clips</h3>{table(rows, ['', *map(escape, counts)])}</div>"] if rows else []
    rest = {key: value for key, value in found.items() if key != "counts"}
    facts = (f"{key.replace('options/', '').replace('/', ' ')} = {plain(value)}" for key, value in flat_text(rest))
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    parts += [f'<div><h3>How they were made</h3><ul class="chips">{chips}</ul></div>'] if chips else []
    preview, picture = run.data_path.parent / "preview.png", ""
    if preview.is_file() and preview.stat().st_size <= MAX_PREVIEW:
        url = "data:image/png;base64," + base64.b64encode(preview.read_bytes()).decode()
        picture = f'<h3>Samples</h3><img class="preview" src="{url}" alt="frames of some clips of the dataset">'
    lead = f'<p class="soft">{escape(str(run.data_path))}</p>'
    return f'{lead}<div class="side">{"".join(parts)}</div>{picture}' if parts or picture else ""


# -- The page


def several_heads(runs: list[Run]) -> str:
    """Runs side by side: their first numbers, and the options in which they differ."""
    tiles = [{label: (value, remark) for label, value, remark in summary(run)} for run in runs]
    names = [key_dot(k) + escape(run.name) for k, run in enumerate(runs)]
    rows = []
    for label in dict.fromkeys(label for found in tiles for label in found):
        pairs = (found.get(label, ("–", "")) for found in tiles)
        rows.append((escape(label), *(f"{escape(value)} <small>{escape(remark)}</small>" for value, remark in pairs)))
    options = list(dict.fromkeys(name for run in runs for name in run.config))
    values = ((name, [plain(run.config[name]) if name in run.config else "–" for run in runs]) for name in options)
    differ = [(escape(name), *map(escape, found)) for name, found in values if len(set(found)) > 1]
    html = f"<header><h1>{len(runs)} runs</h1></header>{table(rows, ['', *names])}"
    return html + (f"<h3>Options that differ</h3>{table(differ, ['', *names])}" if differ else "")


def each(runs: list[Run], make) -> str:
    """make(run) of each run; under its name if there are several."""
    parts = []
    for k, run in enumerate(runs):
        name = f'<h3 class="run">{key_dot(k)}{escape(run.name)}</h3>' if len(runs) > 1 else ""
        html = make(run)
        parts += [name + html] if html else []
    return "".join(parts)


def said(run: Run) -> str:
    return rollouts_html(run.rollouts, clip_folders(run)) if run.rollouts else ""


def clip_folders(run: Run) -> list[Path]:
    """Where a rollout's video may lie: image_folder, videos/ beside the data, beside the data."""
    found = [Path(run.config["image_folder"])] if isinstance(run.config.get("image_folder"), str) else []
    return found + ([run.data_path.parent / "videos", run.data_path.parent] if run.data_path else [])


def page(runs: list[Run]) -> str:
    """The whole document."""
    named = [(run.name, columns(run.rows)) for run in runs]
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (--output_dir of a training)")
    parser.add_argument("--output", type=Path, help="file to write; default: report.html in the first run's folder")
    args = parser.parse_args(argv)
    print(write_report(args.runs, args.output or args.runs[0] / "report.html"))


if __name__ == "__main__":
    cli(main)

"""What was run: command, config against the defaults, versions, machine, and the numbers one asks for first."""

import shlex
from html import escape

import numpy as np

from config import GRPO, SFT, as_dict
from reporting.charts import columns, group_of, number, percent
from reporting.pieces import flat_text, key_dot, plain, table
from reporting.reading import Run


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
        return shlex.join(["python", *map(str, told)])
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
    memory = next((key for key in values if group_of(key)[0] == "Memory"), None)
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


def setup(run: Run) -> str:
    """Versions, machine and whatever else run.json tells; then the whole config, changed options marked."""
    told = {key: value for key, value in run.about.items() if key != "command"}  # at the top of the page
    facts = [(escape(key.replace("/", " ")), escape(plain(value))) for key, value in flat_text(told)]
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


def several_heads(runs: list[Run]) -> str:
    """Runs side by side: their first numbers, and the options in which they differ."""
    tiles = [{label: (value, remark) for label, value, remark in summary(run)} for run in runs]
    names = [key_dot(k) + escape(run.name) for k, run in enumerate(runs)]
    rows = []
    for label in dict.fromkeys(label for found in tiles for label in found):
        pairs = (found.get(label, ("–", "")) for found in tiles)
        rows.append((escape(label), *(f"{escape(value)} <small>{escape(remark)}</small>" for value, remark in pairs)))
    html = f"<header><h1>{len(runs)} runs</h1></header>{table(rows, ['', *names])}"
    options = list(dict.fromkeys(name for run in runs for name in run.config))
    shared = [name for name in options if all(name in run.config for run in runs)]
    differ = [row for row in (option_row(name, runs) for name in shared) if len(set(row[1:])) > 1]
    rest = [option_row(name, runs) for name in options if name not in shared]
    html += f"<h3>Options that differ</h3>{table(differ, ['', *names])}" if differ else ""
    told = f"{len(rest)} options that not all of them have"
    return html + (f"<details><summary>{told}</summary>{table(rest, ['', *names])}</details>" if rest else "")


def option_row(name: str, runs: list[Run]) -> tuple[str, ...]:
    values = (plain(run.config[name]) if name in run.config else "–" for run in runs)
    return escape(name), *map(escape, values)

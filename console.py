"""What stands out on the console: warnings, and what a run says at its end."""

import json
import logging
import os
import signal
import sys

from tqdm import tqdm

from checkpoint import METRICS, ROLLOUTS
from script import command


def highlight(text):
    """In yellow on a terminal, unless NO_COLOR (no-color.org) is set."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[33m{text}\033[0m" if colour else text


class Handler(logging.Handler):
    """What data.py, rewards.py and rollouts.py log, as warnings above the progress bar."""

    def emit(self, record):
        tqdm.write(highlight(f"warning: {record.getMessage()}"))


def show_logged_warnings():
    for name in ("data", "rewards", "rollouts"):
        logging.getLogger(name).handlers = [Handler()]


def closing_lines(run, stop_signal):
    """What the run came to, against its start; where to read on; the next command."""
    stopped = f", stopped by {signal.Signals(stop_signal).name}" if stop_signal else ""
    yield f"{run.folder}: step {run.step} of {run.total}{stopped}"
    text = (run.folder / METRICS).read_text(encoding="utf-8") if (run.folder / METRICS).exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    name = "reward" if run.script == "train_grpo" else "loss"
    values = [row[name] for row in rows if row.get(name) is not None]
    results = [f"{name} {values[0]:.4g} in the first step, {values[-1]:.4g} in the last"] if values else []
    if run.last_accuracy is not None:
        results.append(f"answers right {run.last_accuracy:.1%}{against_start(run)}")
    if run.best:
        results.append(f"best {run.best['accuracy']:.1%} at step {run.best['step']}")
    yield f"  result  {'; '.join(results) or 'nothing was trained or judged'}"
    size = (run.folder / ROLLOUTS).stat().st_size if (run.folder / ROLLOUTS).exists() else 0
    yield f"  report  {run.folder / 'report.html'}; {ROLLOUTS} has {size / 1e6:.1f} MB"
    yield f"  next    {resume_command(run) if stop_signal else run.next_command}"


def resume_command(run):
    """How to go on: a resumed run takes its options from its folder, but not its number of processes."""
    if run.world > 1:
        return "the same command with --resume, and without --overwrite"
    return command(f"{run.script}.py", "--resume", "--output_dir", str(run.folder))


def against_start(run):
    """How the last evaluation compares with the one before the first step: "" where that was not made."""
    if run.start_accuracy is None or run.step == 0:
        return ""
    end, start = run.last_accuracy, run.start_accuracy
    relation = "better than" if end > start else "worse than" if end < start else "as good as"
    text = f" at the end, {start:.1%} at the start: {relation} the start"
    if end < start:
        text += " (the run made it worse; try a lower --learning_rate or a larger --beta)"
    return text

"""What a run says besides its steps' lines: warnings, its last lines, and --report_to for TensorBoard and W&B."""

import importlib
import json
import logging
import os
import signal
import sys
from types import SimpleNamespace

from tqdm import tqdm

from checkpoint import METRICS, ROLLOUTS, RUN, read_json
from config import split_list
from model import UserError
from script import command


def highlight(text):
    """In yellow on a terminal, unless NO_COLOR (no-color.org) is set."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[33m{text}\033[0m" if colour else text


def show_logged_warnings():
    """What data.py, rewards.py and rollouts.py log, above the progress bar."""
    handler = logging.Handler()
    handler.emit = lambda record: tqdm.write(highlight(f"warning: {record.getMessage()}"))
    for name in ("data", "rewards", "rollouts"):
        logging.getLogger(name).handlers = [handler]


def closing_lines(run, stop_signal):
    """What the run came to, against its start; where to read on; the next command."""
    stopped = f", stopped by {signal.Signals(stop_signal).name}" if stop_signal else ""
    yield f"{run.folder}: step {run.step} of {run.total}{stopped}"
    name = "reward" if run.script == "train_grpo" else "loss"
    lines = (run.folder / METRICS).read_bytes().splitlines() if (run.folder / METRICS).exists() else []
    rows = map(json.loads, lines)
    values = [row[name] for row in rows if row.get(name) is not None]
    judged = [(run.start_accuracy, "at the start"), (run.last_accuracy, "in the last evaluation")]
    accuracies = [f"{accuracy:.1%} {when}" for accuracy, when in judged if accuracy is not None]
    results = [f"{name} {values[0]:.4g} in the first step, {values[-1]:.4g} in the last"] if values else []
    results += [f"accuracy {', '.join(accuracies)}"] if accuracies else []
    results += [f"best {run.best['accuracy']:.1%} at step {run.best['step']}"] if run.best else []
    yield f"  result  {'; '.join(results) or 'nothing was trained or judged'}"
    rollouts = run.folder / ROLLOUTS
    size = f"; {ROLLOUTS} has {rollouts.stat().st_size / 1e3:,.0f} kB" if rollouts.exists() else ""
    yield f"  report  {run.folder / 'report.html'}{size}"
    resume = command(f"{run.script}.py", "--resume", "--output_dir", str(run.folder))
    if run.world > 1:  # its folder has the options, not the number of processes
        resume = "the same command with --resume, and without --overwrite"
    if following := resume if stop_signal else run.next_command:
        yield f"  next    {following}"


# -- --report_to: the scalars of metrics.jsonl, for packages that the user installs


def tensorboard(run):
    from torch.utils.tensorboard import SummaryWriter

    # a resumed run hides the later steps of the one that was killed
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.source else None)
    log = lambda step, scalars: [writer.add_scalar(name, value, step) for name, value in scalars.items()]
    return SimpleNamespace(log=log, close=writer.close)


def weights_and_biases(run):
    import wandb

    facts, page = read_json(run.folder / RUN), run.folder / "report.html"
    options = {"id": facts["id"], "name": run.folder.name, "dir": str(run.folder), "resume": "allow"}
    try:
        theirs = wandb.init(config=facts["config"], **options)
    except wandb.Error as error:  # no login, no network
        hint = "log in by wandb login, set WANDB_MODE=offline, or leave the flag out"
        raise UserError(f"--report_to wandb: {str(error).splitlines()[0].rstrip('.')}; {hint}") from None

    def close():
        if page.exists():
            theirs.log({"report": wandb.Html(str(page))})
        theirs.finish()

    return SimpleNamespace(log=lambda step, scalars: theirs.log(scalars, step=step), close=close)


TRACKERS = {"tensorboard": tensorboard, "wandb": weights_and_biases}  # packages; also the folders in the run's folder


def trackers(cfg):
    """[function: run -> what has log(step, scalars) and close()] that --report_to names."""
    names = [name for name in split_list(cfg.report_to) if name in TRACKERS]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            problem = f"--report_to {name}: that package is not installed; pip install {name}, or leave the flag out"
            raise UserError(f"{problem}: metrics.jsonl and report.html have it all") from None
    return [TRACKERS[name] for name in names]

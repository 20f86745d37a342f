"""What a run says besides its steps' lines: warnings, its last lines, and --report_to for TensorBoard and W&B."""

import importlib
import importlib.util
import json
import logging
import os
import signal
import sys

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
    text = (run.folder / METRICS).read_text(encoding="utf-8") if (run.folder / METRICS).exists() else ""
    values = [row[name] for row in map(json.loads, text.splitlines()) if row.get(name) is not None]
    results = [f"{name} {values[0]:.4g} in the first step, {values[-1]:.4g} in the last"] if values else []
    judged = {"at the start": run.start_accuracy, "in the last evaluation": run.last_accuracy}
    if any(accuracy is not None for accuracy in judged.values()):
        texts = [f"{accuracy:.1%} {when}" for when, accuracy in judged.items() if accuracy is not None]
        results.append(f"accuracy {', '.join(texts)}")
    if run.best:
        results.append(f"best {run.best['accuracy']:.1%} at step {run.best['step']}")
    yield f"  result  {'; '.join(results) or 'nothing was trained or judged'}"
    size = (run.folder / ROLLOUTS).stat().st_size if (run.folder / ROLLOUTS).exists() else 0
    yield f"  report  {run.folder / 'report.html'}; {ROLLOUTS} has {size / 1e6:.1f} MB"
    resume = command(f"{run.script}.py", "--resume", "--output_dir", str(run.folder))
    if run.world > 1:  # its folder has the options, not the number of processes
        resume = "the same command with --resume, and without --overwrite"
    yield f"  next    {resume if stop_signal else run.next_command}"


# -- --report_to: the scalars of metrics.jsonl, for packages that the user installs


class TensorBoard:
    def __init__(self, run):
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # a resumed run hides the later steps of the one that was killed
        self.writer = writer(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.source else None)
        self.close = self.writer.close

    def log(self, step, scalars):
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)


class Wandb:
    def __init__(self, run):
        self.wandb, self.page = importlib.import_module("wandb"), run.folder / "report.html"
        facts = read_json(run.folder / RUN)
        options = {"id": facts["id"], "name": run.folder.name, "dir": str(run.folder), "resume": "allow"}
        try:
            self.run = self.wandb.init(config=facts["config"], **options)
        except self.wandb.Error as error:  # no login, no network
            hint = "log in by wandb login, set WANDB_MODE=offline, or leave the flag out"
            raise UserError(f"--report_to wandb: {str(error).splitlines()[0].rstrip('.')}; {hint}") from None

    def log(self, step, scalars):
        self.run.log(scalars, step=step)

    def close(self):
        if self.page.exists():
            self.run.log({"report": self.wandb.Html(str(self.page))})
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}  # packages; also the folders in the run's folder


def trackers(cfg):
    """[class] that --report_to names."""
    names = [name for name in split_list(cfg.report_to) if name in TRACKERS]
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            problem = f"--report_to {name}: that package is not installed; pip install {name}, or leave the flag out"
            raise UserError(f"{problem}: metrics.jsonl and report.html have it all")
    return [TRACKERS[name] for name in names]

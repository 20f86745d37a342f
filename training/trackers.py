"""--report_to: metrics and rollouts for TensorBoard and wandb, beside metrics.jsonl, which every run has.

Both packages are the user's: they are imported only where a run asks for them. Names and steps are those of
metrics.jsonl. A resumed run repeats the steps after its checkpoint; they are not shown twice: TensorBoard's
files lose what they had of them, and wandb gets those points of metrics.jsonl that its run does not have yet.
"""

import importlib.util
import json
import os
import secrets
from pathlib import Path

from config import as_dict, split_list
from model import UserError
from reporting.charts import NOT_CHARTED, flat
from reporting.rollouts import components, groups_of, informative
from training.checkpoint import METRICS, RUN, read_json, write_json

TRACKERS = ("tensorboard", "wandb")  # also the folders in the run's folder
WANDB_RUN = "run.json"  # in the folder wandb: the id, which a resumed run goes on under
COLUMNS = ("step", "id", "question", "answer", "completion", "reward", "advantage", "tokens", "finished")


def check_installed(cfg):
    """UserError for a tracker that is asked for and not there. Cheap, and before anything is done."""
    for name in split_list(cfg.report_to):
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            told = f"--report_to {name}: that package is not installed; pip install {name}, or leave the flag out"
            raise UserError(f"{told}: metrics.jsonl and report.html have it all")


def open_trackers(run):
    """The trackers that a run asks for; its folder holds run.json already."""
    makers = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [makers[name](run) for name in TRACKERS if name in split_list(run.cfg.report_to)]


def numbers_of(row):
    """The numbers of a row of metrics.jsonl; of its evaluation too, as "evaluation/controls/reversed/accuracy"."""
    deep = {name: value for name, value in flat(row.get("evaluation") or {}, "evaluation/") if value is not None}
    deep = {name: value for name, value in deep.items() if not NOT_CHARTED & {*name.split("/")}}
    return {name: value for name, value in row.items() if isinstance(value, (int, float))} | deep


def rollout_table(rows):
    """Rows of rollouts.jsonl -> (columns, one list a row)."""
    names = list(dict.fromkeys(name for row in rows for name in components(row)))
    columns = [*COLUMNS[:6], *(f"reward/{name}" for name in names), *COLUMNS[6:]]
    lines = []
    for row in rows:
        scores = [components(row).get(name) for name in names]
        lengths = [row.get("advantage"), row.get("n_tokens"), row.get("finished")]
        lines.append([*(row.get(name) for name in COLUMNS[:6]), *scores, *lengths])
    return columns, lines


def telling_rows(rows):
    """Of the completions of a step those of the most informative groups."""
    groups = groups_of(json.dumps(row) for row in rows)
    return [row for group in informative(groups, groups[0].step) for row in group.ranked] if groups else []


class TensorBoard:
    def __init__(self, run):
        from torch.utils.tensorboard import SummaryWriter

        self.run, folder = run, run.folder / "tensorboard"
        cut_events(folder, run.step)
        self.writer = SummaryWriter(str(folder))
        facts = [("command", " ".join(read_json(run.folder / RUN)["command"])), *as_dict(run.cfg).items()]
        self.writer.add_text("config", markdown(("option", "value"), facts), run.step)

    def numbers(self, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def rollouts(self, step, rows):
        self.writer.add_text("rollouts", markdown(*rollout_table(rows)), step)
        self.writer.flush()

    def close(self):
        self.writer.close()


def cut_events(folder, step):
    """Drop the events of later steps, and a config that is told again. (SummaryWriter's purge_step leaves it to the
    reader, and TensorBoard's own, EventAccumulator, does not purge texts.)"""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    def stays(event):
        return event.step <= step and not any(value.tag.startswith("config") for value in event.summary.value)

    for path in folder.glob("events.out.tfevents.*"):
        kept = [raw for raw in RawEventFileLoader(str(path)).Load() if stays(Event.FromString(raw))]
        with path.with_name(f".{path.name}.tmp").open("wb") as file:
            writer = RecordWriter(file)
            for raw in kept:
                writer.write(raw)
        Path(file.name).rename(path)


def markdown(columns, lines):
    """A table as TensorBoard renders it; what the model or the data say is text and no markup."""

    def cell(value):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        marked = "".join(c if c.isalnum() or c in " ,;:" else f"&#{ord(c)};" for c in text)
        return marked.replace("&#10;", "<br>")

    rows = [columns, ["---"] * len(columns), *([cell(value) for value in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Wandb:
    """A resumed run goes on under its id where wandb's server knows it; offline, where nobody does, it is a new run
    with all points from the start."""

    def __init__(self, run):
        import wandb

        self.run, self.wandb = run, wandb
        known = run.folder / "wandb" / WANDB_RUN
        before = read_json(known)["id"] if run.source is not None and known.exists() else None
        facts = {name: value for name, value in read_json(run.folder / RUN).items() if name != "config"}
        facts |= {"resumed_from": before} if before else {}
        offline = wandb.setup().settings.mode == "offline"
        run_id = before if before and not offline else secrets.token_hex(4)
        try:
            self.log = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "qwen2.5vl-r1"), name=run.folder.name, id=run_id,
                resume=None if offline else "allow", dir=str(run.folder), config=as_dict(run.cfg) | {"run": facts},
            )  # fmt: skip
        except wandb.Error as error:
            told = str(error).strip().splitlines()[0]
            raise UserError(f"--report_to wandb: {told}; wandb login, or set WANDB_MODE=offline") from None
        # rows carry their step: wandb's own counter would hold a step's row back until the next one begins
        self.log.define_metric("step")
        self.log.define_metric("*", step_metric="step")
        known.parent.mkdir(exist_ok=True)
        write_json(known, {"id": run_id})
        self.sent = self.log.summary.get("step", -1) if self.log.resumed else -1
        for line in (run.folder / METRICS).read_text(encoding="utf-8").splitlines() if before else ():
            row = json.loads(line)
            self.numbers(row.pop("step"), numbers_of(row))

    def numbers(self, step, numbers):
        if step > self.sent:
            self.log.log({"step": step, **numbers})

    def rollouts(self, step, rows):
        if step <= self.sent:
            return
        columns, lines = rollout_table(rows)
        self.log.log({"step": step, "rollouts": self.wandb.Table(columns=columns, data=lines)})

    def close(self):
        self.log.finish()

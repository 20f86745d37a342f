"""--report_to: metrics, rollouts and clips for TensorBoard and wandb, beside metrics.jsonl, which every run has.

Both packages are the user's: they are imported only where a run asks for them. Names and steps are those of
metrics.jsonl. A resumed run repeats the steps after its checkpoint; they are not shown twice: TensorBoard is told to
drop what it had of them (purge_step), and what was sent to wandb before is not sent again.
"""

import importlib.util
import os
import secrets
import tempfile
from pathlib import Path

from config import as_dict, split_list
from model import UserError
from reporting.frames import clip_folders, gif
from reporting.rollouts import parts
from training.checkpoint import RUN, read_json, write_json

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


def rollout_table(rows):
    """Rows of rollouts.jsonl -> (columns, one list a row)."""
    names = list(dict.fromkeys(name for row in rows for name in parts(row)))
    columns = [*COLUMNS[:6], *(f"reward/{name}" for name in names), *COLUMNS[6:]]
    lines = []
    for row in rows:
        scores = [parts(row).get(name) for name in names]
        lengths = [row.get("advantage"), row.get("n_tokens"), row.get("finished")]
        lines.append([*(row.get(name) for name in COLUMNS[:6]), *scores, *lengths])
    return columns, lines


class Clips:
    """One GIF for each clip that rows name, in a folder that goes when this is closed."""

    def __init__(self, run):
        self.run, self.folders = run, clip_folders(as_dict(run.cfg))

    def of(self, rows):
        """{id of the sample: path of its GIF}; a clip that cannot be read is told."""
        videos = {str(row.get("id")): row["video"] for row in rows if row.get("video")}
        made = {}
        for number, (name, video) in enumerate(videos.items()):
            path = Path(self.folder.name) / f"{number}.gif"
            if fault := gif(video, self.folders, path):
                self.run.say(f"--report_to: no clip of sample {name}: {fault}")
            else:
                made[name] = path
        return made

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_):
        self.folder.cleanup()


class TensorBoard:
    def __init__(self, run):
        from torch.utils.tensorboard import SummaryWriter

        self.run, resumed = run, run.source is not None
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if resumed else None)
        facts = [("command", " ".join(read_json(run.folder / RUN)["command"])), *as_dict(run.cfg).items()]
        self.writer.add_text("config", markdown(("option", "value"), facts), run.step + resumed)

    def numbers(self, step, numbers):
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def rollouts(self, step, rows):
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer.add_text("rollouts", markdown(*rollout_table(rows)), step)
        with Clips(self.run) as clips:
            for name, path in clips.of(rows).items():
                data = path.read_bytes()
                width, height = (int.from_bytes(data[i : i + 2], "little") for i in (6, 8))  # GIF's header
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
                value = Summary.Value(tag=f"clips/{name}", image=image)
                self.writer.file_writer.add_summary(Summary(value=[value]), step)
        self.writer.flush()

    def close(self):
        self.writer.close()


def markdown(columns, lines):
    """A table as TensorBoard renders it; what the model or the data say is text and no markup."""

    def cell(value):
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        marked = "".join(c if c.isalnum() or c in " ,;:" else f"&#{ord(c)};" for c in text)
        return marked.replace("&#10;", "<br>")

    rows = [columns, ["---"] * len(columns), *([cell(value) for value in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Wandb:
    def __init__(self, run):
        import wandb

        self.run, self.wandb = run, wandb
        known = run.folder / "wandb" / WANDB_RUN
        resumed = run.source is not None and known.exists()
        run_id = read_json(known)["id"] if resumed else secrets.token_hex(4)
        self.sent = run.logged if resumed else -1
        facts = {name: value for name, value in read_json(run.folder / RUN).items() if name != "config"}
        try:
            self.log = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "qwen2.5vl-r1"), name=run.folder.name, id=run_id,
                resume="allow", dir=str(run.folder), config=as_dict(run.cfg) | {"run": facts},
            )  # fmt: skip
        except wandb.Error as error:
            told = str(error).strip().splitlines()[0]
            raise UserError(f"--report_to wandb: {told}; wandb login, or set WANDB_MODE=offline") from None
        # rows carry their step: wandb's own counter would hold a step's row back until the next one begins
        self.log.define_metric("step")
        self.log.define_metric("*", step_metric="step")
        known.parent.mkdir(exist_ok=True)
        write_json(known, {"id": run_id})

    def numbers(self, step, numbers):
        if step > self.sent:
            self.log.log({"step": step, **numbers})

    def rollouts(self, step, rows):
        if step <= self.sent:
            return
        columns, lines = rollout_table(rows)
        table = self.wandb.Table(columns=["clip", *columns])
        with Clips(self.run) as clips:
            made = clips.of(rows)
            for row, line in zip(rows, lines, strict=True):
                path = made.get(str(row.get("id")))
                table.add_data(path and self.wandb.Video(str(path), format="gif"), *line)
            self.log.log({"step": step, "rollouts": table})

    def close(self):
        self.log.finish()

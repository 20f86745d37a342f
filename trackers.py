"""--report_to: the numbers of metrics.jsonl for TensorBoard and W&B. Both packages are the user's own, imported only
where a run asks for them; metrics.jsonl and report.html have everything without them."""

import importlib.util
import os

from checkpoint import RUN, read_json
from config import as_dict, split_list
from model import UserError
from reporting.charts import NOT_CHARTED
from reporting.numbers import flatten

TRACKERS = ("tensorboard", "wandb")  # also the folders in the run's folder


def check_installed(cfg):
    """UserError for a tracker that is asked for and not there. Cheap, and before anything is done."""
    for name in split_list(cfg.report_to):
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            problem = f"--report_to {name}: that package is not installed; pip install {name}, or leave the flag out"
            raise UserError(f"{problem}: metrics.jsonl and report.html have it all")


def open_trackers(run):
    """The trackers that a run asks for; its folder holds run.json already."""
    makers = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [makers[name](run) for name in TRACKERS if name in split_list(run.cfg.report_to)]


def numbers_of(row):
    """The numbers of a row of metrics.jsonl; of its evaluation too, as "evaluation/controls/reversed/accuracy"."""
    deep = {f"evaluation/{name}": value for name, value in flatten(row.get("evaluation") or {})
            if isinstance(value, (int, float)) and not NOT_CHARTED & {*name.split("/")}}  # fmt: skip
    return {name: value for name, value in row.items() if isinstance(value, (int, float))} | deep


class TensorBoard:
    """purge_step hides what a killed run wrote after the checkpoint that this one goes on from."""

    def __init__(self, run):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.source else None)
        lines = "\n".join(f"    {name} = {value!r}" for name, value in as_dict(run.cfg).items())
        self.writer.add_text("config", lines, run.step)

    def log(self, step, row):
        for name, value in numbers_of(row).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    """A resumed run goes on under its id, which is that of its folder's run.json."""

    def __init__(self, run):
        import wandb

        facts = {name: value for name, value in read_json(run.folder / RUN).items() if name != "config"}
        project = os.environ.get("WANDB_PROJECT", "qwen2.5vl-r1")
        settings = {"name": run.folder.name, "id": facts["id"], "resume": "allow", "dir": str(run.folder)}
        try:
            self.run = wandb.init(project=project, config=as_dict(run.cfg) | {"run": facts}, **settings)
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--report_to wandb: {reason}; wandb login, or set WANDB_MODE=offline") from None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.page, self.html = run.folder / "report.html", wandb.Html

    def log(self, step, row):
        self.run.log({"step": step, **numbers_of(row)})

    def close(self):
        if self.page.exists():
            self.run.log({"report": self.html(self.page.read_text(encoding="utf-8"))})
        self.run.finish()

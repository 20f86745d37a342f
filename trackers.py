"""--report_to: the scalars of metrics.jsonl for TensorBoard and W&B, packages that the user installs."""

import importlib.util

from checkpoint import RUN, read_json
from config import split_list
from model import UserError


class TensorBoard:
    def __init__(self, run):
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        # a resumed run hides the later steps of the one that was killed
        self.writer = writer(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.source else None)
        self.close = self.writer.close

    def log(self, step, row):
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)


class Wandb:
    def __init__(self, run):
        self.wandb, self.folder, facts = importlib.import_module("wandb"), run.folder, read_json(run.folder / RUN)
        options = {"id": facts["id"], "name": run.folder.name, "dir": str(run.folder), "resume": "allow"}
        try:
            self.run = self.wandb.init(config=facts["config"], **options)
        except self.wandb.Error as error:  # no login, no network
            hint = "log in by wandb login, set WANDB_MODE=offline, or leave the flag out"
            raise UserError(f"--report_to wandb: {str(error).splitlines()[0].rstrip('.')}; {hint}") from None

    def log(self, step, row):
        self.run.log({name: value for name, value in row.items() if isinstance(value, (int, float))}, step=step)

    def close(self):
        if (self.folder / "report.html").exists():
            self.run.log({"report": self.wandb.Html(str(self.folder / "report.html"))})
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}  # packages; also the folders in the run's folder


def check_installed(cfg):
    for name in split_list(cfg.report_to):
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            problem = f"--report_to {name}: that package is not installed; pip install {name}, or leave the flag out"
            raise UserError(f"{problem}: metrics.jsonl and report.html have it all")


def open_trackers(run):
    return [TRACKERS[name](run) for name in split_list(run.cfg.report_to) if name in TRACKERS]

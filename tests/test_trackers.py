"""--report_to: the scalars of metrics.jsonl; a resumed run hides what came after its checkpoint."""

import json
import sys
from unittest.mock import MagicMock, call

import pytest
import torch

import console
from config import SFT
from model import UserError
from trainer import Log, Run

ROW = {"loss": 5.0, "note": "text", "skipped": None, "evaluation": {"accuracy": 0.5}}


def log_of(folder, report_to, **options):
    run = Run(SFT(report_to=report_to), "train_sft", folder, torch.device("cpu"), torch.float32, total=4, **options)
    return Log(run, [])


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="--report_to wandb: that package is not installed; pip install wandb"):
        console.trackers(SFT(report_to="wandb"))
    assert console.trackers(SFT()) == []


def test_tensorboard_has_the_scalars(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, source, loss in ((0, None, 5.0), (2, tmp_path, 7.0)):
        log = log_of(tmp_path, "tensorboard", step=step, source=source)
        for later in range(step + 1, 5):
            log.write(later, ROW | {"loss": loss})
        log.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 7.0), (4, 7.0)]


def test_wandb_has_config_scalars_and_page_and_without_a_login_ends_in_one_line(tmp_path, monkeypatch):
    wandb = MagicMock(Error=ConnectionError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run.json").write_text(json.dumps({"id": "abc", "config": {"seed": 3}}))
    (tmp_path / "report.html").write_text("page")
    log = log_of(tmp_path, "wandb")
    log.write(3, ROW)
    log.close()
    assert wandb.init.call_args.kwargs.items() >= {"id": "abc", "resume": "allow", "config": {"seed": 3}}.items()
    logged = wandb.init.return_value.log.call_args_list
    assert logged == [call({"loss": 5.0}, step=3), call({"report": wandb.Html.return_value})]
    wandb.init.side_effect = ConnectionError("No API key configured. Use `wandb login` to log in.")
    with pytest.raises(UserError, match="^--report_to wandb: No API key.*WANDB_MODE=offline"):
        log_of(tmp_path, "wandb")

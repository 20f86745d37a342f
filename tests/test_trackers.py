"""--report_to: the scalars of metrics.jsonl; a resumed run hides what came after its checkpoint."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest

import console
from config import SFT
from model import UserError

ROW = {"loss": 5.0}


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb: that package is not installed; pip install wandb"):
        console.check_installed(SFT(report_to="wandb"))
    console.check_installed(SFT())


def test_tensorboard_has_the_scalars(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = SimpleNamespace(cfg=SFT(report_to="tensorboard"), folder=tmp_path, step=0, source=None)
    for run.step, run.source, loss in ((0, None, 5.0), (2, tmp_path, 7.0)):
        (tracker,) = console.open_trackers(run)
        for step in range(run.step + 1, 5):
            tracker.log(step, ROW | {"loss": loss})
        tracker.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 7.0), (4, 7.0)]


def test_wandb_has_config_scalars_and_page(tmp_path, monkeypatch):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run.json").write_text(json.dumps({"id": "abc", "config": {"seed": 3}}))
    (tmp_path / "report.html").write_text("page")
    (tracker,) = console.open_trackers(SimpleNamespace(cfg=SFT(report_to="wandb"), folder=tmp_path))
    tracker.log(3, ROW)
    tracker.close()
    assert wandb.init.call_args.kwargs.items() >= {"id": "abc", "resume": "allow", "config": {"seed": 3}}.items()
    logged = wandb.init.return_value.log.call_args_list
    assert logged == [call({"loss": 5.0}, step=3), call({"report": wandb.Html.return_value})]


def test_wandb_without_a_login_ends_in_one_line(tmp_path, monkeypatch):
    wandb = MagicMock(Error=ConnectionError)
    wandb.init.side_effect = ConnectionError("No API key configured. Use `wandb login` to log in.")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run.json").write_text(json.dumps({"id": "abc", "config": {}}))
    with pytest.raises(UserError, match="^--report_to wandb: No API key.*WANDB_MODE=offline"):
        console.open_trackers(SimpleNamespace(cfg=SFT(report_to="wandb"), folder=tmp_path))

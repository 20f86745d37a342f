"""--report_to: TensorBoard has the numbers of metrics.jsonl; a resumed run hides what came after its checkpoint."""

from types import SimpleNamespace

import pytest

import trackers
from config import SFT
from model import UserError


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb: that package is not installed; pip install wandb"):
        trackers.check_installed(SFT(report_to="wandb"))
    trackers.check_installed(SFT())


def test_tensorboard_has_the_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = SimpleNamespace(cfg=SFT(report_to="tensorboard"), folder=tmp_path, step=0, source=None)
    for first, source, loss in ((0, None, 5.0), (2, tmp_path, 7.0)):
        run.step, run.source = first, source
        (tracker,) = trackers.open_trackers(run)
        for step in range(first + 1, 5):
            row = {"loss": loss, "note": "text", "evaluation": {"accuracy": 0.5, "confusion": {"a": {"b": 1}}}}
            tracker.log(step, row)
        tracker.close()
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "evaluation/accuracy"}, found.Tags()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 7.0), (4, 7.0)]

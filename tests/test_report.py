"""The report: escaped, self-contained, whole with files missing or cut, in a headless browser too; and what --report_to
sends elsewhere."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from conftest import refused, write
from test_video import ramp, write_clip

import console
import report
from config import GRPO, SFT, as_dict
from trainer import Log, Run

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{body}}{% raw %}"
LABELS = ["Left to Right", "Right to Left"]
IMAGE = "data:image/jpeg;base64,"


def write_lines(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def rollout_rows(step, right, text="Answer: (A)"):
    """A group of four, `right` of them right, their tokens from likely to unlikely."""
    for k in range(4):
        reward = float(k < right)
        yield {"step": step, "prompt": 0, "id": "a", "video": "a.mp4", "question": "<video>\nWhich way?",
               "answer": LABELS[0], "completion": text, "finished": k < 3, "tokens": [text, " end"],
               "logprobs": [-0.01, -1.0 - k], "advantage": 2 * reward - 1, "reward": reward + 1,
               "rewards": {"accuracy": reward, "format": 1.0}}  # fmt: skip


@pytest.fixture
def grpo_run(tmp_path):
    """A run's folder with everything in it, and its data."""
    folder, data = tmp_path / "grpo", tmp_path / "data"
    write(data / "metadata.json", {"options": {"seed": 3}, "fps": 30})
    (data / "videos").mkdir()
    for name in "ab":
        write_clip(data / "videos" / f"{name}.mp4", ramp(10))
    examples = [{"id": "c", "video": "b.mp4", "class": LABELS[0]}, {"id": "d", "video": "d.mp4"}]
    train = {"samples": 1234, "classes": {LABELS[0]: 617, LABELS[1]: 383}, "examples": examples}
    info = {"script": "grpo", "command": ["grpo.py", "--learning_rate", "1.25e-4"]}
    info |= {"machine": {"gpus": []}, "versions": {"torch": "9.8.7", "commit": "0123456789abcdef"}}
    info["config"] = as_dict(GRPO(data_path=str(data / "train.json"), learning_rate=1.25e-4))
    write(folder / "run.json", info)
    write(folder / "best.json", {"step": 40, "accuracy": 0.9})
    write(folder / "data.json", {"train": train, "held out": {"samples": 77, "classes": {}, "examples": []}})
    rows = [{"step": s, "loss": 1 / s, "reward": s / 40, "reward/accuracy": s / 50, "kl": 0.01 * s, "ms": 400.0 + s,
             "tokens_per_second": 9000.0 + s, "gib": 1.5 + s / 100, "odd_number": s % 7, "ratio": 1.0, "wait": s / 90}
            for s in range(1, 41)]  # fmt: skip
    measured = {"accuracy": 0.9, "interval": [0.86, 0.93], "chance": 0.25,
                "confusion": {LABELS[0]: {LABELS[0]: 9, LABELS[1]: 1}, LABELS[1]: {LABELS[1]: 8}},
                "controls": {"reversed": {"accuracy": 0.04, "flipped": 0.95}, "blank": {"accuracy": 0.26}}}  # fmt: skip
    rows.append({"step": 40, "eval_accuracy": 0.9, "eval_count": 400, "evaluation": measured})
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "rollouts.jsonl", [*rollout_rows(1, 1), *rollout_rows(40, 4)])
    return folder


def page_of(*runs):
    return report.write_report(list(runs), runs[0] / "report.html").read_text(encoding="utf-8")


def test_sections_and_their_contents_with_nothing_from_elsewhere(grpo_run):
    text = page_of(grpo_run)
    for words in ('id="curves"', 'id="evaluation"', 'id="rollouts"', 'id="data"', 'id="setup"', "9.8.7",
                  "0123456789 · CPU<", "grpo.py --learning_rate 1.25e-4", "0.001", "Confusion matrix",
                  "4.0 %", "flipped 95.0 %", "Chance is 25.0 %", "Best checkpoint", "KL to the reference",
                  "Odd number", "before and after", "advantage −1.00", "truncated",
                  "The same at every step:", "ratio 1.", "d.mp4: no such", "seed = 3"):  # fmt: skip
        assert words in text, words
    assert text.count(IMAGE) == 2 * report.FRAMES  # before and after, an example
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'; img-src data:; style-src 'nonce-" in policy and "unsafe" not in policy
    assert not re.search(r"https:|@import|url\(|http://(?!www.w3.org/2000/svg\")| style=| on[a-z]+=", text)


@pytest.mark.parametrize("count", [1, 2])
def test_everything_from_model_and_data_is_escaped(grpo_run, count):
    free = "<video>|Answer|Which|Left|Right|format|reversed|odd|torch|a fast|seed"
    for path in grpo_run.glob("*.json*"):  # in texts, and in keys that come from a user or a model
        path.write_text(re.sub(free, lambda _: json.dumps(EVIL)[1:-1], path.read_text()))
    text = page_of(*[grpo_run.rename(grpo_run.parent / "<b>&name")] * count)
    assert "alert(1)" in text and "{{body}}" in text and text.count("<script") == 1
    assert "<b>&" not in text and "<img src=x" not in text


def test_gaps_cut_files_and_broken_clips(grpo_run, monkeypatch):
    values = [1.0, float("nan"), 3.0, None, float("inf"), 6.0]
    rows = [{"step": k, "loss": value, "never": None, "gib": float("inf")} for k, value in enumerate(values)]
    write_lines(grpo_run / "metrics.jsonl", rows)
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (grpo_run.parent / "data" / "videos" / "a.mp4").write_bytes(b"no video")
    text = page_of(grpo_run)
    assert "never" not in text and 'data-points="0,1 1, 2,3 3, 4, 5,6"' in text and re.search("a.mp4: [^<]", text)
    write_lines(grpo_run / "rollouts.jsonl", [row for step in range(50) for row in rollout_rows(step, 2)])
    size = (grpo_run / "rollouts.jsonl").stat().st_size
    monkeypatch.setattr(report, "WINDOW", size // 10)  # of a file of gigabytes both ends are read
    steps = [group["step"] for group in report.read_run(grpo_run)["groups"]]
    assert steps[0] == 0 and steps[-1] == 49 and len(steps) < 12 and steps == sorted(steps)
    lines = report.read_lines(grpo_run / "rollouts.jsonl", size * 2 // 3)  # the two windows overlap: nothing is lost
    assert lines == report.read_lines(grpo_run / "rollouts.jsonl")
    write_lines(grpo_run / "rollouts.jsonl", [*rollout_rows(1, 1), {"step": 1, "loss": 2.0}])  # of another program
    assert re.search("rollouts.jsonl: line 5 .*expected an object with prompt", refused(page_of, grpo_run))


def tracked(folder, report_to, rows, **options):
    """Write these {step: metrics} to the tracker."""
    run = Run(SFT(report_to=report_to), "train_sft", folder, torch.device("cpu"), torch.float32, total=4, **options)
    log = Log(run, [])
    for step, metrics in rows.items():
        log.write(step, metrics)
    log.close()


def test_tensorboard_has_the_scalars_and_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    row = {"note": "text", "skipped": None, "evaluation": {"accuracy": 0.5}}
    tracked(tmp_path, "tensorboard", {step: row | {"loss": 5.0} for step in (1, 2, 3, 4)})
    tracked(tmp_path, "tensorboard", {step: row | {"loss": 7.0} for step in (3, 4)}, step=2, source=tmp_path)
    read = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 5.0), (2, 5.0), (3, 7.0), (4, 7.0)]


def test_wandb_has_config_scalars_and_page_and_what_it_lacks_is_one_line(tmp_path, monkeypatch):
    wandb = MagicMock(Error=ConnectionError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write(tmp_path / "run.json", {"id": "abc", "config": {"seed": 3}})
    write(tmp_path / "report.html", "page")
    tracked(tmp_path, "wandb", {3: {"loss": 5.0, "note": "text"}})
    assert wandb.init.call_args.kwargs.items() >= {"id": "abc", "resume": "allow", "config": {"seed": 3}}.items()
    logged = wandb.init.return_value.log.call_args_list
    assert logged == [call({"loss": 5.0}, step=3), call({"report": wandb.Html.return_value})]
    wandb.init.side_effect = ConnectionError("No API key configured. Use `wandb login` to log in.")
    assert re.search("^--report_to wandb: No API key.*WANDB_MODE=offline", refused(tracked, tmp_path, "wandb", {}))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    missing = "--report_to wandb: that package is not installed; pip install wandb"
    assert missing in refused(console.trackers, SFT(report_to="wandb"))


# -- In a headless browser: drawn, hovered, dark, with hostile text


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
BREAK_IN = "</main><script>document.title = 'in'</script><img src=x onerror=\"document.title = 'in'\">"
needs_browser = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {BROWSERS} is installed")


@pytest.fixture
def browse(tmp_path):
    """(page, flags) -> (what the browser prints, lines of its console)."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]

    def open_page(path, *more):
        command = [next(filter(None, map(shutil.which, BROWSERS))), *flags, *more, path.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


@needs_browser
def test_all_is_drawn_and_hovering_shows_one_step_in_every_chart(grpo_run, browse, monkeypatch, tmp_path):
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in ((41, None), (42, 0.02)))
    code, end = Path(__file__).with_name("cases").joinpath("look.js").read_text(), "{% endraw %}</script>"
    (tmp_path / "template.html").write_text(report.TEMPLATE.read_text().replace(end, code + end))
    monkeypatch.setattr(report, "TEMPLATE", tmp_path / "template.html")
    page_of(grpo_run)
    text, console = browse(grpo_run / "report.html", "--dump-dom")
    assert not console, console
    result = json.loads(html.unescape(re.search('data-result="([^"]*)"', text)[1]))
    assert not result["hidden"]
    assert len(result["hover"]) >= 8 and all("step 20" in text for text in result["hover"])
    values = "\n".join(result["hover"])
    assert re.search(r"loss\s+0\.05\b", values) and re.search(r"KL\s+0\.2\b", values) and "1 not finite" in values
    assert result["themes"] == ["rgb(255, 255, 255)", "rgb(19, 21, 24)"]
    assert result["loss"].count("M") == 2 and result["loss"].endswith("h0"), "a gap, then a point alone"


@needs_browser
def test_a_completion_that_is_a_script_is_text_and_the_policy_stops_another_script(grpo_run, browse):
    rows = [row | {"question": BREAK_IN, "rewards": {BREAK_IN: 1.0}} for row in rollout_rows(1, 1, text=BREAK_IN)]
    write_lines(grpo_run / "rollouts.jsonl", rows)
    page = page_of(grpo_run).replace("</main>", "</main><script>document.title = 'in'</script>")
    (grpo_run / "report.html").write_text(page)
    text, console = browse(grpo_run / "report.html", "--dump-dom")
    assert "<title>grpo</title>" in text and text.count("<script") == 2
    assert len(console) == 1 and "Content Security Policy" in console[0], console

"""The report: escaped, self-contained, whole with anything missing, quick. (In a browser: test_report_browser.py.)"""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import report
from config import GRPO, as_dict
from model import UserError
from reporting import charts, frames, rollouts

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{body}}{% raw %}"
LABELS = ["Left to Right", "Right to Left"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_clip(path):
    """A short mp4 in which a bright bar moves to the right."""
    with frames.av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(10):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[:, 4 * k : 4 * k + 8] = 255
            container.mux(stream.encode(frames.av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


def rollout_rows(step, right, sample="a", text="Answer: (A)"):
    """A group of four, `right` of them right, their tokens from likely to unlikely."""
    for k in range(4):
        reward = float(k < right)
        yield {
            "step": step, "prompt": 0, "id": sample, "video": "a.mp4", "question": "<video>\nWhich way?",
            "answer": LABELS[0], "completion": text, "reward": reward + 1,
            "rewards": {"accuracy": reward, "format": 1.0},
            "advantage": 1.0 if reward else -1.0, "finished": k < 3,
            "tokens": [text, " end"], "logprobs": [-0.01, -1.0 - k],
        }  # fmt: skip


@pytest.fixture
def grpo_run(tmp_path):
    """A run's folder with everything in it, and the data it names."""
    data, run = tmp_path / "data", tmp_path / "grpo"
    (data / "videos").mkdir(parents=True)
    run.mkdir()
    write_clip(data / "videos" / "a.mp4")
    (data / "metadata.json").write_text(json.dumps({"options": {"seed": 3}, "fps": 30}))
    config = as_dict(GRPO(data_path=str(data / "train.json"), learning_rate=1.25e-4))
    info = {"script": "train_grpo", "command": ["train_grpo.py", "--learning_rate", "1.25e-4"], "config": config}
    info |= {"versions": {"torch": "9.8.7", "commit": "0123456789abcdef"}, "machine": {"cpu": "a fast one", "gpus": []}}
    (run / "run.json").write_text(json.dumps(info))
    rows = [{"step": s, "loss": 1 / s, "reward": s / 40, "reward/accuracy": s / 50, "kl": 0.01 * s, "ms": 400.0 + s,
             "tokens_per_second": 9000.0 + s, "gib": 1.5 + s / 100, "odd_number": s % 7, "ratio": 1.0}
            for s in range(1, 41)]  # fmt: skip
    controls = {"reversed": {"accuracy": 0.04, "flipped": 0.95}, "blank": {"accuracy": 0.26}}
    measured = {"accuracy": 0.9, "interval": [0.86, 0.93], "chance": 0.25, "controls": controls,
                "confusion": {LABELS[0]: {LABELS[0]: 9, LABELS[1]: 1}}}  # fmt: skip
    rows.append({"step": 40, "eval_accuracy": 0.9, "eval_count": 400, "evaluation": measured})
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "rollouts.jsonl", [*rollout_rows(1, right=1), *rollout_rows(40, right=4)])
    (run / "best.json").write_text(json.dumps({"step": 40, "accuracy": 0.9}))
    train = {"samples": 1234, "measured": 32, "classes": {LABELS[0]: 617, LABELS[1]: 383},
             "different_questions": 11, "questions": [["Which way? [2 options]", 987]],
             "examples": [{"id": "a", "video": "a.mp4", "class": LABELS[0]}, {"video": "gone.mp4", "class": LABELS[1]}],
             "unreadable": {"b": "b.mp4: empty file"}, "tokens": [145, 147, 151], "seconds": [1, 1, 1]}  # fmt: skip
    (run / "data.json").write_text(json.dumps({"train": train, "held out": {"samples": 77}}))
    return run


def page_of(*runs):
    return report.write_report(list(runs), runs[0] / "report.html").read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; fails where tags are not balanced."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.open += [tag] if tag not in ("meta", "link", "img", "br") else []

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_sections_and_their_contents(grpo_run):
    text = page_of(grpo_run)
    for words in ('id="curves"', 'id="evaluation"', 'id="rollouts"', 'id="data"', 'id="setup"', "9.8.7",
                  "commit 0123456789", "a fast one", "--learning_rate 1.25e-4", "0.001", "Confusion matrix", "Controls",
                  "4.0 %", "flipped 95.0 %", "Chance is 25.0 %", "Best checkpoint", "KL to the reference",
                  "Odd number", "before and after", "advantage −1.00", "truncated", "147 <small>(145 to 151)",
                  "Which way? [2 options]", "and 10 more", "The same at every step: ratio 1.",
                  "b.mp4: empty file", "gone.mp4: no such", "seed = 3"):  # fmt: skip
        assert words in text, words
    assert text.count("data:image/jpeg;base64,") == 4 * frames.FRAMES  # before and after, last, first, an example
    Tags(text)


def test_needs_nothing_else_and_its_policy_names_its_own_style_and_script(grpo_run):
    text = page_of(grpo_run)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for tag, attributes in Tags(text).tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def poison(value):
    """The value with EVIL for every text, and for a key."""
    if isinstance(value, dict):
        return {key: poison(inner) for key, inner in value.items()} | {EVIL: 1.5}
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("count", [1, 2])
def test_everything_from_model_and_data_is_escaped(grpo_run, count):
    for name in ("run.json", "data.json", "best.json"):
        (grpo_run / name).write_text(json.dumps(poison(json.loads((grpo_run / name).read_text()))))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        rows = [poison(json.loads(line)) for line in (grpo_run / name).read_text().splitlines()]
        write_lines(grpo_run / name, [row | {f"{EVIL} 2": k} for k, row in enumerate(rows)])
    (grpo_run / "eval2.json").write_text("broken")
    text = page_of(*[grpo_run.rename(grpo_run.parent / "<b>&name")] * count)
    assert [tag for tag, _ in Tags(text).tags].count("script") == 1
    assert "<b>&" not in text and "<img src=x" not in text and "alert(1)" in text and "{{body}}" in text


def test_two_runs_are_laid_over_each_other(grpo_run, tmp_path):
    other = shutil.copytree(grpo_run, tmp_path / "other")
    (other / "run.json").write_text((other / "run.json").read_text().replace('"beta": ', '"beta": 12'))
    report.main([str(grpo_run), str(other)])
    assert not (grpo_run / "report.html").exists(), "a run's own page is not overwritten"
    text = (tmp_path / "compare.html").read_text()
    assert "<h1>2 runs</h1>" in text and "Options that differ" in text and "<th>beta</th>" in text
    figures = re.findall("<figure.*?</figure>", text, re.DOTALL)
    assert len(figures) >= 8 and all(figure.count('<li class="s') == 2 for figure in figures)


def test_missing_keys_and_wrong_types(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"config": {"data_path": None, "learning_rate": 1.0}, "machine": 1}))
    write_lines(tmp_path / "rollouts.jsonl", [{}, {"step": "x", "tokens": 3, "rewards": []}, {"video": ["no.png"]}])
    rows = [{}, {"step": None, "loss": 2}, {"step": 3, "loss": "high"}, {"confusion": {}}]
    rows += [{"step": 2, "evaluation": {"confusion": {"a": 3, "b": {"a": "x"}}, "controls": {"reversed": None}}}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "data.json").write_text(json.dumps({"train": {"samples": [], "tokens": None}, "val": None}))
    assert 'id="rollouts"' in page_of(tmp_path)


def test_numbers_that_are_not_finite_are_gaps_and_counted(tmp_path):
    values = [1.0, float("nan"), 3.0, None, float("inf"), 6.0]
    rows = [{"step": k, "loss": v, "unused": None, "kl": float("nan")} for k, v in enumerate(values)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    text = page_of(tmp_path)
    assert "3 values not finite" in text and "unused" not in text and "<b>not finite</b>" in text
    (line,) = re.findall(r'class="line s0" d="(M[^"]*)"', text)
    assert line.count("M") == 3, f"one stretch of line around each gap, got {line}"


def test_broken_files_and_clips_are_named(grpo_run):
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (grpo_run / "best.json").write_text("[1]")
    (grpo_run.parent / "data" / "videos" / "a.mp4").write_bytes(b"no video")
    text = page_of(grpo_run)
    assert "1 of 42 lines are no JSON objects" in text and "best.json is left out: a JSON list" in text
    assert "a.mp4: cannot be decoded" in text


def test_users_mistakes(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}")
    with pytest.raises(UserError, match="none of run.json, .* is there; .* did you mean .*runs/a"):
        page_of(tmp_path / "runs")
    assert "Nothing has been written" in page_of(tmp_path / "runs/a")
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report([tmp_path / "runs/a"], tmp_path / "none" / "x.html")
    code = "import report, sys; assert 'torch' not in sys.modules; report.cli(report.main)"
    done = subprocess.run([sys.executable, "-c", code, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no such folder"), done.stderr


def test_thinning_keeps_the_mean_and_the_extremes():
    y = np.random.default_rng(0).normal(size=10 * charts.POINTS)
    y[7] = np.nan
    mean, low, high, middle = charts.thin(y)
    assert len(mean) == charts.POINTS and np.all(np.diff(middle) == 10)
    assert np.nanmin(low) == np.nanmin(y) and np.nanmax(high) == np.nanmax(y)
    np.testing.assert_allclose([mean[0], mean[3]], [np.nanmean(y[:10]), y[30:40].mean()])


def test_of_a_large_file_only_complete_groups_of_both_ends_are_read(tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [row for step in range(50) for row in rollout_rows(step, 2, sample=f"{step % 5}")])
    monkeypatch.setattr(rollouts, "WINDOW", 5000)
    read = rollouts.read_rollouts(path)
    assert read.first[0].step == 0 and read.last[-1].step == 49 and read.first[-1].step < read.last[0].step
    assert {len(group.lines) for group in [*read.first, *read.last]} == {4}

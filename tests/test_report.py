"""The report: escaped, self-contained, whole with files missing or cut. (In a browser: test_report_browser.py.)"""

import base64
import hashlib
import html.parser
import json
import re
import shutil

import numpy as np
import pytest

import report
import video
from config import GRPO, SFT, as_dict
from model import UserError
from reporting import charts, frames, rollouts

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{body}}{% raw %}"
LABELS = ["Left to Right", "Right to Left"]
IMAGE = "data:image/jpeg;base64,"


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
            "step": step, "prompt": 0, "id": sample, "video": f"{sample}.mp4", "question": "<video>\nWhich way?",
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
    shutil.copy(data / "videos" / "a.mp4", data / "videos" / "b.mp4")
    (data / "metadata.json").write_text(json.dumps({"options": {"seed": 3}, "fps": 30}))
    config = as_dict(GRPO(data_path=str(data / "train.json"), learning_rate=1.25e-4))
    info = {"script": "train_grpo", "command": ["train_grpo.py", "--learning_rate", "1.25e-4"], "config": config}
    info |= {"versions": {"torch": "9.8.7", "commit": "0123456789abcdef"}, "machine": {"cpu": "a fast one", "gpus": []}}
    (run / "run.json").write_text(json.dumps(info))
    rows = [{"step": s, "loss": 1 / s, "reward": s / 40, "reward/accuracy": s / 50, "kl": 0.01 * s, "ms": 400.0 + s,
             "tokens_per_second": 9000.0 + s, "gib": 1.5 + s / 100, "odd_number": s % 7, "ratio": 1.0, "wait": s / 90}
            for s in range(1, 41)]  # fmt: skip
    controls = {"reversed": {"accuracy": 0.04, "flipped": 0.95}, "blank": {"accuracy": 0.26}}
    measured = {"accuracy": 0.9, "interval": [0.86, 0.93], "chance": 0.25, "controls": controls,
                "confusion": {LABELS[0]: {LABELS[0]: 9, LABELS[1]: 1}, LABELS[1]: {LABELS[1]: 8}}}  # fmt: skip
    rows.append({"step": 40, "eval_accuracy": 0.9, "eval_count": 400, "evaluation": measured})
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "rollouts.jsonl", [*rollout_rows(1, right=1), *rollout_rows(40, right=4)])
    (run / "best.json").write_text(json.dumps({"step": 40, "accuracy": 0.9}))
    train = {"samples": 1234, "measured": 32, "classes": {LABELS[0]: 617, LABELS[1]: 383},
             "questions": [["Which way? [2 options]", 987]], "unreadable": {"c": "c.mp4: empty file"},
             "examples": [{"id": "a", "video": "a.mp4", "class": LABELS[0]}, {"id": "d", "video": "d.mp4"}],
             "tokens": [145, 147, 151], "seconds": [1, 1, 1]}  # fmt: skip
    held_out = {"samples": 77, "classes": {}, "examples": []}
    (run / "data.json").write_text(json.dumps({"train": train, "held out": held_out}))
    return run


@pytest.fixture
def two_runs(grpo_run, tmp_path):
    """An SFT run and a GRPO run on the same data."""
    sft = shutil.copytree(grpo_run, tmp_path / "sft")
    config = as_dict(SFT(data_path=str(tmp_path / "data" / "train.json"), learning_rate=0.5))
    (sft / "run.json").write_text(json.dumps({"script": "train_sft", "command": ["train_sft.py"], "config": config}))
    write_lines(sft / "metrics.jsonl", [{"step": s, "loss": 5 / s, "token_accuracy": 0.5} for s in range(1, 9)])
    steps = ((1, 0, "b"), (40, 3, "b"), (40, 4, "a"))
    write_lines(sft / "rollouts.jsonl", [row for step, right, name in steps for row in rollout_rows(step, right, name)])
    return sft, grpo_run


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
                  "Which way? [2 options]", "The same at every step: ratio 1.",
                  "c.mp4: empty file", "d.mp4: no such", "seed = 3"):  # fmt: skip
        assert words in text, words
    assert text.count(IMAGE) == 4 * frames.FRAMES  # before and after, last, first, an example
    Tags(text)


def test_needs_nothing_else_and_its_policy_names_its_own_style_and_script(grpo_run):
    text = page_of(grpo_run)
    assert "https:" not in text and "@import" not in text and "url(" not in text
    assert text.count("http:") == text.count("http://www.w3.org/2000/svg") == 1, "the name of SVG's elements, no link"
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
    """The value with EVIL for every text, and for the keys that come from a user or a model."""
    if isinstance(value, dict):
        free = {*LABELS, "format", "reversed", "odd_number", "torch", "seed"}
        return {EVIL if key in free else key: poison(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poison(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("count", [1, 2])
def test_everything_from_model_and_data_is_escaped(grpo_run, count):
    for name in ("run.json", "data.json", "best.json"):
        (grpo_run / name).write_text(json.dumps(poison(json.loads((grpo_run / name).read_text()))))
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        write_lines(grpo_run / name, [poison(json.loads(row)) for row in (grpo_run / name).read_text().splitlines()])
    text = page_of(*[grpo_run.rename(grpo_run.parent / "<b>&name")] * count)
    assert [tag for tag, _ in Tags(text).tags].count("script") == 1
    assert "<b>&" not in text and "<img src=x" not in text and "alert(1)" in text and "{{body}}" in text


def test_two_runs_are_laid_over_each_other(two_runs):
    report.main([str(run) for run in two_runs])
    sft, grpo = two_runs
    assert not (grpo / "report.html").exists(), "a run's own page is not overwritten"
    text = (grpo.parent / "compare.html").read_text()
    assert "<h1>sft and grpo</h1>" in text and "Options that differ" in text and "<th>learning_rate</th>" in text
    figures = {re.search("<h3>(.*?)</h3>", f)[1]: f for f in re.findall("<figure.*?</figure>", text, re.DOTALL)}
    assert figures["Loss"].count('<li class="s') == figures["Policy loss"].count('<li class="s') == 1, "two quantities"
    assert {"Reward", "Reward accuracy", "KL to the reference", "Memory", "Odd number"} <= set(figures)
    groups = re.findall(r'<div class="group">(.*?)</div>', text, re.DOTALL)
    shown = [group.partition("<details>")[0].count("<figure") for group in groups]
    assert shown == [2, 2, 2] and text.count("<figure") > 6, "three groups, two charts of each before the folded ones"
    first_screen = text[: text.index("<nav>")]
    assert "Before and after: b" in first_screen and first_screen.count(IMAGE) == frames.FRAMES
    images = re.findall("<ol.*?</ol>", text, re.DOTALL)
    assert len(images) == text.count(IMAGE) / frames.FRAMES == 2, "clips a and b, once each"


def test_runs_of_the_same_name_are_told_apart_by_their_paths(grpo_run, tmp_path):
    other = shutil.copytree(grpo_run, tmp_path / "again" / "grpo")
    assert f"<h1>{grpo_run} and {other}</h1>" in page_of(grpo_run, other)


def test_frames_are_those_that_the_model_saw(tmp_path):
    write_clip(tmp_path / "a.mp4")
    options = video.Options.from_args("video", SFT(nframes=4), {}, "")
    plan = video.plan_clip("video", (str(tmp_path / "a.mp4"),), options)
    pictures = frames.from_patches(video.read_clip(plan).numpy(), plan.grid_thw)
    assert pictures.shape == (4, *plan.size, 3)
    bars = [picture[..., 0].mean(0).argmax() / plan.size[1] for picture in pictures.astype(float)]
    np.testing.assert_allclose(bars, [(4 * k + 4) / 64 for k in plan.indices], atol=0.08)
    shown = frames.strip("a.mp4", as_dict(SFT(nframes=4, image_folder=str(tmp_path))))
    assert [at for at, _ in shown["images"]] == list(plan.times)
    assert shown["note"] == f"4 of 4 sampled frames, {plan.size[1]} x {plan.size[0]} pixels"


def test_numbers_that_are_not_finite_are_gaps_and_counted(grpo_run):
    values = [1.0, float("nan"), 3.0, None, float("inf"), 6.0]
    write_lines(grpo_run / "metrics.jsonl", [{"step": k, "loss": v, "never": None} for k, v in enumerate(values)])
    text = page_of(grpo_run)
    assert "3 values not finite" in text and "never" not in text
    assert 'data-points="0,1 1, 2,3 3, 4, 5,6"' in text


def test_broken_files_and_clips_are_named(grpo_run):
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (grpo_run.parent / "data" / "videos" / "a.mp4").write_bytes(b"no video")
    text = page_of(grpo_run)
    assert "1 of 42 lines are not JSON" in text and re.search("a.mp4: [^<]", text) and IMAGE not in text
    (grpo_run / "best.json").write_text("{")
    with pytest.raises(UserError, match="best.json: not JSON"):
        page_of(grpo_run)


def test_users_mistakes(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}")
    with pytest.raises(UserError, match="no run.json in it; .* did you mean .*runs/a"):
        page_of(tmp_path / "runs")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        page_of(tmp_path / "nowhere")
    assert "Nothing has been written" in page_of(tmp_path / "runs/a")
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report([tmp_path / "runs/a"], tmp_path / "none" / "x.html")


def test_a_long_curve_is_thinned_to_means_and_extremes():
    y = np.random.default_rng(0).normal(size=10 * charts.POINTS)
    y[7] = np.nan
    points = [p.split(",") for p in charts.curve("", np.arange(len(y)), y, 0)["points"].split(" ")]
    steps, mean, low, high = np.array(points, float).T
    assert len(mean) == charts.POINTS and np.all(np.diff(steps) == 10)
    np.testing.assert_allclose([low.min(), high.max()], [np.nanmin(y), np.nanmax(y)], rtol=1e-5)
    np.testing.assert_allclose([mean[0], mean[3]], [np.nanmean(y[:10]), y[30:40].mean()], rtol=1e-4)


def test_a_large_file_is_read_at_both_ends(tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [row for step in range(50) for row in rollout_rows(step, 2, sample=f"{step % 5}")])
    assert len(rollouts.read_groups(path)) == 50
    monkeypatch.setattr(rollouts, "WINDOW", 5000)
    steps = [group.step for group in rollouts.read_groups(path)]
    assert steps[0] == 0 and steps[-1] == 49 and len(steps) < 12 and steps == sorted(steps)

"""The report: escaped, self-contained, whole with files missing or cut. (In a browser: test_report_browser.py.)"""

import html
import json
import re
import shutil

import numpy as np
import pytest

import report
import video
from clips import write_mp4
from config import GRPO, SFT, as_dict
from model import UserError
from reporting import charts, frames

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{body}}{% raw %}"
LABELS = ["Left to Right", "Right to Left"]
IMAGE = "data:image/jpeg;base64,"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_clip(path):
    """A short mp4 in which a bright bar moves to the right."""
    pictures = np.zeros((10, 48, 64, 3), np.uint8)
    for k, picture in enumerate(pictures):
        picture[:, 4 * k : 4 * k + 8] = 255
    write_mp4(path, pictures)


def rollout_rows(step, right, sample="a", text="Answer: (A)"):
    """A group of four, `right` of them right, their tokens from likely to unlikely."""
    for k in range(4):
        reward = float(k < right)
        yield {"step": step, "prompt": 0, "id": sample, "video": f"{sample}.mp4", "question": "<video>\nWhich way?",
               "answer": LABELS[0], "completion": text, "finished": k < 3, "tokens": [text, " end"],
               "logprobs": [-0.01, -1.0 - k], "advantage": 2 * reward - 1, "reward": reward + 1,
               "rewards": {"accuracy": reward, "format": 1.0}}  # fmt: skip


def write_run(folder, config, metrics, groups):
    """A run's folder with everything in it. groups: arguments of rollout_rows."""
    folder.mkdir()
    examples = [{"id": "c", "video": "b.mp4", "class": LABELS[0]}, {"id": "d", "video": "d.mp4"}]
    train = {"samples": 1234, "classes": {LABELS[0]: 617, LABELS[1]: 383}, "examples": examples}
    info = {"script": folder.name, "command": [f"{folder.name}.py", "--learning_rate", "1.25e-4"]}
    info |= {"machine": {"cpu": "a fast one", "gpus": []}, "versions": {"torch": "9.8.7", "commit": "0123456789abcdef"}}
    data = {"train": train, "held out": {"samples": 77, "classes": {}, "examples": []}}
    files = {"run": info | {"config": as_dict(config)}, "best": {"step": 40, "accuracy": 0.9}, "data": data}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "rollouts.jsonl", [row for group in groups for row in rollout_rows(*group)])
    return folder


@pytest.fixture
def two_runs(tmp_path):
    """An SFT run and a GRPO run on the same data."""
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    for name in "ab":
        write_clip(data / "videos" / f"{name}.mp4")
    (data / "metadata.json").write_text(json.dumps({"options": {"seed": 3}, "fps": 30}))
    rows = [{"step": s, "loss": 1 / s, "reward": s / 40, "reward/accuracy": s / 50, "kl": 0.01 * s, "ms": 400.0 + s,
             "tokens_per_second": 9000.0 + s, "gib": 1.5 + s / 100, "odd_number": s % 7, "ratio": 1.0, "wait": s / 90}
            for s in range(1, 41)]  # fmt: skip
    measured = {"accuracy": 0.9, "interval": [0.86, 0.93], "chance": 0.25,
                "confusion": {LABELS[0]: {LABELS[0]: 9, LABELS[1]: 1}, LABELS[1]: {LABELS[1]: 8}},
                "controls": {"reversed": {"accuracy": 0.04, "flipped": 0.95}, "blank": {"accuracy": 0.26}}}  # fmt: skip
    rows.append({"step": 40, "eval_accuracy": 0.9, "eval_count": 400, "evaluation": measured})
    path, losses = str(data / "train.json"), [{"step": s, "loss": 5 / s, "token_accuracy": 0.5} for s in range(1, 9)]
    sft = write_run(tmp_path / "sft", SFT(data_path=path), losses, [(1, 0, "b"), (40, 3, "b"), (40, 4, "a")])
    grpo = GRPO(data_path=path, learning_rate=1.25e-4)
    return sft, write_run(tmp_path / "grpo", grpo, rows, [(1, 1), (40, 4)])


@pytest.fixture
def grpo_run(two_runs):
    return two_runs[1]


def page_of(*runs):
    return report.write_report(list(runs), runs[0] / "report.html").read_text(encoding="utf-8")


def test_sections_and_their_contents_with_nothing_from_elsewhere(grpo_run):
    text = page_of(grpo_run)
    for words in ('id="curves"', 'id="evaluation"', 'id="rollouts"', 'id="data"', 'id="setup"', "9.8.7",
                  "0123456789", "a fast one", "grpo.py --learning_rate 1.25e-4", "0.001", "Confusion matrix",
                  "4.0 %", "flipped 95.0 %", "Chance is 25.0 %", "Best checkpoint", "KL to the reference",
                  "Odd number", "before and after", "advantage −1.00", "truncated",
                  "The same at every step:", "ratio 1.", "d.mp4: no such", "seed = 3"):  # fmt: skip
        assert words in text, words
    assert text.count(IMAGE) == 2 * frames.FRAMES  # before and after, an example
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


def test_two_runs_are_laid_over_each_other(two_runs):
    report.main([str(run) for run in two_runs])
    sft, grpo = two_runs
    assert not (grpo / "report.html").exists(), "a run's own page is not overwritten"
    text = (grpo.parent / "compare.html").read_text()
    assert "<h1>sft and grpo</h1>" in text and "Options that differ" in text and "<th>learning_rate</th>" in text
    figures = {re.search("<h3>(.*?)</h3>", f)[1]: f for f in re.findall("<figure.*?</figure>", text, re.DOTALL)}
    assert figures["Loss"].count('<li class="s') == figures["Policy loss"].count('<li class="s') == 1, "two quantities"
    assert {"Reward", "Reward accuracy", "KL to the reference", "Odd number"} <= set(figures)
    groups = re.findall(r'<div class="group">(.*?)</div>', text, re.DOTALL)
    shown = [group.partition("<details>")[0].count("<figure") for group in groups]
    assert shown == [2, 2, 2] and text.count("<figure") > 6, "three groups, two charts of each before the folded ones"
    first_screen = text[: text.index("<nav>")]
    assert "Before and after: b" in first_screen and first_screen.count(IMAGE) == frames.FRAMES
    again = shutil.copytree(grpo, grpo.parent / "again" / "grpo")
    assert f"<h1>{grpo} and {again}</h1>" in page_of(grpo, again), "of the same name: told apart by their paths"


def test_frames_are_those_that_the_model_saw(tmp_path):
    write_clip(tmp_path / "a.mp4")
    plan = video.plan_clip(
        "video", (str(tmp_path / "a.mp4"),), video.Options.from_args("video", SFT(nframes=4), {}, "")
    )
    pictures = video.from_patches(video.read_clip(plan).numpy(), plan.grid_thw)
    bars = [picture[..., 0].mean(0).argmax() / plan.size[1] for picture in pictures.astype(float)]
    np.testing.assert_allclose(bars, [(4 * k + 4) / 64 for k in plan.indices], atol=0.08)
    shown = frames.strip("a.mp4", as_dict(SFT(nframes=4, image_folder=str(tmp_path))))
    assert [at for at, _ in shown["images"]] == list(plan.times) and "4 of 4 sampled frames, " in shown["note"]


def test_gaps_cut_files_and_broken_clips(grpo_run, monkeypatch):
    values = [1.0, float("nan"), 3.0, None, float("inf"), 6.0]
    write_lines(
        grpo_run / "metrics.jsonl",
        [{"step": k, "loss": v, "never": None, "gib": float("inf")} for k, v in enumerate(values)],
    )
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (grpo_run.parent / "data" / "videos" / "a.mp4").write_bytes(b"no video")
    text = page_of(grpo_run)
    assert "never" not in text and 'data-points="0,1 1, 2,3 3, 4, 5,6"' in text and re.search("a.mp4: [^<]", text)
    rows = [row for step in range(50) for row in rollout_rows(step, 2, sample=f"{step % 5}")]
    write_lines(grpo_run / "rollouts.jsonl", rows)
    assert len(report.read_run(grpo_run)["groups"]) == 50
    monkeypatch.setattr(report, "WINDOW", 5000)  # of a file of gigabytes both ends are read
    steps = [group["step"] for group in report.read_run(grpo_run)["groups"]]
    assert steps[0] == 0 and steps[-1] == 49 and len(steps) < 12 and steps == sorted(steps)
    y = np.arange(10.0 * charts.POINTS)
    assert charts.curve("", y, y, 0, "")["points"].startswith("0,0 10,10 20,20 "), "a long curve is thinned"


def test_users_mistakes(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}")
    for folder in ("runs", "nowhere"):
        with pytest.raises(UserError, match=f"{folder}: no run.json in it; expected a run's folder"):
            page_of(tmp_path / folder)
    assert "Nothing has been written" in page_of(tmp_path / "runs/a")
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report([tmp_path / "runs/a"], tmp_path / "none" / "x.html")
    (tmp_path / "runs/a/best.json").write_text("{")
    with pytest.raises(UserError, match="best.json: cannot be read"):
        page_of(tmp_path / "runs/a")

"""The report: escaped, self-contained, whole with anything missing, quick. (In a browser: test_report_browser.py.)"""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

import report
from config import GRPO, SFT, as_dict
from model import UserError
from reporting import charts, frames, rollouts

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{body}}"
LABELS = ["Left to Right", "Right to Left"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def clip(path, frames=10, size=(64, 48)):
    """A short mp4 in which a bright bar moves to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for k in range(frames):
            picture = np.zeros((size[1], size[0], 3), np.uint8)
            picture[:, 4 * k : 4 * k + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


def rollout_rows(step, right, video="a.mp4", sample="a", say="Answer: (A)"):
    """A group of four, `right` of them right, their tokens from sure to surprising."""
    for k in range(4):
        reward = float(k < right)
        yield {
            "step": step, "prompt": 0, "id": sample, "video": video, "question": "<video>\nWhich way?",
            "answer": LABELS[0], "completion": say, "reward": reward + 1,
            "rewards": {"accuracy": reward, "format": 1.0},
            "advantage": 1.0 if reward else -1.0, "finished": k < 3,
            "tokens": [say, " end"], "logprobs": [-0.01, -1.0 - k],
        }  # fmt: skip


@pytest.fixture
def grpo_run(tmp_path):
    """A run's folder with everything in it, and the data it names."""
    data, run = tmp_path / "data", tmp_path / "grpo"
    (data / "videos").mkdir(parents=True)
    run.mkdir()
    clip(data / "videos" / "a.mp4")
    (data / "metadata.json").write_text(json.dumps({"options": {"seed": 3}, "fps": 30}))
    config = as_dict(GRPO(data_path=str(data / "train.json"), learning_rate=1.25e-4))
    about = {"script": "train_grpo", "config": config, "versions": {"torch": "9.8.7", "commit": "0123456789abcdef"}}
    (run / "run.json").write_text(json.dumps(about | {"machine": {"cpu": "a fast one", "cores": 2, "gpus": []}}))
    rows = [{"step": s, "loss": 1 / s, "reward": s / 40, "reward/accuracy": s / 50, "kl": 0.01 * s, "ms": 400.0 + s,
             "tokens_per_second": 9000.0 + s, "gib": 1.5 + s / 100, "odd_number": s % 7, "ratio": 1.0}
            for s in range(1, 41)]  # fmt: skip
    rows.append({"step": 40, "eval_accuracy": 0.9, "eval_count": 400})
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "rollouts.jsonl", [*rollout_rows(1, right=1), *rollout_rows(40, right=4)])
    (run / "best.json").write_text(json.dumps({"step": 40, "accuracy": 0.9}))
    train = {"samples": 1234, "looked_at": 1000, "measured": 32, "classes": {LABELS[0]: 617, LABELS[1]: 383},
             "different_answers": 2, "different_questions": 11, "questions": [["Which way? [2 options]", 987]],
             "examples": [{"id": "a", "video": "a.mp4", "class": LABELS[0]}, {"video": "gone.mp4", "class": LABELS[1]}],
             "unreadable": {"b": "b.mp4: empty file"}, "tokens": [145, 147, 151], "seconds": [1, 1, 1],
             "sizes": {"56 x 56": 32}}  # fmt: skip
    (run / "data.json").write_text(json.dumps({"train": train, "held out": {"samples": 77}}))
    found = {"accuracy": 0.9, "interval": [0.86, 0.93], "chance": 0.25,
             "confusion": {LABELS[0]: {LABELS[0]: 9, LABELS[1]: 1}},
             "controls": {"reversed": {"accuracy": 0.04, "flipped": 0.95}, "blank": {"accuracy": 0.26}}}  # fmt: skip
    (run / "eval.json").write_text(json.dumps(found))
    return run


def page_of(*runs):
    return report.write_report(list(runs), runs[0] / "report.html").read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


# -- What is on the page


def test_sections_and_their_contents(grpo_run):
    text = page_of(grpo_run)
    for anchor in ("curves", "evaluation", "rollouts", "data", "setup"):
        assert f'<section id="{anchor}">' in text, anchor
    for words in ("9.8.7", "commit 0123456789", "a fast one", "--learning_rate 0.000125", "0.001", "Does it watch?",
                  "4.0 %", "flipped 95.0 %", "Chance is 25.0 %", "Confusion", "Best checkpoint",
                  "KL to the reference", "Odd number", "before and after", "advantage −1.00", "cut by the limit",
                  "Which way?", "1234", "147 <small>(145 to 151)</small>", "Which way? [2 options]",
                  "and 10 more forms", "The same at every step: ratio 1.", "b.mp4: empty file", "56 x 56",
                  "gone.mp4: no such", "seed = 3"):  # fmt: skip
        assert words in text, words
    assert text.count("data:image/jpeg;base64,") % frames.FRAMES == 0 and "data:image/jpeg;base64," in text
    assert not Tags(text).open


def test_one_page_needs_nothing_else(grpo_run):
    text = page_of(grpo_run)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for tag, attributes in Tags(text).tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)


def test_policy_names_the_style_and_script_of_the_page(grpo_run):
    text = page_of(grpo_run)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_everything_from_model_and_data_is_escaped(grpo_run):
    data = Path(json.loads((grpo_run / "run.json").read_text())["config"]["data_path"]).parent
    about = json.loads((grpo_run / "run.json").read_text())
    about |= {EVIL: EVIL, "script": EVIL, "versions": {EVIL: EVIL, "commit": EVIL}}
    about["config"] |= {"model_id": EVIL, EVIL: EVIL, "image_folder": str(data / "videos")}
    (grpo_run / "run.json").write_text(json.dumps(about))
    rows = [{"step": k, EVIL: k * k, "=" + EVIL: 1, f"reward/{EVIL}": k} for k in range(5)]
    write_lines(grpo_run / "metrics.jsonl", rows)
    rows = [*rollout_rows(1, 1, sample=EVIL, say=EVIL), *rollout_rows(2, 2, video=EVIL, say=EVIL)]
    for row in rows:
        row.update(question=EVIL, answer=EVIL, rewards={EVIL: 1.0})
    rows[0]["tokens"][1] = EVIL  # tinted
    rows[1].update(tokens=[1, 2])  # falls back to the completion's text
    write_lines(grpo_run / "rollouts.jsonl", rows)
    found = {"confusion": {EVIL: {EVIL: 3}}, "accuracy": 1.0, "controls": {EVIL: 0.5}}
    (grpo_run / "eval.json").write_text(json.dumps(found))
    (grpo_run / "best.json").write_text(json.dumps({"step": EVIL, "accuracy": 0.5}))
    (data / "metadata.json").write_text(json.dumps({EVIL: EVIL}))
    split = {name: {EVIL: 3} for name in ("classes", "sizes", "source_sizes")} | {"unreadable": {EVIL: EVIL}}
    split |= {"samples": EVIL, "measured": EVIL, "questions": [[EVIL, EVIL]], "tokens": [EVIL, 1, 2]}
    split |= {"examples": [{"id": EVIL, "video": "a.mp4", "class": EVIL}, {"id": EVIL, "video": EVIL}]}
    (grpo_run / "data.json").write_text(json.dumps({EVIL: split}))
    evil_folder, other = grpo_run.parent / "<b>&name", grpo_run.parent / "other"
    grpo_run.rename(evil_folder)
    evil_data = data.rename(data.parent / "<b>&data")
    about["config"]["data_path"] = str(evil_data / "train.json")
    (evil_folder / "run.json").write_text(json.dumps(about))
    shutil.copytree(evil_folder, other)
    (other / "best.json").write_text("broken")  # told in a note that names the folder
    (evil_folder / "eval2.json").write_text("broken")
    (other / "run.json").write_text(json.dumps(about | {"config": {**about["config"], EVIL: 1}}))
    for text in (page_of(evil_folder), page_of(evil_folder, other)):
        tags = Tags(text)
        assert [tag for tag, _ in tags.tags].count("script") == 1 and not tags.open
        assert "<b>&" not in text and "<img src=x" not in text and "alert(1)" in text
        assert not [a for tag, a in tags.tags if tag == "img" and not a["src"].startswith("data:image/")]


def test_two_runs_share_charts_and_tell_what_differs(grpo_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(grpo_run, other)
    about = json.loads((other / "run.json").read_text())
    about["config"]["beta"] = 0.125
    (other / "run.json").write_text(json.dumps(about))
    text = page_of(grpo_run, other)
    (kl,) = [found for found in re.findall(r"<figure.*?</figure>", text, re.DOTALL) if "KL to the reference" in found]
    assert kl.count("<li") == 2 and ">grpo<" in kl and ">other<" in kl
    assert "Options that differ" in text and "0.125" in text and "2 runs" in text


# -- What may be missing or broken


@pytest.mark.parametrize("missing", ["run.json", "metrics.jsonl", "rollouts.jsonl", "best.json", "eval.json"])
def test_a_missing_file_is_a_missing_section(grpo_run, missing):
    (grpo_run / missing).unlink()
    text = page_of(grpo_run)
    assert ('id="rollouts"' in text) == (missing != "rollouts.jsonl")
    assert ('id="evaluation"' in text) == (missing != "eval.json")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/run.json").write_text("{}")
    with pytest.raises(UserError, match="none of run.json, .* is there; .* did you mean .*runs/a"):
        page_of(tmp_path / "runs")
    text = page_of(tmp_path / "runs/a")
    assert "Nothing has been written" in text and "<section" not in text


def test_missing_keys_and_wrong_types(tmp_path):
    about = {"config": {"data_path": None, "learning_rate": 1.0}, "machine": None}
    (tmp_path / "run.json").write_text(json.dumps(about))
    rows = [{}, {"step": "x", "tokens": 3, "rewards": []}, {"step": 1, "video": ["no.png"]}]
    write_lines(tmp_path / "rollouts.jsonl", rows)
    data = {"train": {"samples": [], "classes": 3, "questions": {}, "examples": 7, "tokens": None}, "val": None}
    (tmp_path / "data.json").write_text(json.dumps(data))
    rows = [{}, {"step": 1}, {"step": None, "loss": 2}, {"loss": "high"}, {"confusion": {}}]
    rows += [{"step": 2, "evaluation": {"confusion": {"a": 3, "b": {"a": "x"}}, "controls": {"reversed": None}}}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert 'id="rollouts"' in page_of(tmp_path)


def test_numbers_that_are_not_finite_are_gaps_and_told(tmp_path):
    values = [1.0, float("nan"), 3.0, None, float("inf"), 6.0]
    write_lines(tmp_path / "metrics.jsonl", [{"step": k, "loss": v, "unused": None} for k, v in enumerate(values)])
    text = page_of(tmp_path)
    assert "3 values not finite" in text and "unused" not in text and "nan" not in text.lower().partition("<script>")[0]
    (line,) = re.findall(r'class="line s0" d="([^"]*)"', text)
    assert line.count("M") == 3, f"one stretch of line around each gap, found {line}"


def test_a_curve_that_never_was_finite(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": k, "loss": float("nan")} for k in range(3)])
    assert "not finite" in page_of(tmp_path)


def test_cut_lines_and_broken_json_are_told(grpo_run):
    with (grpo_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (grpo_run / "best.json").write_text("[1]")
    text = page_of(grpo_run)
    assert "1 of 42 lines are no JSON objects" in text and "best.json is left out: a JSON list" in text


def test_a_clip_that_does_not_decode_is_told(grpo_run):
    data = Path(json.loads((grpo_run / "run.json").read_text())["config"]["data_path"]).parent
    (data / "videos" / "a.mp4").write_bytes(b"no video")
    assert "a.mp4: cannot be decoded" in page_of(grpo_run)
    (data / "videos" / "a.mp4").unlink()
    assert "a.mp4: no such file" in page_of(grpo_run)


def test_no_folder_and_no_room_are_the_users_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report.write_report([tmp_path / "none"], tmp_path / "x.html")
    with pytest.raises(UserError, match="cannot be written"):
        (tmp_path / "metrics.jsonl").touch()
        report.write_report([tmp_path], tmp_path / "none" / "x.html")


# -- Numbers


def test_thinning_keeps_the_mean_and_the_extremes():
    y = np.random.default_rng(0).normal(size=10 * charts.POINTS)
    y[7] = np.nan
    mean, low, high, middle = charts.thin(y)
    assert len(mean) == charts.POINTS and np.all(np.diff(middle) == 10)
    assert np.nanmin(low) == np.nanmin(y) and np.nanmax(high) == np.nanmax(y)
    np.testing.assert_allclose(mean[0], np.nanmean(y[:10]))
    np.testing.assert_allclose(mean[3], y[30:40].mean())


def test_of_a_step_written_twice_the_later_counts():
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 5.0}]
    steps, values = charts.columns(rows)["loss"]
    assert steps.tolist() == [1, 2] and values.tolist() == [5.0, 2.0]


@pytest.mark.parametrize("low, high", [(0, 1), (-0.02, 0.03), (19000, 24000), (1e-9, 3e-9), (0, 160)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-12 <= v <= high + 1e-12 for v in found)
    assert all(len(charts.short(v)) <= 8 for v in found), found


@pytest.mark.parametrize("key, title", [
    ("loss", "Loss"), ("token_accuracy", "Accuracy"), ("eval_sampled_accuracy", "Accuracy"),
    ("reward", "Reward"), ("reward/accuracy", "Reward"), ("reward_std", "Reward spread"), ("kl", "KL to the reference"),
    ("grad_norm", "Gradient norm"), ("lr", "Learning rate"), ("learning_rate", "Learning rate"), ("entropy", "Entropy"),
    ("clip_low", "Ratio clipped"), ("sampler_gap_max", "Sampler against trainer"), ("eval_accuracy", "Accuracy"),
    ("completion_length", "Completion length"),
    ("tokens_per_second", "Throughput"), ("ms", "Step time"), ("wait", "Waiting for data"), ("gib", "Memory"),
    ("no_variance", "Groups"), ("truncated", "Completions cut by the limit"), ("length", "Completion length"),
    ("group_std", "Reward spread"), ("reward/accuracy_std", "Reward spread"), ("answer_tokens", "Tokens a step"),
    ("rollout_seconds", "Time"), ("eval_seconds", "Time"), ("skipped", "Other"),
])  # fmt: skip
def test_known_keys_find_their_chart(key, title):
    assert charts.group_of(key)[0] == title


def test_good_and_bad_first():
    rows = [{"reward": r} for r in (0.5, 2.0, 0.0, 1.0, 1.5)]
    assert [row["reward"] for row in rollouts.good_and_bad_first(rows)] == [2.0, 0.0, 1.5, 0.5, 1.0]


def test_of_a_large_file_only_whole_groups_of_both_ends_are_read(tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [row for step in range(50) for row in rollout_rows(step, 2, sample=f"{step % 5}")])
    monkeypatch.setattr(rollouts, "WINDOW", 5000)
    found = rollouts.read_rollouts(path)
    assert found.first[0].step == 0 and found.last[-1].step == 49 and found.first[-1].step < found.last[0].step
    assert {len(group.rows) for group in [*found.first, *found.last]} == {4}


def test_a_long_run_is_written_within_a_second(grpo_run):
    rows = [{"step": s, **{f"key_{k}": s * k % 97 for k in range(40)}} for s in range(2000)]
    write_lines(grpo_run / "metrics.jsonl", rows)
    page_of(grpo_run)
    began = time.perf_counter()
    text = page_of(grpo_run)
    assert time.perf_counter() - began < 2, "twice what is promised: machines differ"
    assert len(text) < 3e6


def test_no_torch_is_imported():
    code = "import report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_command_line(grpo_run):
    done = subprocess.run([sys.executable, "report.py", str(grpo_run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(grpo_run / "report.html"), done.stderr
    done = subprocess.run([sys.executable, "report.py", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: no such folder"), done.stderr


def test_sft_runs_are_held_against_the_defaults_of_sft(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"script": "train_sft", "config": as_dict(SFT(lora_rank=8))}))
    text = page_of(tmp_path)
    assert "python train_sft.py --lora_rank 8" in text and "1 of them changed" in text

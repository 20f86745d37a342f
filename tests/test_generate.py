"""The generated dataset: only motion tells the class, files are whole and reproducible, mistakes end in one line."""

import json
import re
import signal
from dataclasses import replace

import av
import numpy as np
import pytest

import clips as C
import generate as G
from config import QUESTION, Generate
from model import UserError
from rewards import accuracy, sample_from_record

LABELS = list(C.DIRECTIONS)
GOOD = "<think>The ball goes on to larger x in every frame.</think><answer>(A) Left to Right</answer>"


def options(folder, **changes):
    return Generate(output_dir=str(folder), **({"num_samples": 16, "workers": 1} | changes))


def load(folder, split="train"):
    return json.loads((folder / f"{split}.json").read_text())


# -- Only motion tells the class


def probe(x, y):
    """Accuracy on the held-out third of x (N, D) of ridge regression on 1,000 random features."""
    rng, cut = np.random.default_rng(0), len(x) * 2 // 3
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    hidden = np.maximum(x @ rng.normal(0, x.shape[1] ** -0.5, (x.shape[1], 1000)) + rng.normal(0, 0.5, 1000), 0)
    train = hidden[:cut]
    weights = np.linalg.solve(train.T @ train + 10 * np.eye(1000), train.T @ np.eye(4)[y[:cut]])
    return float(((hidden[cut:] @ weights).argmax(1) == y[cut:]).mean())


def seen(drawn, frames):
    """Per frame an 8x8 map of the ball, from the pixels (N, F, 64), and its place on the torus (N, F, 2)."""
    maps = []
    for clip in drawn:
        ball = np.abs(C.render(clip, frames).astype(np.float32) - np.float32(clip.background_rgb)).sum(-1)  # (F, S, S)
        coarse = ball.reshape(len(frames), 8, clip.size // 8, 8, clip.size // 8).mean((2, 4)).reshape(len(frames), 64)
        maps.append(coarse / ball.max())
    return np.stack(maps), np.stack([clip.centres(frames) % clip.size / clip.size for clip in drawn])


@pytest.mark.parametrize("augment", ["", "blur,crop"])
def test_only_motion_tells_the_class(augment):
    """A still tells nothing, the set of stills the axis and not the sense, their order everything."""
    cfg = options("", num_samples=2000, augment=augment, augment_prob=0.2, seed=7)
    drawn = [G.clip_of(cfg, job) for job in G.plan(cfg)]
    y = np.array([LABELS.index(clip.label) for clip in drawn])
    maps, positions = seen(drawn, C.sampled_frames(cfg.video_length))
    unordered = np.concatenate([np.sort(positions, 1).reshape(2000, -1), maps.mean(1), maps.max(1)], 1)
    steps = (np.diff(positions, axis=1) + 0.5) % 1 - 0.5  # between neighbours, the short way round
    still, as_set, in_order = probe(maps[:, 0], y), probe(unordered, y), probe(steps.reshape(2000, -1), y)
    assert still <= 0.35 and 0.40 <= as_set <= 0.60 and in_order >= 0.95, (still, as_set, in_order)
    quarter = (positions[:, 0] > 0.5) @ [1, 2]  # that the same probe sees on the same still
    assert probe(maps[:, 0], quarter) >= 0.8 or augment, "the probe sees nothing"


def test_a_reversed_clip_is_of_the_opposite_class():
    for label, signs in C.SIGNS.items():
        rng = np.random.default_rng(1)
        clip = C.augmented(C.draw_clip(rng, label, 64, 30), ["blur", "crop"], rng)
        velocity = tuple(-v for v in clip.velocity)
        back = replace(clip, start=tuple(clip.centres([29])[0] % 64), velocity=velocity)
        assert tuple(np.sign(velocity)) == tuple(-sign for sign in signs)
        assert np.abs(C.render(back).astype(int) - C.render(clip)[::-1]).max() <= 1  # rounding of the start


def test_augmentation_is_one_draw_a_clip_leaves_val_alone_and_keeps_the_motion_in_sight():
    cfg, plain = options("", num_samples=1000, augment="blur,crop", augment_prob=0.3), options("", num_samples=1000)
    pairs = [(job, G.clip_of(cfg, job), G.clip_of(plain, job)) for job in G.plan(cfg)]
    assert all(clip == other for job, clip, other in pairs if job.split == "val")
    assert 0.25 < np.mean([clip != other for job, clip, other in pairs if job.split == "train"]) < 0.35
    cropped = [clip for _, clip, _ in pairs if clip.crop[2] < 1]
    assert len(cropped) > 100 and len({any(clip.blur) for clip in cropped}) == 2
    assert all(clip.track().inside.sum() >= 5 and len(clip.track().longest_run()) >= 2 for clip in cropped)


# -- What is said


@pytest.mark.parametrize("task", C.TASKS)
def test_typed_answers_are_what_the_pixels_show(tmp_path, task):
    cfg = options(tmp_path, task=task, num_samples=24)
    G.generate(cfg)
    records, checked = {r["problem_id"]: r for split in ("train", "val") for r in load(tmp_path, split)}, 0
    for job in G.plan(cfg):
        record, clip = records[job.name], G.clip_of(cfg, job)
        assert accuracy(record["solution"], sample_from_record(record)) == 1
        frames = C.render(clip).astype(float)
        moving = np.flatnonzero(np.abs(np.diff(frames, axis=0)).max((1, 2, 3)))
        said = re.fullmatch(r"<answer>(.*)</answer>", record["solution"])[1]
        if task == "time_span":
            start, end = (round(float(time) * 30) for time in said.split(" to "))
            assert (start, min(end, 29)) == (moving[0], moving[-1] + 1)
        elif not any(clip.gradient) and moving[-1] < 28:  # on a plain background, where the end is seen
            along = 1 if clip.velocity[0] else 2
            ball = np.abs(frames - clip.background_rgb).sum(-1).sum(along)  # (F, S) along its axis
            angles = np.angle(ball @ np.exp(2j * np.pi * np.arange(64) / 64))
            assert abs(float(said) - abs(np.unwrap(angles)[-1] - angles[0]) * 64 / 2 / np.pi) < 2
            checked += 1
    assert checked >= 5 or task == "time_span"


@pytest.mark.parametrize("coordinates", [0, 1, 8])
@pytest.mark.parametrize("label", LABELS)
def test_explanations_are_true_and_pass_the_check(label, coordinates):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clip = C.draw_clip(rng, label, 64, 30)
        text = C.explain(clip.track(), label, rng, coordinates)
        assert G.check_answer(text, C.OPTIONS[label]) == (text, ""), text
        points = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)]
        assert len(points) == coordinates, text
        if len(points) > 1 and "comes back" not in text:
            assert (np.sign(np.diff(np.array(points), axis=0)) == C.DIRECTIONS[label]).all(), text


@pytest.mark.parametrize(
    "text, why",
    [
        (f"\n{GOOD}\n", ""), ("Answer: (A) Left to Right", "wrong form"), (GOOD + GOOD, "wrong form"), (None, "form"),
        ("<think> </think><answer>(A) Left to Right</answer>", "empty"), (GOOD.replace("ball", "b" * 2000), "too long"),
        (GOOD.replace("(A) Left to Right", "(A)"), "wrong option"), (GOOD.replace("larger x", "option A"), "letter"),
        (GOOD.replace("larger x", "what F says"), "letter"), (GOOD.replace("larger x", "a (c)"), "letter"),
    ],
)  # fmt: skip
def test_check_of_an_answer(text, why):
    answer, reason = G.check_answer(text, "(A) Left to Right")
    assert (answer, reason) == (GOOD, "") if not why else answer is None and why in reason


def test_a_clip_without_a_chain_of_thought_is_dropped(tmp_path, monkeypatch):
    """Not replaced by another answer: its video and its record are gone."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    cfg = options(tmp_path, cot=True)
    lost = next(job for job in G.plan(cfg) if job.label == "Falling Down" and job.split == "train")
    texts = [GOOD if job != lost else None for job in G.plan(cfg)]
    monkeypatch.setattr(G, "ask_all", lambda client, cache, questions, workers: texts)
    assert G.generate(cfg)["counts"]["train"]["Falling Down"] == 2 and len(load(tmp_path)) == 11
    assert not (tmp_path / "videos" / f"{lost.name}.mp4").exists()


# -- Files


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_files_whatever_the_workers(tmp_path):
    """And they hold what was planned: videos, questions, answers, counts."""
    for name, workers in {"one": 1, "two": 2}.items():
        cfg = options(tmp_path / name, num_samples=40, seed=3, cot=True, cot_source="trajectory", workers=workers)
        metadata = G.generate(cfg)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("metadata.json") and two.pop("metadata.json")  # names the folder and the workers
    assert one == two
    train, val = load(tmp_path / "one"), load(tmp_path / "one", "val")
    assert metadata["counts"] == {"train": dict.fromkeys(sorted(LABELS), 8), "val": dict.fromkeys(sorted(LABELS), 2)}
    names = sorted(record["video"] for record in train + val)
    assert names == [f"{k:06d}.mp4" for k in range(40)] == sorted(p.name for p in (tmp_path / "one/videos").iterdir())
    assert [r["id"] for r in val] != sorted(r["id"] for r in val) and train == sorted(train, key=lambda r: r["id"])
    for record in train + val:
        human, gpt = record["conversations"]
        assert human == {"from": "human", "value": "<video>\n" + QUESTION} and gpt["value"].startswith("<think>")
        assert gpt["value"].endswith(f"</think><answer>{C.OPTIONS[record['meta']['label']]}</answer>")
    for name, job in zip(names[:4], G.plan(cfg)):
        with av.open(str(tmp_path / "one/videos" / name)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 30)
            shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert shown.shape == (30, 64, 64, 3) and np.abs(shown - C.render(G.clip_of(cfg, job)).astype(int)).mean() < 4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"augment": "blurr"}, "augment"),
        ({"frame_size": 32}, "at least 40"),
        ({"frame_size": 41}, "even number"),
        ({"num_samples": 7}, "at least 8"),
        ({"video_length": 4}, "at least 8"),
        ({"cot": True, "cot_source": "openai"}, "OPENAI_API_KEY: not set"),
        ({"cot": True, "task": "distance"}, "--cot .* direction"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, changes, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=words) as error:
        G.generate(options(tmp_path / "set", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "set").exists()


def test_a_filled_folder_is_left_alone_and_a_killed_run_started_again(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("notes")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a command begins; another test may have changed it
    with monkeypatch.context() as patch:
        patch.setattr(G, "facts_of", lambda clip: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            G.generate(options(tmp_path))
    assert contents(tmp_path) == {"mine.txt": b"notes"}
    G.generate(options(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds .*--overwrite"):
        G.generate(options(tmp_path, seed=9))
    assert contents(tmp_path) == before
    G.generate(options(tmp_path, seed=9, num_samples=8, overwrite=True))
    after = contents(tmp_path)
    assert after["mine.txt"] == b"notes" and len([name for name in after if name.endswith("mp4")]) == 8

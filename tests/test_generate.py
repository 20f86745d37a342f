"""The generated dataset: only motion tells the class, files are whole and reproducible, mistakes end in one line."""

import json
import re
from dataclasses import replace

import av
import numpy as np
import pytest

import clips as C
import generate as G
from assets import make_tiny
from config import QUESTION, Generate
from model import UserError

LABELS = list(C.DIRECTIONS)
GOOD = "<think>The ball goes on to larger x in every frame.</think><answer>(A) Left to Right</answer>"


def options(folder, **changes):
    return Generate(output_dir=str(folder), **({"num_samples": 16, "workers": 1} | changes))


def load(folder, split="train"):
    return json.loads((folder / f"{split}.json").read_text())


# -- Only motion tells the class


def probe(x, y, seed=0):
    """Accuracy on the held-out third of x (N, D) of ridge regression on 1,000 random features."""
    rng, cut = np.random.default_rng(seed), len(x) * 2 // 3
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    hidden = np.maximum(x @ rng.normal(0, x.shape[1] ** -0.5, (x.shape[1], 1000)) + rng.normal(0, 0.5, 1000), 0)
    train = hidden[:cut]
    weights = np.linalg.solve(train.T @ train + 10 * np.eye(1000), train.T @ np.eye(4)[y[:cut]])
    return float(((hidden[cut:] @ weights).argmax(1) == y[cut:]).mean())


def seen(drawn, frames):
    """Per frame an 8x8 map of the ball, from the pixels (N, F, 64), and its place on the torus (N, F, 2)."""
    maps = []
    for clip in drawn:
        pictures = C.render(clip, frames).astype(np.float32)
        ball = np.abs(pictures - np.asarray(clip.background_rgb, np.float32)).sum(-1)  # (F, S, S)
        coarse = ball.reshape(len(frames), 8, clip.size // 8, 8, clip.size // 8).mean((2, 4)).reshape(len(frames), 64)
        maps.append(coarse / ball.max())
    return np.stack(maps), np.stack([clip.centres(frames) % clip.size / clip.size for clip in drawn])


def unordered(maps, places):
    """A view without order: where the ball was along x and y, and how often; its mean and largest map."""
    visits = [np.array([np.histogram(line, 16, (0, 1))[0] for line in places[:, :, k]]) for k in (0, 1)]
    return np.concatenate([np.sort(places, 1).reshape(len(places), -1), *visits, maps.mean(1), maps.max(1)], 1)


def entering(clip):
    """The usual generator: the ball starts at its entry edge and crosses some of the picture."""
    edges = {1: 0.05 * clip.size, -1: 0.95 * clip.size}
    start = [edges.get(np.sign(v), s) for s, v in zip(clip.start, clip.velocity, strict=True)]
    return replace(clip, start=tuple(start), velocity=tuple(0.4 * v for v in clip.velocity))


@pytest.mark.parametrize("augment", ["", "blur,crop"])
def test_only_motion_tells_the_class(augment):
    """The same probes that fail on our clips succeed where the class does show: in order, or with an entry edge."""
    cfg = options("", num_samples=2000, augment=augment, augment_prob=0.2, seed=7)
    drawn = [G.clip_of(cfg, job) for job in G.plan(cfg)]
    y = np.array([LABELS.index(clip.label) for clip in drawn])
    frames = C.sampled_frames(cfg.video_length)
    maps, places = seen(drawn, frames)
    steps = (np.diff(places, axis=1) + 0.5) % 1 - 0.5  # between neighbours, the short way round
    still, as_set, in_order = probe(maps[:, 0], y), probe(unordered(maps, places), y), probe(steps.reshape(2000, -1), y)
    assert still <= 0.35 and 0.40 <= as_set <= 0.60 and in_order >= 0.95, (still, as_set, in_order)  # axis, not sense
    if not augment:
        maps, places = seen([entering(clip) for clip in drawn], frames)
        still, as_set = probe(maps[:, 0], y), probe(unordered(maps, places), y)
        assert still >= 0.8 and as_set >= 0.9, (still, as_set)


def test_what_does_not_move_is_drawn_alike_and_a_reversed_clip_is_of_the_opposite_class():
    drawn = {label: C.draw_clip(np.random.default_rng(5), label, 64, 30) for label in C.SIGNS}
    assert len({replace(clip, label="", velocity=(0, 0)) for clip in drawn.values()}) == 1
    for label, signs in C.SIGNS.items():
        rng = np.random.default_rng(1)
        clip = C.augmented(C.draw_clip(rng, label, 64, 30), ["blur", "crop"], rng)
        velocity = tuple(-v for v in clip.velocity)
        back = replace(clip, start=tuple(clip.centres([29])[0] % 64), velocity=velocity)
        assert tuple(np.sign(velocity)) == tuple(-sign for sign in signs)
        assert np.abs(C.render(back).astype(int) - C.render(clip)[::-1]).max() <= 1  # rounding of the start


@pytest.mark.parametrize("size, length", [(64, 30), (128, 30), (64, 90), (40, 30)])
def test_neighbours_of_eight_frames_do_not_alias(size, length):
    drawn = [C.draw_clip(np.random.default_rng(k), "top left", size, length) for k in range(200)]
    steps = np.abs(np.diff(np.stack([clip.centres(C.sampled_frames(length)) for clip in drawn]), axis=1)) / size
    assert 0.05 < steps.min() and steps.max() < 0.25  # of the way round; 0.5 looks the same both ways


def test_augmentation_is_one_draw_a_clip_leaves_val_alone_and_keeps_the_motion_in_sight():
    cfg, plain = options("", num_samples=2000, augment="blur,crop", augment_prob=0.3), options("", num_samples=2000)
    pairs = [(job, G.clip_of(cfg, job), G.clip_of(plain, job)) for job in G.plan(cfg)]
    assert all(clip == other for job, clip, other in pairs if job.split == "val")
    touched = [clip != other for job, clip, other in pairs if job.split == "train"]
    assert 0.25 < np.mean(touched) < 0.35, np.mean(touched)
    assert len({(any(clip.blur), clip.crop[2] < 1) for _, clip, _ in pairs}) == 4
    cropped = [clip for _, clip, _ in pairs if clip.crop[2] < 1]
    assert min(clip.crop[2] for clip in cropped) > 0.65 and len(cropped) > 200
    assert all(clip.track().inside.sum() >= 5 and len(clip.track().longest_run()) >= 2 for clip in cropped)
    for blur in [(1.0, 0, 0), (0, 5.0, 0.0), (0, 5.0, 1.2)]:  # symmetric: it tells no direction
        kernel = {(dy, dx): weight for dy, dx, weight in C.blur_kernel(*blur)}
        assert all(kernel[-dy, -dx] == pytest.approx(weight) for (dy, dx), weight in kernel.items())
        flat = np.full((2, 16, 16, 3), 77.0, np.float32)
        np.testing.assert_allclose(C.blurred(flat, C.blur_kernel(*blur)), flat, rtol=1e-5)


# -- What is said


@pytest.mark.parametrize("coordinates", [0, 1, 8])
@pytest.mark.parametrize("label", LABELS)
def test_explanations_are_true_and_pass_the_check(label, coordinates):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clip = C.draw_clip(rng, label, 64, 30)
        clip = C.augmented(clip, ["crop"], rng) if seed % 3 == 0 else clip
        text = C.explain(clip.track(), label, rng, coordinates)
        assert G.check_answer(text, C.OPTIONS[label]) == (text, ""), text
        points = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)]
        assert len(points) == coordinates or clip.crop[2] < 1 and points or not coordinates, text
        if len(points) > 1 and "comes back" not in text:
            assert (np.sign(np.diff(np.array(points), axis=0)) == C.DIRECTIONS[label]).all(), text


@pytest.mark.parametrize(
    "text, why",
    [
        (f"\n{GOOD}\n", ""),
        ([], "no text"),
        ("Answer: (A) Left to Right", "wrong form"),
        (GOOD + GOOD, "wrong form"),
        (GOOD.replace("<think>", "<think><think>"), "wrong form"),
        ("<think> </think><answer>(A) Left to Right</answer>", "empty"),
        (GOOD.replace("ball", "b" * 2000), "too long"),
        (GOOD.replace("(A) Left to Right", "(A)"), "wrong option"),
        (GOOD.replace("larger x", "option A"), "letter"),
    ],
)
def test_check_of_an_answer(text, why):
    answer, reason = G.check_answer(text, "(A) Left to Right")
    assert (answer is None and why in reason) if why else re.fullmatch(r"<think>.*</think><answer>.*</answer>", answer)
    beyond = GOOD.replace("larger x", "what F says")
    assert G.check_answer(beyond, "(A) Left to Right")[0] and not G.check_answer(beyond, "(A) Left to Right", "F")[0]


def test_a_clip_without_a_chain_of_thought_is_dropped(tmp_path, monkeypatch):
    """Not replaced by another answer: its video and its record are gone, all others have the server's text."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    cfg = options(tmp_path / "set", cot=True)
    lost = next(job for job in G.plan(cfg) if job.label == "Falling Down" and job.split == "train")

    def ask_all(client, cache, questions, workers):
        texts = [GOOD.replace("(A) Left to Right", C.OPTIONS[job.label]) for job in G.plan(cfg)]
        answers = [question.check(text)[0] for question, text in zip(questions, texts, strict=True)]
        return [answer if i != lost.index else None for i, answer in enumerate(answers)]

    monkeypatch.setattr(G, "ask_all", ask_all)
    assert G.generate(cfg)["counts"]["train"]["Falling Down"] == 2
    answers = [record["conversations"][1]["value"] for record in load(tmp_path / "set")]
    assert len(answers) == 11 and all(answer.startswith("<think>") for answer in answers)
    assert not (tmp_path / "set" / "videos" / f"{lost.name}.mp4").exists()


# -- Files


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dataset_end_to_end(tmp_path):
    cfg, out = options(tmp_path / "set", num_samples=40, seed=3), tmp_path / "set"
    metadata = G.generate(cfg)
    assert sorted(p.name for p in out.iterdir()) == ["metadata.json", "train.json", "val.json", "videos"]
    train, val = load(out), load(out, "val")
    assert metadata["counts"] == {"train": dict.fromkeys(sorted(LABELS), 8), "val": dict.fromkeys(sorted(LABELS), 2)}
    names = sorted(record["video"] for record in train + val)
    assert names == [f"{k:06d}.mp4" for k in range(40)] == sorted(p.name for p in (out / "videos").iterdir())
    assert [r["id"] for r in val] != sorted(r["id"] for r in val) and train == sorted(train, key=lambda r: r["id"])
    for record in train + val:
        human, gpt = record["conversations"]
        assert human == {"from": "human", "value": "<video>\n" + QUESTION}
        assert gpt == {"from": "gpt", "value": "Answer: " + C.OPTIONS[record["meta"]["label"]]}
    for name, job in zip(names[:4], G.plan(cfg)):
        with av.open(str(out / "videos" / name)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 30)
            shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert shown.shape == (30, 64, 64, 3) and np.abs(shown - C.render(G.clip_of(cfg, job)).astype(int)).mean() < 4


def test_same_seed_same_files_whatever_the_workers(tmp_path):
    for name, workers in {"one": 1, "two": 2}.items():
        same = {"num_samples": 66, "cot": True, "cot_source": "trajectory", "augment": "blur,crop"}
        G.generate(options(tmp_path / name, workers=workers, **same))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("metadata.json") and two.pop("metadata.json")  # names the folder and the workers
    assert one == two
    for record in load(tmp_path / "one"):
        answer, right = record["conversations"][1]["value"], C.OPTIONS[record["meta"]["label"]]
        assert answer.startswith("<think>") and answer.endswith(f"</think><answer>{right}</answer>")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"split": float("nan")}, "split"),
        ({"augment": "blurr"}, "augment"),
        ({"frame_size": 32}, "even number .* from 40 on"),
        ({"frame_size": 65}, "even number"),
        ({"num_samples": 7}, "every class"),
        ({"video_length": 4}, "at least 8"),
        ({"cot": True, "cot_source": "openai"}, "OPENAI_API_KEY: not set"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, monkeypatch, changes, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=words) as error:
        G.generate(options(tmp_path / "set", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "set").exists()


def test_a_filled_folder_is_left_alone_and_a_killed_run_started_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    out.mkdir()
    (out / "mine.txt").write_text("notes")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(G, "facts_of", killed)
        with pytest.raises(KeyboardInterrupt):
            G.generate(options(out))
    G.generate(options(out))
    assert capsys.readouterr().out.endswith(f"next: python train_sft.py --data_path {out}/train.json\n")
    before = contents(out)
    with pytest.raises(UserError, match="already holds .*--overwrite"):
        G.generate(options(out, seed=9))
    assert contents(out) == before
    G.generate(options(out, seed=9, num_samples=8, overwrite=True))
    after = contents(out)
    assert after["mine.txt"] == b"notes" and len([name for name in after if name.endswith("mp4")]) == 8
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        G.generate(options(tmp_path / "file"))


def test_the_tiny_bases_clips_never_ask_for_the_direction(tmp_path):
    G.generate(options(tmp_path / "set", num_samples=72), make_tiny.base_dataset)
    labels = []
    for record in load(tmp_path / "set"):
        human, gpt = ([turn["value"] for turn in record["conversations"][k::2]] for k in (0, 1))
        assert len(human) == len(gpt) == 3 and human[0].startswith("<video>\n") and human[2] == "Repeat: " + gpt[2]
        assert QUESTION not in "".join(human)
        labels.append(record["meta"]["label"])
        assert gpt[0] == (labels[-1] if gpt[0] in C.CORNERS else record["meta"]["axis"] + "ly")
    assert 0.6 < np.mean([label in C.CORNERS for label in labels]) < 0.74

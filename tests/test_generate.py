"""The generated dataset, where only motion tells the class, and one of class-named folders: whole and reproducible."""

import io
import json
import os
import re
import shutil
import signal

import av
import numpy as np
import pytest
from conftest import refused
from test_client import KEY, Server, completion

import clips as C
import generate as G
from config import QUESTION, Generate
from model import UserError
from rewards import accuracy, reference_answer, sample_from_record

LABELS = list(C.DIRECTIONS)


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
    drawn = [job.clip for job in G.plan(cfg)]
    y = np.array([LABELS.index(clip.label) for clip in drawn])
    maps, positions = seen(drawn, C.sampled_frames(cfg.video_length))
    unordered = np.concatenate([np.sort(positions, 1).reshape(2000, -1), maps.mean(1), maps.max(1)], 1)
    steps = (np.diff(positions, axis=1) + 0.5) % 1 - 0.5  # between neighbours, the short way round
    still, as_set, in_order = probe(maps[:, 0], y), probe(unordered, y), probe(steps.reshape(2000, -1), y)
    assert still <= 0.35 and 0.40 <= as_set <= 0.60 and in_order >= 0.95, (still, as_set, in_order)
    quarter = (positions[:, 0] > 0.5) @ [1, 2]  # that the same probe sees on the same still
    assert probe(maps[:, 0], quarter) >= 0.8 or augment, "the probe sees nothing"


# -- What is said


@pytest.mark.parametrize("task", C.TASKS)
def test_typed_answers_are_what_the_pixels_show(tmp_path, task):
    cfg = options(tmp_path, task=task, num_samples=24)
    G.generate(cfg)
    records, checked = {r["problem_id"]: r for split in ("train", "val") for r in load(tmp_path, split)}, 0
    for job in G.plan(cfg):
        record, clip = records[job.name], job.clip
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
        text = C.explain(clip, rng, coordinates)
        assert G.check_answer(text, C.OPTIONS[label]) == (text, ""), text
        points = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", text)]
        assert len(points) == coordinates, text
        if len(points) > 1 and "comes back" not in text:
            assert (np.sign(np.diff(np.array(points), axis=0)) == C.DIRECTIONS[label]).all(), text


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
        assert shown.shape == (30, 64, 64, 3) and np.abs(shown - C.render(job.clip).astype(int)).mean() < 4


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
    with G.claimed(tmp_path), pytest.raises(UserError, match="another process makes a dataset there"):
        G.generate(options(tmp_path, overwrite=True))
    assert re.search("already holds .*--overwrite", refused(G.generate, options(tmp_path, seed=9)))
    assert contents(tmp_path) == before
    G.generate(options(tmp_path, seed=9, num_samples=8, overwrite=True))
    (tmp_path / "own/videos").mkdir(parents=True)
    with pytest.raises(UserError, match="its videos/ is of no dataset made here"):
        G.generate(options(tmp_path / "own", overwrite=True))
    after = contents(tmp_path)
    assert after["mine.txt"] == b"notes" and len([name for name in after if name.endswith("mp4")]) == 8


# -- Class-named folders


CLASSES = {"ball_rising": "ball rising", "ball_falling": "ball falling", "playing_billiards": "playing billiards"}
CLASSES |= {"RidingABike": "Riding ABike", "über uns": "über uns"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """30 grey frames of 64x64 that grow brighter."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    grey = np.linspace(20, 240, 30).astype(np.uint8)
    C.write_mp4(path, np.broadcast_to(grey[:, None, None, None], (30, 64, 64, 3)).copy())
    return path


@pytest.fixture
def root(tmp_path, clip):
    """Five classes with 4, 5, 6, 7 and 8 clips, and things that are none."""
    made = tmp_path / "my clips"
    for k, name in enumerate(CLASSES):
        (made / name).mkdir(parents=True)
        for i in range(4 + k):
            os.link(clip, made / name / f"{i}.mp4")
    (made / "ball_rising" / "notes.txt").write_text("no clip")
    (made / "ball_rising" / "._0.mp4").write_bytes(b"what a Mac leaves beside a file")
    (made / ".git").mkdir()
    return made


def from_folder(root, **changes):
    """Makes root's dataset beside it -> (metadata, the records of train.json, of val.json)"""
    out = root.parent / "set"
    metadata = G.generate(options(out, **{"from_folder": str(root)} | changes))
    return metadata, load(out), load(out, "val") if (out / "val.json").exists() else []


def test_every_clip_once_each_class_split_by_itself(root):
    metadata, train, val = from_folder(root, split=0.75)
    out = root.parent / "set"
    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "train.json", "val.json"]  # nothing copied
    assert metadata["counts"]["train"] == dict(sorted(zip(CLASSES.values(), (3, 4, 4, 5, 6))))
    assert metadata["counts"]["val"] == dict(sorted(zip(CLASSES.values(), (1, 1, 2, 2, 2))))
    assert len({record["id"] for record in train + val}) == 30 == len(train + val)
    for record in train + val:
        sample, label = sample_from_record(record), CLASSES[record["id"].split("/")[0]]
        assert sample.options[reference_answer(sample)] == label == record["meta"]["label"]
        assert len(set(sample.options.values())) == 4 and set(sample.options.values()) <= set(CLASSES.values())
        assert record["conversations"][0]["value"].startswith("<video>\nWhat does the video show?\nOptions:\n(A) ")
        assert (out / record["video"]).is_file() and not os.path.isabs(record["video"])
    assert from_folder(root, split=0.75, overwrite=True)[1:] == (train, val)
    order = [record["meta"]["label"] for record in val]
    assert order != sorted(order), "val.json is shuffled, not class after class"


def test_hard_negatives_are_names_spelt_alike(root):
    """One of the two most alike is drawn; which, differs from clip to clip, or the options would tell the class."""
    _, train, val = from_folder(root, num_options=2, hard_negatives=True, question="Which one?")
    wrong = {}
    for record in train + val:
        sample = sample_from_record(record)
        right = sample.options[reference_answer(sample)]
        wrong.setdefault(right, set()).update({*sample.options.values()} - {right})
        assert record["conversations"][0]["value"].startswith("<video>\nWhich one?\nOptions:\n")
    assert "ball falling" in wrong["ball rising"] and "ball rising" in wrong["ball falling"]
    assert all(len(names) <= 2 for names in wrong.values()) and any(len(names) == 2 for names in wrong.values())


def test_train_and_val_as_kinetics_comes(root):
    kinetics = root.parent / "kinetics"
    shutil.copytree(root, kinetics / "train")
    for name in [*CLASSES][:3]:
        shutil.copytree(root / name, kinetics / "validation" / name)
    _, train, val = from_folder(kinetics, split=0.5)
    assert len(train) == 30 and len(val) == 15 and all(record["id"].startswith("validation/") for record in val)
    for old, new in (("train", "training"), ("validation", "validate")):
        (kinetics / old).rename(kinetics / new)
    assert [len(records) for records in from_folder(kinetics, overwrite=True)[1:]] == [30, 15]
    vehicles = root.parent / "vehicles"  # a class that is called train; one clip a class: all are for training
    for name in ("train", "bus"):
        (vehicles / name).mkdir(parents=True)
        os.link(root / "ball_rising" / "0.mp4", vehicles / name / "0.mp4")
    (vehicles / "val").write_text("a file is no split")
    metadata, _, val = from_folder(vehicles, overwrite=True)
    assert metadata["counts"] == {"train": {"train": 1, "bus": 1}, "val": {}}
    assert val == []  # the old file is gone


def test_unreadable_files_are_listed_and_generation_goes_on(root, clip, capsys):
    folder = root / "ball_rising"
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:900])
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    os.link(clip, folder / os.fsdecode(b"\xff.mp4"))
    (root / "ball_nested" / "clips").mkdir(parents=True)
    (metadata, train, val), out = from_folder(root), capsys.readouterr().out
    names = [os.path.basename(path) for path in metadata["unreadable"]]
    assert sorted(names) == ["\\xff.mp4", "cut.mp4", "gone.mp4", "pipe.mp4"]
    assert len(train + val) == 30
    assert "ball_nested: expected .mp4" in out and "4 clips are unreadable" in out and out.count("unreadable: ") == 4


def test_chains_of_thought_come_from_the_server(root, clip, monkeypatch, capsys):
    """The strip shows the clip's own frames; an answer is kept if it names the right option in the right form."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def think(handler):
        text = server.requests[-1][2]["messages"][0]["content"][0]["text"]
        line = next((line for line in text.splitlines() if line.endswith(") ball rising")), "(A) none")
        handler.say(200, completion(f"<think>It goes up, frame by frame.</think><answer>{line}</answer>"))

    with Server(think) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        metadata, train, _ = from_folder(root, cot=True, cot_workers=1, split=0.5)
    counts = metadata["cot"]["counts"]
    assert counts["kept"] == 4 and counts["dropped"] == 26 and metadata["counts"]["train"] == {"ball rising": 2}
    for record in train:
        answer = record["conversations"][1]["value"]
        assert answer.startswith("<think>It goes up") and accuracy(answer, sample_from_record(record))
    prompt, _ = server.requests[0][2]["messages"][0]["content"]
    assert "ball" not in prompt["text"].split("Options:")[0] and KEY not in capsys.readouterr().out
    with av.open(io.BytesIO(G.strip_of(clip))) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    shown = [part[:, 20:-20].mean() for part in np.array_split(picture[30:150], 8, axis=1)]
    assert all(np.diff(shown) > 5), shown  # brighter with time

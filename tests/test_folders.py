"""A dataset of class-named folders: what is found, how it is split and asked, that the rewards judge it as meant."""

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import KEY, Server, completion

import clips
import folders
import generate as G
from config import Generate, ignored_options, parse
from model import UserError
from rewards import is_correct, reference_answer, sample_from_record

CLASSES = ("ball_rising", "ball_falling", "playing_billiards", "RidingABike", "riding_a_horse")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """30 grey frames of 64x64 that grow brighter."""
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    grey = np.linspace(20, 240, 30).astype(np.uint8)
    clips.write_mp4(path, np.broadcast_to(grey[:, None, None, None], (30, 64, 64, 3)).copy())
    return path


@pytest.fixture
def root(tmp_path, clip):
    """Five classes with 4, 5, 6, 7 and 8 clips, and things that are none."""
    made = tmp_path / "clips"
    for k, name in enumerate(CLASSES):
        (made / name).mkdir(parents=True)
        for i in range(4 + k):
            os.link(clip, made / name / f"{i}.mp4")
    (made / "ball_rising" / "notes.txt").write_text("no clip")
    (made / "ball_rising" / "._0.mp4").write_bytes(b"what a Mac leaves beside a file")
    (made / ".git").mkdir()
    return made


def options(root, **changes):
    return Generate(**{"from_folder": str(root), "output_dir": str(root.parent / "set"), "workers": 1} | changes)


def load(root, split="train"):
    return json.loads((root.parent / "set" / f"{split}.json").read_text())


def asked(record):
    sample = sample_from_record(record)
    return sample.options, sample.options[reference_answer(sample)]


def test_every_clip_once_each_class_split_by_itself(root, capsys):
    metadata = G.generate(options(root, split=0.75))
    out = root.parent / "set"
    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "train.json", "val.json"]  # nothing copied
    train, val = load(root), load(root, "val")
    labels = [folders.words_of(name) for name in CLASSES]
    assert metadata["counts"]["train"] == dict(sorted(zip(labels, (3, 4, 4, 5, 6))))
    assert metadata["counts"]["val"] == dict(sorted(zip(labels, (1, 1, 2, 2, 2)))) and metadata["unreadable"] == {}
    assert len({record["id"] for record in train + val}) == 30 == len(train + val)
    for record in train + val:
        choices, right = asked(record)
        assert right == folders.words_of(record["id"].split("/")[0]) == record["meta"]["label"]
        assert len(set(choices.values())) == 4 and set(choices.values()) <= set(labels) and list(choices) == [*"ABCD"]
        assert record["conversations"][0]["value"].startswith("<video>\nWhat does the video show?\nOptions:\n(A) ")
        assert (out / record["video"]).is_file() and not os.path.isabs(record["video"])
    assert "22 train, 8 val" in capsys.readouterr().out


def test_options_are_shuffled_and_the_same_for_the_same_seed(root):
    letters, first = Counter(), None
    for seed in (1, 2, 3, 1):
        G.generate(options(root, seed=seed, overwrite=True))
        made = load(root) + load(root, "val")
        first = first or made
        letters.update(reference_answer(sample_from_record(record)) for record in made)
    assert made == first
    assert sum(letters.values()) == 120 and all(15 <= letters[letter] <= 50 for letter in "ABCD"), letters


def test_hard_negatives_are_the_nearest_names(root):
    kin = ["playing guitar", "playing bass guitar", "playing drums", "strumming guitar", "eating cake", "play guitars"]
    # shared of all words: 2/3, 1/3, 1/3, 0, 0; by letters "playing drums" is before "strumming guitar"
    near = folders.nearest_names("playing guitar", kin)
    assert near[0] == "playing bass guitar" and set(near[1:3]) == {"playing drums", "strumming guitar"}
    assert near[3:] == ["play guitars", "eating cake"]
    G.generate(options(root, hard_negatives=True, num_options=2))
    wrong = {}
    for record in load(root):
        choices, right = asked(record)
        wrong.setdefault(right, set()).update(set(choices.values()) - {right})
    assert all(names <= set(folders.nearest_names(right, sorted(wrong))[:2]) for right, names in wrong.items())


def judged(labels, **changes):
    """(choice, sample) of a clip a label; UserError where the rewards could not judge it."""
    videos = [folders.Video(Path(f"{label}.mp4"), label, "train") for label in labels]
    for choice in folders.choices(options(Path("d"), **changes), videos):
        record = G.record("x", "x.mp4", [(choice.text, f"Answer: {choice.right}")], {})
        try:
            folders.check_judged(record, choice)
        except UserError:
            continue
        yield choice, sample_from_record(record)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1), min_size=2, max_size=9))
def test_any_class_names_can_be_judged_or_are_refused(names):
    for choice, sample in judged(sorted({folders.words_of(name) for name in names} - {""})):
        marks = [is_correct(f"<think>.</think><answer>{line[:3]}</answer>", sample) for line in choice.options]
        assert marks == [line == choice.right for line in choice.options]


def test_kinetics_names():
    names = ["tying knot (not on a tie)", "tying tie", "punching person (boxing)", "rock scissors paper"]
    names += ["clean and jerk", "skiing (not slalom or crosscountry)", "massaging person's head"]
    names += ["using remote controller (not gaming)"]
    assert [len(sample.options) for _, sample in judged(names, num_options=8)] == [8] * 8
    alike = folders.Choice("What?\nOptions:\n(A) (B)\n(B) b", ["(A) (B)", "(B) b"], "(A) (B)")
    with pytest.raises(UserError, match="cannot be"):
        folders.check_judged(G.record("x", "x.mp4", [(alike.text, "Answer: (A) (B)")], {}), alike)


def test_train_and_val_as_kinetics_comes(root, capsys):
    kinetics = root.parent / "kinetics"
    shutil.copytree(root, kinetics / "train")
    for name in CLASSES[:3]:
        shutil.copytree(root / name, kinetics / "validation" / name)
    (kinetics / "replacement").mkdir()
    cfg = parse(Generate, ["--from_folder", str(kinetics), "--output_dir", str(root.parent / "set"), "--split", "0.5"])
    counts, out = G.generate(cfg)["counts"], capsys.readouterr().out
    assert sum(counts["train"].values()) == 30 and sum(counts["val"].values()) == 15
    assert all(record["id"].startswith("validation/") for record in load(root, "val"))
    assert "--split has no effect: train/ and val/ are there" in out and "lies beside train/: replacement" in out
    assert "2 class(es) have no clip in val: Riding ABike, riding a horse" in out
    shutil.rmtree(kinetics / "validation")
    assert sum(G.generate(options(kinetics, overwrite=True))["counts"]["val"].values()) == 6  # train/ alone is split
    (kinetics / "train").rename(kinetics / "val")
    with pytest.raises(UserError, match="found val/ but no train/"):
        G.generate(options(kinetics, overwrite=True))
    vehicles = root.parent / "vehicles"  # a class that is called train
    shutil.copytree(root / CLASSES[0], vehicles / "train")
    shutil.copytree(root / CLASSES[1], vehicles / "bus")
    assert set(G.generate(options(vehicles, overwrite=True))["counts"]["train"]) == {"train", "bus"}


def test_unreadable_files_are_listed_and_generation_goes_on(root, clip, capsys):
    broken = {
        "empty.mp4": lambda path: path.write_bytes(b""),
        "text.mp4": lambda path: path.write_bytes(b"no video"),
        "cut.mp4": lambda path: path.write_bytes(clip.read_bytes()[:900]),
        "gone.mp4": lambda path: path.symlink_to("nowhere.mp4"),
        "pipe.mp4": os.mkfifo,
        b"\xff.mp4": lambda path: os.link(clip, path),
    }
    for name, make in broken.items():
        make(root / "ball_rising" / os.fsdecode(name))
    (root / "ghosts").mkdir()
    (root / "ghosts" / "0.mp4").write_bytes(b"")
    os.link(clip, root / "loose.mp4")
    (root / "ball_falling" / "deeper").mkdir()
    metadata, out = G.generate(options(root)), capsys.readouterr().out
    names = sorted(["0.mp4", "\\xff.mp4", *(name for name in broken if isinstance(name, str))])
    assert sorted(os.path.basename(path) for path in metadata["unreadable"]) == names
    assert sum(sum(counts.values()) for counts in metadata["counts"].values()) == 30
    assert "7 clips are unreadable" in out and out.count("\nunreadable: ") == 7
    assert "no clip can be read of: ghosts" in out and "1 video(s) in no class's folder" in out
    assert "1 folder(s) inside a class are not read" in out


def test_what_is_refused(root, tmp_path, monkeypatch):
    def message(folder, **changes):
        with pytest.raises(UserError) as error:
            G.generate(options(folder, **changes))
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "no such folder" in message(tmp_path / "absent")
    shutil.copytree(root / "ball_rising", tmp_path / "one" / "ball_rising")
    assert "classes with videos: ball rising" in message(tmp_path / "one")
    for folder in (root, root / "set", root.parent):
        assert "give a folder of its own" in message(root, output_dir=str(folder), overwrite=True)
    assert sorted(path.name for path in root.iterdir()) == sorted([".git", *CLASSES])
    assert "known only for drawn clips" in message(root, cot=True)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert "known only for drawn clips" in message(root, cot=True, cot_source="trajectory")
    (root / "Ball Rising").mkdir()
    shutil.copy(root / "ball_rising" / "0.mp4", root / "Ball Rising")
    assert "read alike" in message(root)


def test_classes_of_one_clip_are_for_training_and_datasets_replace_each_other(root, clip):
    two = root.parent / "two"
    for name in ("red", "blue"):
        (two / name).mkdir(parents=True)
        os.link(clip, two / name / "0.mp4")
    out = root.parent / "set"
    G.generate(Generate(output_dir=str(out), num_samples=8, workers=1))
    G.generate(options(two, overwrite=True))
    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "train.json"]  # no empty val.json
    assert [len(asked(record)[0]) for record in load(root)] == [2, 2]
    G.generate(Generate(output_dir=str(out), num_samples=8, workers=1, overwrite=True))
    assert len(list((out / "videos").iterdir())) == 8 and (two / "red" / "0.mp4").exists()


def test_chains_of_thought_come_from_the_server(root, clip, monkeypatch, capsys):
    """The strip shows the clip's own frames; an answer is kept if it names the right option in the right form."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def think(handler):
        text = server.requests[-1][2]["messages"][0]["content"][0]["text"]
        line = next((line for line in text.splitlines() if line.endswith(") ball rising")), "(A) none")
        handler.say(200, completion(f"<think>It goes up, frame by frame.</think><answer>{line}</answer>"))

    with Server(think) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        metadata = G.generate(options(root, cot=True, cot_workers=1, split=0.5))
    counts = metadata["cot"]["counts"]
    assert counts["kept"] == 4 and counts["dropped"] == 26 and metadata["counts"]["train"] == {"ball rising": 2}
    for record in load(root):
        answer = record["conversations"][1]["value"]
        assert answer.startswith("<think>It goes up") and is_correct(answer, sample_from_record(record))
    prompt, image = server.requests[0][2]["messages"][0]["content"]
    assert "ball" not in prompt["text"].split("Options:")[0] and "8 frames of one video" in prompt["text"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,") and KEY not in capsys.readouterr().out
    with av.open(io.BytesIO(folders.strip_of(folders.Video(clip, "x", ""), 8))) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    shown = [picture[30:150, x : x + 100].mean() for x in range(20, picture.shape[1] - 120, picture.shape[1] // 8)]
    assert picture.shape[0] >= 160 and all(np.diff(shown) > 5), shown  # brighter with time


def test_options_without_effect_are_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def ignored(flags):
        return {line.split()[0] for line in ignored_options(parse(Generate, flags.split()))}

    flags = "--from_folder d --num_samples 9 --style plain --augment_prob 0.1 --hard_negatives --cot_model x"
    assert ignored(flags) == {"--num_samples", "--style", "--augment_prob", "--cot_model"}
    assert ignored("--question ? --num_options 3") == {"--question", "--num_options"}
    assert parse(Generate, ["--from_folder", "a/kinetics/"]).output_dir == "data/kinetics"

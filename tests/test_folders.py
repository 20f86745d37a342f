"""A dataset of class-named folders: what is found, how it is split and asked, and that training reads it as it is."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cot import GOOD, KEY, Server, completion
from test_data import make_config, make_tokenizer
from test_video import ramp, write_clip

import generate as G
from config import Generate, VideoArgs, ignored_options, parse
from data import Processor
from dataset.index import read_records
from dataset.places import media_folders
from drawing import cot, folders
from model import UserError
from rewards import is_correct, reference_answer, sample_from_record

CLASSES = ("ball_rising", "ball_falling", "playing_billiards", "RidingABike", "riding_a_horse")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", ramp(30))


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


def load(out, part):
    return json.loads((out / f"{part}.json").read_text())


def asked(record):
    sample = sample_from_record(record)
    return sample.options, sample.options[reference_answer(sample)]


def test_the_whole_way(root, monkeypatch, capsys):
    """Every clip once, each class split by itself, and training finds every clip by the defaults alone."""
    metadata = G.generate(options(root, split=0.75))
    out = root.parent / "set"
    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "train.json", "val.json"]  # nothing copied
    train, val = load(out, "train"), load(out, "val")
    labels = [folders.words_of(name) for name in CLASSES]
    assert metadata["counts"]["train"] == dict(sorted(zip(labels, (3, 4, 4, 5, 6))))
    assert metadata["counts"]["val"] == dict(sorted(zip(labels, (1, 1, 2, 2, 2)))) and metadata["unreadable"] == {}
    assert len({record["id"] for record in train + val}) == 30 == len(train + val)
    for record in train + val:
        choices, right = asked(record)
        assert right == folders.words_of(record["id"].split("/")[0]) == record["meta"]["label"]
        assert len(set(choices.values())) == 4 and set(choices.values()) <= set(labels) and list(choices) == [*"ABCD"]
        assert record["conversations"][0]["value"].startswith("<video>\nWhat does the video show?\nOptions:\n(A) ")
    assert "22 train, 8 val of 5 classes, 0 unreadable" in capsys.readouterr().out
    tokenizer = make_tokenizer()
    args = VideoArgs(nframes=4, video_max_pixels=3136)
    args.data_path = str(out / "train.json")
    monkeypatch.chdir(root)  # from anywhere
    processor = Processor(tokenizer, make_config(tokenizer), args)
    for record in read_records(args.data_path):
        assert processor.encode(record).num_vision_tokens == 8


def test_options_are_shuffled_and_the_same_for_the_same_seed(root):
    out = root.parent / "set"
    places, first = Counter(), None
    for seed in (1, 2, 3, 1):
        G.generate(options(root, seed=seed, overwrite=True))
        made = load(out, "train") + load(out, "val")
        first = first or made
        places.update(reference_answer(sample_from_record(record)) for record in made)
    assert made == first
    assert sum(places.values()) == 120 and all(15 <= places[letter] <= 50 for letter in "ABCD"), places


def test_hard_negatives_are_the_nearest_names(root):
    labels = ["ball falling", "ball rising", "playing billiards", "riding a horse", "Riding A Bike"]
    assert folders.nearest("ball rising", labels)[0] == "ball falling"
    assert folders.nearest("riding a horse", labels)[0] == "Riding A Bike"
    kin = ["playing guitar", "playing bass guitar", "playing drums", "strumming guitar", "eating cake", "play guitars"]
    # shared of all words: 2/3, 1/3, 1/3, 0, 0; by letters "playing drums" is before "strumming guitar"
    near = folders.nearest("playing guitar", kin)
    assert near[0] == "playing bass guitar" and set(near[1:3]) == {"playing drums", "strumming guitar"}
    assert near[3:] == ["play guitars", "eating cake"]
    G.generate(options(root, hard_negatives=True, num_options=2))
    wrong = {}
    for record in load(root.parent / "set", "train"):
        choices, right = asked(record)
        wrong.setdefault(right, set()).update(set(choices.values()) - {right})
    assert all(names <= set(folders.nearest(right, sorted(wrong))[:2]) for right, names in wrong.items())


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1), min_size=2, max_size=9))
def test_any_class_names_can_be_judged_or_are_refused(names):
    """Whatever the folders are called, right is right and wrong is wrong, or a line tells that it cannot be so."""
    labels = sorted({folders.words_of(name) for name in names} - {""})
    clips = [folders.Clip(Path(f"{label}.mp4"), label, "train") for label in labels]
    for clip, question in zip(clips, folders.ask(options(Path("d")), clips)):
        try:
            record = folders.record("x", "x.mp4", question, f"Answer: {question.right}", clip.label)
        except UserError:
            continue
        sample = sample_from_record(record)
        letters = [is_correct(f"<think>.</think><answer>{line[:3]}</answer>", sample) for line in question.options]
        assert letters == [line == question.right for line in question.options]


def test_kinetics_names():
    """Names as Kinetics has them, brackets and all."""
    names = ["tying knot (not on a tie)", "tying tie", "punching person (boxing)", "rock scissors paper"]
    names += ["clean and jerk", "skiing (not slalom or crosscountry)", "massaging person's head"]
    names += ["using remote controller (not gaming)"]
    clips = [folders.Clip(Path(f"{name}/{i}.mp4"), name, "train") for name in names for i in range(5)]
    for clip, question in zip(clips, folders.ask(options(Path("d"), num_options=8), clips)):
        record = folders.record("x", "x.mp4", question, f"Answer: {question.right}", clip.label)
        assert len(sample_from_record(record).options) == 8 and asked(record)[1] == clip.label
    alike = folders.Question("What?\nOptions:\n(A) (B)\n(B) b", ["(A) (B)", "(B) b"], "(A) (B)")
    with pytest.raises(UserError, match="cannot be told apart"):
        folders.record("x", "x.mp4", alike, "Answer: (A) (B)", "(B)")


def test_train_and_val_as_kinetics_comes(root, capsys):
    kinetics = root.parent / "kinetics"
    shutil.copytree(root, kinetics / "train")
    for name in CLASSES[:3]:
        shutil.copytree(root / name, kinetics / "validation" / name)
    (kinetics / "replacement").mkdir()
    cfg = parse(Generate, ["--from_folder", str(kinetics), "--output_dir", str(root.parent / "k"), "--split", "0.5"])
    metadata = G.generate(cfg)
    out = capsys.readouterr().out
    assert sum(metadata["counts"]["train"].values()) == 30 and sum(metadata["counts"]["val"].values()) == 15
    assert all(record["id"].startswith("validation/") for record in load(root.parent / "k", "val"))
    assert "--split has no effect: train/ and val/ are there" in out and "lies beside train/: replacement" in out
    assert "2 class(es) have no clip in val: Riding ABike, riding a horse" in out
    shutil.rmtree(kinetics / "validation")
    metadata = G.generate(options(kinetics, output_dir=str(root.parent / "k"), overwrite=True))
    assert sum(metadata["counts"]["val"].values()) == 6  # train/ alone is split
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
        "cut.mp4": lambda path: path.write_bytes(Path(clip).read_bytes()[:900]),
        "gone.mp4": lambda path: path.symlink_to("nowhere.mp4"),
        "pipe.mp4": os.mkfifo,
        b"\xff.mp4": lambda path: os.link(clip, path),
    }
    for name, make in broken.items():
        make(root / "ball_rising" / os.fsdecode(name))
    (root / "nothing").mkdir()
    (root / "ghosts").mkdir()
    (root / "ghosts" / "0.mp4").write_bytes(b"")
    os.link(clip, root / "loose.mp4")
    (root / "ball_falling" / "deeper").mkdir()
    metadata = G.generate(options(root))
    assert sorted(os.path.basename(path) for path in metadata["unreadable"]) == sorted(
        ["0.mp4", "\\xff.mp4", *(name for name in broken if isinstance(name, str))]
    )
    assert sum(sum(found.values()) for found in metadata["counts"].values()) == 30
    out = capsys.readouterr().out
    assert "30 train" not in out and "7 unreadable" in out and out.count("\nunreadable: ") == 7
    assert "no clip can be read of: ghosts" in out and "1 video(s) in no class's folder" in out
    assert "1 folder(s) inside a class are not read" in out
    assert json.loads((root.parent / "set" / "metadata.json").read_text())["unreadable"] == metadata["unreadable"]


def test_what_is_refused(root, tmp_path, monkeypatch):
    def told(folder, **changes):
        with pytest.raises(UserError) as caught:
            G.generate(options(folder, **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "no such folder" in told(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    assert "classes with videos: none" in told(tmp_path / "bare")
    shutil.copytree(root / "ball_rising", tmp_path / "one" / "ball_rising")
    assert "classes with videos: ball rising" in told(tmp_path / "one")
    for place in (root, root / "set", root.parent):
        assert "give a folder of its own" in told(root, output_dir=str(place), overwrite=True)
    assert sorted(path.name for path in root.iterdir()) == sorted([".git", *CLASSES])
    for source in ("auto", "trajectory"):
        assert "known only for drawn clips" in told(root, cot=True, cot_source=source)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert "known only for drawn clips" in told(root, cot=True, cot_source="trajectory")
    (root / "Ball Rising").mkdir()
    shutil.copy(root / "ball_rising" / "0.mp4", root / "Ball Rising")
    assert "read alike" in told(root)


def test_a_class_of_one_clip_is_for_training(root, clip):
    (root / "rare").mkdir()
    os.link(clip, root / "rare" / "0.mp4")
    assert G.generate(options(root))["counts"]["train"]["rare"] == 1
    two = root.parent / "two"
    for name in ("a", "b"):
        (two / name).mkdir(parents=True)
        os.link(clip, two / name / "0.mp4")
    G.generate(options(two, overwrite=True))
    assert not (root.parent / "set" / "val.json").exists()  # none, rather than one without records
    assert [len(asked(record)[0]) for record in load(root.parent / "set", "train")] == [2, 2]


def test_a_drawn_dataset_and_one_from_folders_replace_each_other(root):
    out = root.parent / "set"
    G.generate(Generate(output_dir=str(out), num_samples=8, workers=1))
    with pytest.raises(UserError, match="already holds"):
        G.generate(options(root))
    G.generate(options(root, overwrite=True))
    assert not (out / "videos").exists() and not (out / "preview.png").exists()
    G.generate(Generate(output_dir=str(out), num_samples=8, workers=1, overwrite=True))
    assert len(list((out / "videos").iterdir())) == 8 and (root / "ball_rising" / "0.mp4").exists()


# -- Chains of thought


def test_chains_of_thought_come_from_the_server(root, monkeypatch, capsys):
    """The strip shows the clip's own frames; an answer is kept if it names the right option in the right form."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def think(handler):
        body = server.requests[-1][2]
        text = body["messages"][0]["content"][0]["text"]
        line = next((line for line in text.splitlines() if line.endswith(") ball rising")), "(A) none")
        handler.say(200, completion(f"<think>It goes up, frame by frame.</think><answer>{line}</answer>"))

    with Server(think) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        metadata = G.generate(options(root, cot=True, cot_workers=1, split=0.5))
    counts = metadata["cot"]["counts"]
    assert counts["kept"] == 4 and counts["dropped"] == 26 and metadata["counts"]["train"] == {"ball rising": 2}
    for record in load(root.parent / "set", "train"):
        answer = record["conversations"][1]["value"]
        assert answer.startswith("<think>It goes up, frame by frame.</think><answer>(") and is_correct(
            answer, sample_from_record(record)
        )
    prompt, image = (part for part in server.requests[0][2]["messages"][0]["content"])
    assert "ball" not in prompt["text"].split("Options:")[0] and "8 frames of one video" in prompt["text"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert KEY not in capsys.readouterr().out


def test_the_strip_shows_the_clip(clip):
    import io

    import av

    with av.open(io.BytesIO(folders.read_strip(folders.Clip(clip, "x", "")))) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    shown = [picture[30:150, x : x + 100].mean() for x in range(20, picture.shape[1] - 120, picture.shape[1] // 8)]
    assert picture.shape[0] >= 160 and all(np.diff(shown) > 5), shown  # the ramp grows brighter with time


def test_letters_are_looked_for_up_to_the_last_option():
    text = GOOD.replace("larger x", "what F says")
    assert cot.check(text, "(A) Left to Right")[0] and cot.check(text, "(A) Left to Right", "F") == (
        *(None, "option letter in the reasoning"),
    )


# -- Options


def test_options_without_effect_are_told(capsys, root, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def told_of(flags):
        return {line.split()[0] for line in ignored_options(parse(Generate, flags.split()))}

    told = told_of("--from_folder d --num_samples 9 --style plain --augment_prob 0.1 --hard_negatives --cot_model x")
    assert told == {"--num_samples", "--style", "--augment_prob", "--cot_model"}
    told = told_of("--question ? --num_options 3 --augment_prob 0.1 --cot --cot_model x --base_coordinates")
    assert told == {"--question", "--num_options", "--augment_prob", "--cot_model", "--base_coordinates"}
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    assert told_of("--cot --cot_model x --cot_coordinates 2") == {"--cot_coordinates"}
    assert parse(Generate, ["--from_folder", "a/kinetics/"]).output_dir == "data/kinetics"
    place = ["--from_folder", str(root), "--output_dir", str(root.parent / "o")]
    monkeypatch.setattr("sys.argv", ["generate.py", *place, "--num_samples", "3"])
    G.main()
    assert "note: --num_samples has no effect" in capsys.readouterr().out


def test_where_training_looks(root):
    G.generate(options(root))
    args = VideoArgs()
    args.data_path = str(root.parent / "set" / "train.json")
    first = load(root.parent / "set", "train")[0]["video"]
    found = [os.path.exists(os.path.join(folder, first)) for folder in media_folders(args)]
    assert found[:2] == [False, True] and not os.path.isabs(first)

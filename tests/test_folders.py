"""A dataset of class-named folders: what is read, how it is split and asked, that the rewards judge it as meant."""

import io
import json
import os
import shutil

import av
import numpy as np
import pytest
from test_client import KEY, Server, completion

import clips
import generate as G
from config import Generate
from model import UserError
from rewards import accuracy, reference_answer, sample_from_record

CLASSES = {"ball_rising": "ball rising", "ball_falling": "ball falling", "playing_billiards": "playing billiards"}
CLASSES |= {"RidingABike": "Riding ABike", "über uns": "über uns"}


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
    made = tmp_path / "my clips"
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


def test_every_clip_once_each_class_split_by_itself(root):
    metadata = G.generate(options(root, split=0.75))
    out = root.parent / "set"
    assert sorted(path.name for path in out.iterdir()) == ["metadata.json", "train.json", "val.json"]  # nothing copied
    train, val = load(root), load(root, "val")
    assert metadata["counts"]["train"] == dict(sorted(zip(CLASSES.values(), (3, 4, 4, 5, 6))))
    assert metadata["counts"]["val"] == dict(sorted(zip(CLASSES.values(), (1, 1, 2, 2, 2))))
    assert len({record["id"] for record in train + val}) == 30 == len(train + val)
    for record in train + val:
        sample = sample_from_record(record)
        assert (
            sample.options[reference_answer(sample)] == CLASSES[record["id"].split("/")[0]] == record["meta"]["label"]
        )
        assert len(set(sample.options.values())) == 4 and set(sample.options.values()) <= set(CLASSES.values())
        assert record["conversations"][0]["value"].startswith("<video>\nWhat does the video show?\nOptions:\n(A) ")
        assert (out / record["video"]).is_file() and not os.path.isabs(record["video"])
    G.generate(options(root, split=0.75, overwrite=True))
    assert (load(root), load(root, "val")) == (train, val)
    order = [record["meta"]["label"] for record in val]
    assert order != sorted(order), "val.json is shuffled, not class after class"


def test_hard_negatives_are_names_spelt_alike(root):
    """One of the two most alike is drawn; which, differs from clip to clip, or the options would tell the class."""
    G.generate(options(root, num_options=2, hard_negatives=True, question="Which one?"))
    wrong = {}
    for record in load(root) + load(root, "val"):
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
    counts = G.generate(options(kinetics, split=0.5))["counts"]
    assert sum(counts["train"].values()) == 30 and sum(counts["val"].values()) == 15
    assert all(record["id"].startswith("validation/") for record in load(root, "val"))
    vehicles = root.parent / "vehicles"  # a class that is called train; one clip a class: all are for training
    for name in ("train", "bus"):
        (vehicles / name).mkdir(parents=True)
        os.link(root / "ball_rising" / "0.mp4", vehicles / name / "0.mp4")
    assert G.generate(options(vehicles, overwrite=True))["counts"] == {"train": {"train": 1, "bus": 1}, "val": {}}
    assert not (root.parent / "set" / "val.json").exists()  # the old dataset is replaced


def test_unreadable_files_are_listed_and_generation_goes_on(root, clip, capsys):
    folder = root / "ball_rising"
    (folder / "cut.mp4").write_bytes(clip.read_bytes()[:900])
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    os.link(clip, folder / os.fsdecode(b"\xff.mp4"))
    metadata, out = G.generate(options(root)), capsys.readouterr().out
    names = [os.path.basename(path) for path in metadata["unreadable"]]
    assert sorted(names) == ["\\xff.mp4", "cut.mp4", "gone.mp4", "pipe.mp4"]
    assert sum(sum(counts.values()) for counts in metadata["counts"].values()) == 30
    assert "4 clips are unreadable" in out and out.count("unreadable: ") == 4


def test_what_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "one").mkdir()
    shutil.copytree(root / "ball_rising", tmp_path / "one" / "ball_rising")
    for folder, changes, words in (
        (tmp_path / "absent", {}, "no such folder"),
        (tmp_path / "one", {}, "classes with readable videos: ball rising"),
        *((root, {"output_dir": str(out), "overwrite": True}, "own") for out in (root, root / "set", root.parent)),
        (root, {"cot": True}, "known only for drawn clips"),
    ):
        with pytest.raises(UserError, match=words) as error:
            G.generate(options(folder, **changes))
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in root.iterdir()) == sorted([".git", *CLASSES])


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
        assert answer.startswith("<think>It goes up") and accuracy(answer, sample_from_record(record))
    prompt, _ = server.requests[0][2]["messages"][0]["content"]
    assert "ball" not in prompt["text"].split("Options:")[0] and KEY not in capsys.readouterr().out
    with av.open(io.BytesIO(G.strip_of(clip))) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    shown = [part[:, 20:-20].mean() for part in np.array_split(picture[30:150], 8, axis=1)]
    assert all(np.diff(shown) > 5), shown  # brighter with time

"""Which files a dataset may name: those in the user's folders, and none beyond them."""

import os
from pathlib import Path

import pytest

from config import SFT, Infer, VideoArgs
from data import Processor, load_tokenizer
from dataset.places import Places, media_folders
from model import UserError
from model.loading import ModelConfig

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """data/videos/a.mp4, data/b.mp4, data-other/c.mp4, secret.mp4; links between them; we stand in work/."""
    for name in ("data/videos/a.mp4", "data/b.mp4", "data-other/c.mp4", "secret.mp4", "work/here.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "data/videos/within.mp4").symlink_to("../b.mp4")
    (tmp_path / "data/videos/out.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "data/videos/gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "data/videos/away").symlink_to(tmp_path / "data-other")
    os.mkfifo(tmp_path / "data/videos/fifo.mp4")
    (tmp_path / "data/videos/folder.mp4").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def places(folders, **changes):
    args = SFT(data_path=str(folders / "data/train.json"), **changes)
    return Places(args)


def test_where_clips_are_looked_up():
    args = SFT(data_path="d/train.json", eval_data_path="")
    assert media_folders(args) == ["d/videos", "d", ""]
    args.image_folder = "x"
    assert media_folders(args) == ["x", ""]


@pytest.mark.parametrize("name", ["a.mp4", "b.mp4", "videos/a.mp4", "../b.mp4", "within.mp4", "here.mp4", "./a.mp4"])
def test_names_within_the_folders(folders, name):
    assert os.path.isfile(places(folders).locate(name, "s"))


OUTSIDE = ["../secret.mp4", "../../secret.mp4", "out.mp4", "away/c.mp4", "../data-other/c.mp4", "/etc/passwd"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(folders, name):
    found = places(folders)
    for _ in range(2):  # also when it was asked for before
        with pytest.raises(UserError, match="s: .* lies outside .*allow_outside_files") as caught:
            found.locate(name, "s")
    assert "\n" not in str(caught.value)
    assert places(folders, allow_outside_files=True).locate(name, "s")


def test_absolute_names(folders):
    inside, outside = str(folders / "data/b.mp4"), str(folders / "secret.mp4")
    found = places(folders)
    assert found.locate(inside, "s") == inside
    with pytest.raises(UserError, match="secret.mp4 lies outside"):
        found.locate(outside, "s")
    assert places(folders, image_folder=str(folders)).locate(outside, "s") == outside


def test_the_file_on_the_command_line_is_the_users_own(folders):
    path = str(folders / "secret.mp4")
    assert Places(Infer(video=path)).locate(path, "s") == path
    frames = str(folders / "data-other")
    assert Places(Infer(video=frames)).locate(frames + "/c.mp4", "s")
    with pytest.raises(UserError, match="lies outside"):
        Places(Infer(video=frames)).locate(path, "s")


def test_what_is_no_file(folders):
    args = VideoArgs(image_folder=str(folders / "data/videos"))
    processor = Processor(load_tokenizer(TINY), ModelConfig.from_folder(TINY), args)

    def told(name):
        turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "a"}]
        with pytest.raises(UserError) as caught:  # at once, a fifo too: nothing opens it
            processor.encode({"id": "s", "video": name, "conversations": turns})
        return str(caught.value)

    assert "not a regular file" in told("fifo.mp4") and "not a regular file" in told("folder.mp4")
    assert "no file gone.mp4" in told("gone.mp4") and "no file" in told("zero\0.mp4") and "no file" in told("x" * 5000)

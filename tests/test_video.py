"""Which frames of a clip, at what size, and their patches. test_media.py has the files."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import cases
from hypothesis import given
from hypothesis import strategies as st

import reader
import video
from config import VideoArgs
from model import UserError
from model.qwen import normalise_patches
from video import Options, apply_control, plan_clip, read_clip, smart_nframes, to_patches

FIXTURES = Path(__file__).parent / "fixtures" / "preprocess"  # made with qwen-vl-utils, see NOTICE
CASES = json.loads((FIXTURES / "cases.json").read_text())["cases"]


def write_clip(path, frames, fps=10, codec="libx264", pix_fmt="yuv420p", container=None, ticks=None, **codec_options):
    """frames: (H, W, 3) uint8 arrays. ticks: when each is shown, in parts of 1 / fps."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, codec_options
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            if ticks:
                frame.pts, frame.time_base = ticks[i], Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


def ramp(n, height=64, width=64):
    """Frame i is plain and of brightness i / (n - 1)."""
    return [np.full((height, width, 3), i * 255 // max(n - 1, 1), np.uint8) for i in range(n)]


def brightness(plan):
    """Mean of each planned frame."""
    x = read_clip(plan).view(plan.grid_thw[0], -1, 3, 2, 196).float()
    return x.mean((1, 2, 4)).flatten().numpy()


# -- Against the reference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_qwen_vl_utils(case):
    expected = np.load(FIXTURES / f"{case['name']}.npz")
    plan = plan_clip("video", (str(FIXTURES / f"{case['clip']}.mp4"),), Options(**case["options"]))
    assert list(plan.indices) == case["indices"]
    assert (list(plan.size), list(plan.grid_thw)) == (case["size"], case["grid_thw"])
    assert (plan.total_frames, plan.source_fps) == (case["total_frames"], case["source_fps"])
    assert plan.second_per_grid == case["second_per_grid"] == 2 / case["sample_fps"]
    for name, i in (("first", 0), ("last", -1)):
        (frame,) = reader.read_frames(plan.paths[0], [plan.seeks[i]], plan.size)
        difference = np.abs(frame.numpy().astype(int) - expected[name]).mean()
        assert difference < 0.2, f"{name} frame differs by {difference} of 255"
    patches = read_clip(plan)
    assert patches.shape == tuple(expected["shape"]) and patches.dtype == torch.uint8
    rows = normalise_patches(patches, torch.float32).numpy()
    assert np.abs(rows[expected["row_ids"]] - expected["rows"]).mean() < 0.2 / 255 / 0.26
    assert np.abs(rows.mean(0) - expected["mean"]).max() < 0.02


@given(st.integers(2, 5000), st.floats(1, 120), st.floats(0.1, 60), st.integers(2, 64), st.integers(2, 768))
def test_number_of_frames_is_even_and_there(total, video_fps, fps, low, high):
    n = smart_nframes(total, video_fps, Options(fps=fps, min_frames=low, max_frames=max(low, high)))
    assert n % 2 == 0 and 2 <= n <= total and n <= max(low, high)
    indices = video.frame_indices(total, n)
    assert indices[0] == 0 and indices[-1] == total - 1 and indices == sorted(set(indices))


@pytest.mark.parametrize("case", json.loads((FIXTURES / "spans.json").read_text()), ids=str)
def test_spans_equal_qwen_vl_utils(case):
    """The frames from video_start to video_end; what qwen-vl-utils refuses is refused."""
    total, fps, options = case["total"], case["fps"], Options(**case["options"])
    if "error" in case:
        with pytest.raises(UserError, match="no two frames|expected 2 to"):
            smart_nframes(video.frame_span(total, fps, options)[1], fps, options)
        return
    first, span = video.frame_span(total, fps, options)
    n = smart_nframes(span, fps, options)
    assert [first, first + span - 1, span] == case["range"] and n / span * fps == case["sample_fps"]
    assert video.frame_indices(span, n, first) == case["indices"]


# -- Options


@pytest.mark.parametrize("case", cases("sizes"), ids=str)
def test_sizes_by_options(case):
    """As qwen-vl-utils, but an explicit maximum beats the default minimum."""
    *size, notes = video.frame_size(case["kind"], *case["source"], case["n"], Options(**case["options"]))
    assert size == case["expected"] and bool(notes) == bool(case["note"]) and case["note"] in "".join(notes)


def test_options_of_an_item_overrule_the_scripts():
    args = VideoArgs(nframes=8, video_min_pixels=5000, video_max_pixels=6000, image_max_pixels=7000)

    def of(kind="video", **item):
        return Options.from_args(kind, args, item)

    assert (of().nframes, of().min_pixels, of("image").max_pixels) == (8, 5000, 7000)
    assert (of(fps=4).fps, of(fps=4).nframes, of(sample_fps=3).fps) == (4, None, 3)
    assert (of(max_pixels=900).min_pixels, of(min_pixels=9000).max_pixels) == (900, 9000)
    for item, message in (
        (dict(fp=4), "video option fp: 4; expected one of fps"),
        (dict(fps=-1), "from 0.0001"),
        (dict(nframes=10**400), "nframes: 10000"),
        (dict(resized_height=28), "both of resized_height"),
    ):
        with pytest.raises(UserError, match=message):
            of(**item)
    with pytest.raises(UserError, match="'min_pixels': 5, 'max_pixels': 4"):
        Options.from_args("video", VideoArgs(video_min_pixels=5, video_max_pixels=4), {})


# -- Pictures and patches


def write_picture(path, picture, pix_fmt="rgb24"):
    """picture: (H, W, 3 or 4) uint8"""
    with av.open(str(path), "w", options={"update": "1"}) as file:  # one file, whatever its name
        stream = file.add_stream({"png": "png", "tif": "tiff", "jpg": "mjpeg"}[path.suffix[1:]], rate=1)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuvj420p" if path.suffix == ".jpg" else pix_fmt
        file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pix_fmt)))
        file.mux(stream.encode())
    return str(path)


def test_images_and_lists_of_frames(tmp_path):
    paths = tuple(write_picture(tmp_path / f"{i}%02d.png", frame) for i, frame in enumerate(ramp(5)))
    plan = plan_clip("video", paths, Options())
    assert plan.indices == (0, 1, 2, 3, 4, 4) and plan.second_per_grid == 1.0 and plan.times[:3] == (0.0, 0.5, 1.0)
    assert brightness(plan).round().tolist() == [0, 63, 127, 191, 255, 255]
    thinned = plan_clip("video", paths, Options(fps=4.0, nframes=2))
    assert thinned.indices == (0, 4) and thinned.second_per_grid == 2 / (4.0 * 2 / 5)
    other = write_picture(tmp_path / "other.png", ramp(1, 32, 64)[0])
    with pytest.raises(UserError, match="those of a clip have one size"):
        read_clip(plan_clip("video", (*paths, other), Options()))
    still = plan_clip("image", paths[2:3], Options())
    assert still.grid_thw == (1, 4, 4) and still.second_per_grid == 0 and brightness(still).tolist() == [127, 127]


def test_a_folder_of_frames(tmp_path):
    """TVQA's layout: 00001.jpg, 00002.jpg, … at three a second; and numbers without leading zeros."""
    for i, frame in enumerate(ramp(40)):
        write_picture(tmp_path / f"{i + 1:05}.jpg", frame)
    (tmp_path / "._00001.jpg").write_bytes(b"what macOS leaves behind")
    paths = video.frames_in(str(tmp_path))
    assert [Path(path).name for path in paths] == [f"{i + 1:05}.jpg" for i in range(40)]
    some = plan_clip("video", paths, Options(fps=3.0, nframes=8, video_start=2.0, video_end=10.0))
    assert some.indices == tuple(video.frame_indices(25, 8, 6)) and some.times[0] == 2.0 and some.times[-1] == 10.0
    assert some.second_per_grid == 2 / (8 / 25 * 3) and some.source_fps == 3.0  # as of a video of that rate
    assert np.abs(brightness(some) - np.array(some.indices) * 255 / 39).max() < 2
    (tmp_path / "few").mkdir()
    with pytest.raises(UserError, match="few: a folder without images"):
        video.frames_in(str(tmp_path / "few"))
    for i in (2, 10, 1):
        (tmp_path / "few" / f"frame{i}.png").touch()
    names = [Path(path).name for path in video.frames_in(str(tmp_path / "few"))]
    assert names == ["frame1.png", "frame2.png", "frame10.png"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.mp4"])
def test_one_picture_where_a_video_is_expected(tmp_path, name):
    """It is shown as a clip of two equal frames, whatever nframes says, and a note says so."""
    write = write_picture if name != "a.mp4" else lambda path, picture: write_clip(path, [picture])
    plan = plan_clip("video", (write(tmp_path / name, ramp(3)[1]),), Options(nframes=8))
    assert plan.grid_thw[0] == 1 and plan.total_frames == 1 and "one picture where a video" in plan.notes[-1]
    assert np.abs(brightness(plan) - 127).max() < 3


def test_controls():
    frames = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 28, 56)
    patches, grid = to_patches(frames), (4, 2, 4)

    def shown(x):
        return x.view(4, -1, 3, 2, 196)[:, 0, 0, :, 0].flatten().tolist()

    backward, order = apply_control(patches, grid, "reversed", "a")
    assert shown(backward) == order == [7, 6, 5, 4, 3, 2, 1, 0]
    assert torch.equal(backward, to_patches(frames.flip(0)))
    shuffled, order = apply_control(patches, grid, "shuffled", "a")
    assert shown(shuffled) == order == apply_control(patches, grid, "shuffled", "a")[1]
    assert sorted(order) == list(range(8))
    orders = [apply_control(patches[:8], (2, 2, 2), "shuffled", str(i))[1] for i in range(40)]
    assert [0, 1, 2, 3] not in orders and [3, 2, 1, 0] not in orders
    blank, _ = apply_control(patches, grid, "blank", "a")
    assert normalise_patches(blank, torch.float32).abs().max() < 0.02
    assert shown(patches) == list(range(8))
    with pytest.raises(UserError, match="only two orders"):
        apply_control(patches[:4], (1, 2, 2), "shuffled", "a")

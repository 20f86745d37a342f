"""Which frames, what size, which pixels; and what a broken file says."""

import json
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import video
from config import VideoArgs
from model import UserError
from model.qwen import normalise_patches
from video import Options, apply_control, plan_clip, read_clip, smart_nframes, smart_resize, to_patches

FIXTURES = Path(__file__).parent / "fixtures" / "preprocess"  # made with qwen-vl-utils, see NOTICE
CASES = json.loads((FIXTURES / "cases.json").read_text())["cases"]


def write_clip(path, frames, fps=10, codec="libx264", pix_fmt="yuv420p", container=None, **codec_options):
    """frames: (H, W, 3) uint8 arrays."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = pix_fmt, codec_options
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return str(path)


def ramp(n, height=64, width=64):
    """Frame i is plain and of brightness i / (n - 1)."""
    return [np.full((height, width, 3), i * 255 // max(n - 1, 1), np.uint8) for i in range(n)]


def brightness(plan):
    """Mean of each planned frame."""
    x = read_clip(plan).view(plan.grid_thw[0], -1, 3, 2, 196).float()
    return x.mean((1, 2, 4)).flatten().numpy()


def test_a_file_still_open_from_planning_is_of_this_very_file(tmp_path):
    """Between plan and read a file is replaced: what is read is what lies there then."""
    dark, light = [np.full((64, 64, 3), grey, np.uint8) for grey in (20, 200)]
    path, other = write_clip(tmp_path / "a.mp4", [dark] * 8), write_clip(tmp_path / "b.mp4", [light] * 8)
    plan = plan_clip("video", (path,), Options())
    assert video.open_file.stream is not None and abs(brightness(plan) - 20).max() < 3
    assert video.open_file.stream is None and abs(brightness(plan) - 20).max() < 3  # opened again
    plan_clip("video", (path,), Options())
    os.replace(other, path)
    assert abs(brightness(plan) - 200).max() < 3


# -- Against the reference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_qwen_vl_utils(case):
    expected = np.load(FIXTURES / f"{case['name']}.npz")
    plan = plan_clip("video", (str(FIXTURES / f"{case['clip']}.mp4"),), Options(**case["options"]))
    assert list(plan.indices) == case["indices"]
    assert (list(plan.size), list(plan.grid_thw)) == (case["size"], case["grid_thw"])
    assert (plan.total_frames, plan.source_fps) == (case["total_frames"], case["source_fps"])
    assert (plan.sample_fps, plan.second_per_grid) == (case["sample_fps"], case["second_per_grid"])
    for name, i in (("first", 0), ("last", -1)):
        (frame,) = video.read_frames(plan.paths[0], [plan.indices[i]], [plan.seeks[i]], plan.size)
        difference = np.abs(frame.numpy().astype(int) - expected[name]).mean()
        assert difference < 0.2, f"{name} frame differs by {difference} of 255"
    patches = read_clip(plan)
    assert patches.shape == tuple(expected["shape"]) and patches.dtype == torch.uint8
    rows = normalise_patches(patches, torch.float32).numpy()
    assert np.abs(rows[expected["row_ids"]] - expected["rows"]).mean() < 0.2 / 255 / 0.26
    assert np.abs(rows.mean(0) - expected["mean"]).max() < 0.02


@pytest.mark.parametrize(
    "total, fps, options, expected",
    [
        (30, 30.0, dict(fps=1.0), 4),  # FPS_MIN_FRAMES
        (30, 30.0, dict(nframes=7), 8),  # round(3.5) is 4
        (30, 30.0, dict(nframes=5), 4),  # round(2.5) is 2
        (3, 30.0, dict(fps=60.0), 2),
        (100000, 25.0, dict(fps=2.0, max_frames=33), 32),
        (100, 25.0, dict(fps=1.0, min_frames=9), 10),
    ],
)
def test_number_of_frames(total, fps, options, expected):
    assert smart_nframes(total, fps, Options(**options)) == expected


@given(st.integers(2, 5000), st.floats(1, 120), st.floats(0.1, 60), st.integers(2, 64), st.integers(2, 768))
def test_number_of_frames_is_even_and_there(total, video_fps, fps, low, high):
    n = smart_nframes(total, video_fps, Options(fps=fps, min_frames=low, max_frames=max(low, high)))
    assert n % 2 == 0 and 2 <= n <= total and n <= max(low, high)
    indices = video.frame_indices(total, n)
    assert indices[0] == 0 and indices[-1] == total - 1 and indices == sorted(set(indices))


@pytest.mark.parametrize(
    "size, bounds, expected",
    [
        ((64, 64), (100352, 602112), (336, 336)),
        ((360, 640), (100352, 602112), (364, 644)),
        ((1080, 1920), (100352, 602112), (560, 1008)),
        ((198, 354), (3136, 50176), (140, 280)),
        ((360, 640), (3136, 25088), (112, 196)),
        ((70, 98), (1, 10**9), (56, 112)),  # 2.5 and 3.5 both round to even
        ((10, 10), (1, 10**9), (28, 28)),
        ((10, 2000), (1, 784 * 8), (28, 1120)),  # the short side stays 28
    ],
)
def test_sizes(size, bounds, expected):
    assert smart_resize(*size, *bounds) == expected


@pytest.mark.parametrize(
    "total, fps, start, end, expected",
    [
        (30, 10.0, None, None, (0, 30)),
        (30, 10.0, 1.0, 2.0, (10, 11)),  # 20 is the last
        (30, 10.0, 1.01, None, (11, 19)),
        (491, 22.29, 3.3, 7.7, (74, 98)),  # ceil(73.56), floor(171.63)
        (30, 10.0, None, 99.0, (0, 30)),
        (30, 10.0, 0, 0.1, (0, 2)),
    ],
)
def test_span(total, fps, start, end, expected):
    """As qwen-vl-utils' calculate_video_frame_range: rounded inwards, its last frame included."""
    assert video.frame_span(total, fps, Options(video_start=start, video_end=end)) == expected


def test_only_the_span_is_seen(tmp_path):
    path = write_clip(tmp_path / "a.mp4", ramp(60))
    plan = plan_clip("video", (path,), Options(fps=4.0, video_start=2.0, video_end=4.0))
    assert plan.indices == (20, 23, 26, 29, 31, 34, 37, 40) and (plan.times[0], plan.times[-1]) == (2.0, 4.0)
    assert plan.second_per_grid == 2 / (8 / 21 * 10)
    assert np.abs(brightness(plan) - np.array(plan.indices) * 255 / 59).max() < 4.2
    for start, end in ((4.0, 2.0), (5.9, None), (99.0, None)):
        with pytest.raises(UserError, match="a.mp4: video_start .* no two frames of its 6.00 seconds"):
            plan_clip("video", (path,), Options(video_start=start, video_end=end))
    with pytest.raises(UserError, match="need one video file"):
        plan_clip("image", (write_picture(tmp_path / "a.png", ramp(1)[0]),), Options(video_start=1.0))


# -- Options


def size_of(kind="video", source=(64, 64), n=8, **options):
    h, w, notes = video.frame_size(kind, *source, n, Options(**options))
    return (h, w), notes


def test_an_explicit_maximum_beats_the_default_minimum():
    assert size_of() == ((336, 336), [])  # the default minimum enlarges
    size, notes = size_of(max_pixels=4096)
    assert size == (56, 56) and "below the default minimum" in notes[0]
    assert size_of(max_pixels=100352)[0] == (308, 308)  # 336 x 336 would be above it
    assert size_of(max_pixels=784)[0] == (28, 28)
    assert size_of("image", max_pixels=800)[0] == (28, 28)


def test_other_bounds():
    assert size_of(min_pixels=3136)[0] == (56, 56)
    size, notes = size_of(source=(2000, 2000), max_pixels=10**6)
    assert size == (756, 756) and "lowered to 602112" in notes[0]
    assert size_of(source=(2000, 2000), n=768)[0] == (476, 476)  # all frames share 128000 * 784 * 0.9 pixels
    assert size_of(source=(2000, 2000), total_pixels=8 * 28**2 * 4)[0] == (308, 308)  # never below the minimum
    assert size_of("image", (5000, 4000))[0] == (4004, 3192)
    assert size_of("image", (20, 20))[0] == (56, 56)
    size, notes = size_of(resized_height=100, resized_width=30)
    assert size == (112, 28) and "rounded" in notes[0]
    assert size_of(resized_height=112, resized_width=28) == ((112, 28), [])


def test_options_of_an_item_overrule_the_scripts():
    args = VideoArgs(nframes=8, video_min_pixels=5000, video_max_pixels=6000, image_max_pixels=7000)

    def of(kind="video", **item):
        return Options.from_args(kind, args, item, "here")

    assert (of().nframes, of().min_pixels, of("image").max_pixels) == (8, 5000, 7000)
    assert (of(fps=4).fps, of(fps=4).nframes, of(sample_fps=3).fps) == (4, None, 3)
    assert (of(max_pixels=900).min_pixels, of(min_pixels=9000).max_pixels) == (900, 9000)
    for item, message in (
        (dict(fp=4), "unknown video option 'fp'"),
        (dict(fps=-1), "expected a number from 0.0001"),
        (dict(fps="2"), "expected a number"),
        (dict(nframes=10**400), "nframes is '10000"),
        (dict(fps=1e-300), "fps is '1e-300'"),
        (dict(min_frames=float("nan")), "min_frames is 'nan'"),
        (dict(fps=1, nframes=4), "both given"),
        (dict(min_pixels=9, max_pixels=8), "above max_pixels"),
        (dict(resized_height=28), "give both or none"),
    ):
        with pytest.raises(UserError, match=message):
            of(**item)
    with pytest.raises(UserError, match="min_pixels 5 is above max_pixels 4"):
        Options.from_args("video", VideoArgs(video_min_pixels=5, video_max_pixels=4), {}, "here")


# -- Reading

CONTAINERS = {
    "h264.mp4": {},
    "intra.mp4": dict(g="1", bf="0"),
    "mpeg4.avi": dict(codec="mpeg4", b="4000000"),
    "h264.mkv": {},
    "vp9.webm": dict(codec="libvpx-vp9"),
    "untimed.h264": {},  # packets without times: frames are counted
    "animation.gif": dict(codec="gif", pix_fmt="rgb8"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_are_those_asked_for(tmp_path, name):
    path = write_clip(tmp_path / name, ramp(60), **CONTAINERS[name])
    plan = plan_clip("video", (path,), Options(nframes=12))
    assert plan.total_frames == 60 and plan.indices == (0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59)
    assert np.allclose(plan.times, np.array(plan.indices) / plan.source_fps, atol=0.011)
    expected = np.array(plan.indices) * 255 / 59
    assert np.abs(brightness(plan) - expected).max() < 4.2, (brightness(plan), expected)  # frames are 4.3 apart or more


# MPEG transport and program streams are searched by decoding time. AVI holds no presentation times
B_FRAMES = {
    "short_gops.mp4": dict(g="7", bf="2"),
    "h264.avi": dict(g="7", bf="3", sc_threshold="0"),
    "one_keyframe.ts": dict(g="250", bf="3", sc_threshold="0"),
    "one_keyframe_hevc.ts": dict(codec="libx265", **{"x265-params": "keyint=250:bframes=3:scenecut=0:log-level=none"}),
    "one_keyframe.mpg": dict(codec="mpeg2video", fps=25, g="250", bf="2", b="4000000", sc_threshold="1000000000"),
}


def from_the_start(path):
    """(packets, mean of every frame): FFmpeg decodes the file without a seek."""
    with av.open(path) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    with av.open(path) as file:
        return packets, np.array([frame.to_ndarray(format="rgb24").mean() for frame in file.decode(video=0)])


def textured(n):
    """As ramp, in noise: MPEG program streams are searched in steps of some kilobytes."""
    noise = np.random.default_rng(0).integers(0, 100, (112, 112, 3), dtype=np.uint8)
    return [noise + np.uint8(i * 155 // (n - 1)) for i in range(n)]


@pytest.mark.parametrize("name", B_FRAMES)
def test_frames_are_those_of_decoding_all(tmp_path, name):
    path = write_clip(tmp_path / name, textured(60), **B_FRAMES[name])
    packets, means = from_the_start(path)
    keyframes = sum(packet.is_keyframe for packet in packets)
    assert keyframes == 1 if "one_keyframe" in name else keyframes > 5
    plan = plan_clip("video", (path,), Options(nframes=30, resized_height=112, resized_width=112))
    assert plan.total_frames == len(means) == 60
    assert np.abs(brightness(plan) - means[list(plan.indices)]).max() < 0.1


def test_a_stream_cut_at_its_head_begins_with_the_first_keyframe(tmp_path):
    """As a recording of a broadcast does: keyframes at 0 and 30, and the first 188-byte packets are gone."""
    data = Path(write_clip(tmp_path / "whole.ts", textured(60), g="30", bf="3", sc_threshold="0")).read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[len(data) // 4 // 188 * 188 :])
    path = str(tmp_path / "cut.ts")
    packets, means = from_the_start(path)
    assert 30 < len(packets) < 60 and not packets[0].is_keyframe
    plan = plan_clip("video", (path,), Options(nframes=10, resized_height=112, resized_width=112))
    assert plan.total_frames == len(means) == 30 and plan.times[0] == 0
    assert np.abs(brightness(plan) - means[list(plan.indices)]).max() < 0.1


def test_rotation_of_a_phone_is_applied(tmp_path):
    top = np.concatenate([np.full((32, 96, 3), 250, np.uint8), np.zeros((32, 96, 3), np.uint8)])
    path = Path(write_clip(tmp_path / "phone.mp4", [top] * 4))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    clockwise = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # by 90 degrees
    data[matrix : matrix + 36] = struct.pack(">9i", *clockwise)
    path.write_bytes(data)
    plan = plan_clip("video", (str(path),), Options(resized_height=84, resized_width=56))
    assert plan.source_size == (96, 64)
    frame = video.read_frames(str(path), plan.indices, plan.seeks, plan.size)[0].float()
    assert frame[..., 30:].mean() > 230 and frame[..., :26].mean() < 20


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
    assert plan_clip("video", paths, Options(fps=4.0)).second_per_grid == 0.5
    thinned = plan_clip("video", paths, Options(fps=4.0, nframes=2))
    assert thinned.indices == (0, 4) and thinned.sample_fps == 4.0 * 2 / 5
    still = plan_clip("image", paths[2:3], Options())
    assert still.grid_thw == (1, 4, 4) and still.second_per_grid == 0 and brightness(still).tolist() == [127, 127]


def test_tiff(tmp_path):
    """With tags that FFmpeg's decoder does not know; its own encoder writes one (296, ResolutionUnit)."""
    noise = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    picture = video.read_image(write_picture(tmp_path / "a.tif", noise))
    assert np.array_equal(picture.permute(1, 2, 0).numpy(), noise)


def test_transparent_pixels_lie_on_white(tmp_path):
    rgba = np.zeros((28, 28, 4), np.uint8)
    rgba[:14, :, 3] = 255
    picture = video.read_image(write_picture(tmp_path / "a.png", rgba, "rgba"))
    assert picture[:, :14].max() == 0 and picture[:, 14:].min() == 255


def test_patches_stand_in_blocks_of_four():
    t, h, w = np.meshgrid(np.arange(4), np.arange(56), np.arange(84), indexing="ij")
    frames = torch.from_numpy(np.stack([t, h, w], axis=1))
    rows = to_patches(frames).view(-1, 3, 2, 14, 14)
    corner = rows[:, :, 0, 0, 0].tolist()  # (frame, y, x) where each patch begins
    assert corner[:6] == [[0, 0, 0], [0, 0, 14], [0, 14, 0], [0, 14, 14], [0, 0, 28], [0, 0, 42]]
    assert corner[12] == [0, 28, 0] and corner[24] == [2, 0, 0]
    assert rows[0, 0, 1].eq(1).all() and rows[0, 1, 0, 3, 0] == 3 and rows[0, 2, 0, 0, 3] == 3


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


# -- Bad input


def broken_files(folder):
    """{name: what its error must say}, the files written to folder."""
    write_clip(folder / "good.mp4", ramp(30))
    write_clip(folder / "ahead.mp4", ramp(60, 128, 128), container={"movflags": "faststart"})
    write_clip(folder / "good.mkv", ramp(60, 128, 128))
    write_clip(folder / "one.mp4", ramp(1))
    write_clip(folder / "narrow.mp4", ramp(4, 2, 512))
    cuts = (("cut.mp4", "good.mp4", 0.5), ("cut_late.mp4", "ahead.mp4", 0.8), ("cut.mkv", "good.mkv", 0.5))
    for name, source, share in cuts:
        data = (folder / source).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])
    data = bytearray((folder / "ahead.mp4").read_bytes())
    rng = np.random.default_rng(0)
    for i in rng.integers(len(data) // 2, len(data), 300):
        data[i] = rng.integers(256)
    (folder / "damaged.mp4").write_bytes(data)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video\n" * 99)
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "audio.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with av.open(str(folder / "frameless.avi"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        file.start_encoding()
    return {
        "missing.mp4": "No such file",
        "empty.mp4": "empty file",
        "text.mp4": "no readable video",
        "damaged.mp4": "does not decode",
        "cut.mp4": "cut off",
        "cut_late.mp4": "cut off: .* promises 60",
        "cut.mkv": "cut off: .* promises 6.0",
        "folder.mp4": "not a regular file",
        "pipe.mp4": "not a regular file",
        "audio.mp4": "found audio",
        "frameless.avi": "0 frames",
        "one.mp4": "1 frame",
        "narrow.mp4": "ratio is above 200",
    }


def test_broken_files_say_what_is_wrong(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=message) as caught:
            read_clip(plan_clip("video", (str(tmp_path / name),), Options()))
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_picture_that_breaks_off(tmp_path, name):
    path = Path(write_picture(tmp_path / name, np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}: does not decode"):
        read_clip(plan_clip("image", (str(path),), Options()))


def test_limits_of_a_source(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", ramp(4))
    for name, value, message in (
        ("MAX_SOURCE_PIXELS", 64 * 63, "no readable video|does not decode"),
        ("MAX_SOURCE_SECONDS", 0.3, "0 seconds, 4 frames, above the limit"),
        ("MAX_SOURCE_FRAMES", 3, "0 seconds, 4 frames, above the limit"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"a.mp4: .*({message})"):
            patch.setattr(video, name, value)
            plan_clip("video", (path,), Options())

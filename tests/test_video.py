"""Which frames, what size, which pixels; and what a broken file says."""

import json
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from config import VideoArgs
from dataset import reader, video
from dataset.video import Options, apply_control, plan_clip, read_clip, smart_nframes, smart_resize, to_patches
from model import UserError
from model.qwen import normalise_patches

FIXTURES = SHARED / "fixtures" / "preprocess"
CASES = json.loads((FIXTURES / "cases.json").read_text())["cases"] if FIXTURES.exists() else []


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


def assert_ramp(plan):
    expected = np.array(plan.indices) * 255 / (plan.total_frames - 1)
    assert np.abs(brightness(plan) - expected).max() < 4.2, (brightness(plan), expected)  # frames are 4.3 apart or more


def test_a_container_kept_from_planning_is_of_this_very_file(tmp_path):
    """Between plan and read a file is written anew: what is read is what lies there then."""
    dark, light = [np.full((64, 64, 3), grey, np.uint8) for grey in (20, 200)]
    path, other = write_clip(tmp_path / "a.mp4", [dark] * 8), write_clip(tmp_path / "b.mp4", [light] * 8)
    plan = plan_clip("video", (path,), Options())
    assert reader.kept.media is not None and abs(brightness(plan) - 20).max() < 3
    assert reader.kept.media is None and abs(brightness(plan) - 20).max() < 3  # opened again
    plan_clip("video", (path,), Options())
    os.replace(other, path)
    assert abs(brightness(plan) - 200).max() < 3
    plan_clip("video", (path,), Options())
    os.remove(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_clip(plan)


# -- Against the reference


@pytest.mark.skipif(not CASES, reason="no reference outputs beside the repository")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_qwen_vl_utils(case):
    expected = np.load(FIXTURES / f"{case['name']}.npz")
    plan = plan_clip("video", (str(SHARED / "video" / f"{case['clip']}.mp4"),), Options(**case["options"]))
    assert list(plan.indices) == case["indices"]
    assert (list(plan.size), list(plan.grid_thw)) == (case["size"], case["grid_thw"])
    assert (plan.total_frames, plan.source_fps) == (case["total_frames"], case["source_fps"])
    assert (plan.sample_fps, plan.second_per_grid) == (case["sample_fps"], case["second_per_grid"])
    for name, i in (("first", 0), ("last", -1)):
        (frame,) = reader.read_frames(plan.paths[0], [plan.indices[i]], [plan.seeks[i]], plan.size)
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
        (30, 30.0, dict(fps=8.0), 8),
        (23, 5.0, dict(fps=2.0), 8),
        (491, 22.29, dict(fps=1.0), 22),
        (491, 22.29, dict(nframes=16), 16),
        (30, 30.0, dict(nframes=7), 8),  # round(3.5) is 4
        (30, 30.0, dict(nframes=5), 4),  # round(2.5) is 2
        (5, 30.0, dict(fps=60.0), 4),
        (3, 30.0, dict(fps=60.0), 2),
        (100000, 25.0, dict(fps=2.0), 768),
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


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 400), st.floats(1.2, 50))
def test_sizes_keep_bounds_and_shape(h, w, cells, ratio):
    low, high = cells * 784, int(cells * 784 * ratio)
    if max(h, w) > 200 * min(h, w):
        with pytest.raises(UserError, match="ratio"):
            smart_resize(h, w, low, high)
        return
    h2, w2 = smart_resize(h, w, low, high)
    assert h2 % 28 == 0 and w2 % 28 == 0 and min(h2, w2) >= 28
    if min(h2, w2) > 28:  # a side of 28 cannot shrink further
        assert h2 * w2 <= max(high, low * 4) and h2 * w2 >= min(low, high / 4)


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
        return Options.of(kind, args, item, "here")

    assert (of().nframes, of().min_pixels, of("image").max_pixels) == (8, 5000, 7000)
    assert (of(fps=4).fps, of(fps=4).nframes, of(sample_fps=3).fps) == (4, None, 3)
    assert (of(max_pixels=900).min_pixels, of(min_pixels=9000).max_pixels) == (900, 9000)
    for item, told in (
        (dict(fp=4), "unknown video option 'fp'"),
        (dict(fps=-1), "above 0"),
        (dict(fps="2"), "above 0"),
        (dict(fps=1, nframes=4), "both given"),
        (dict(min_pixels=9, max_pixels=8), "above max_pixels"),
        (dict(resized_height=28), "give both or none"),
    ):
        with pytest.raises(UserError, match=told):
            of(**item)
    with pytest.raises(UserError, match="min_pixels 5 is above max_pixels 4"):
        Options.of("video", VideoArgs(video_min_pixels=5, video_max_pixels=4), {}, "here")


# -- Reading

CONTAINERS = {
    "h264.mp4": {},
    "short_gops.mp4": dict(g="5", bf="3"),
    "intra.mp4": dict(g="1", bf="0"),
    "mpeg4.avi": dict(codec="mpeg4", b="4000000"),
    "h264.mkv": {},
    "vp9.webm": dict(codec="libvpx-vp9"),
    "untimed.h264": {},  # packets without times: the slow twin
    "animation.gif": dict(codec="gif", pix_fmt="rgb8"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_are_those_asked_for(tmp_path, name):
    path = write_clip(tmp_path / name, ramp(60), **CONTAINERS[name])
    plan = plan_clip("video", (path,), Options(nframes=12))
    assert plan.total_frames == 60 and plan.indices == (0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59)
    assert np.allclose(plan.times, np.array(plan.indices) / plan.source_fps, atol=0.011)
    assert_ramp(plan)


# One keyframe, B-frames behind it. Transport and program streams are searched by decoding time, which is earlier
ONE_KEYFRAME = {
    "h264.ts": dict(g="250", bf="3", sc_threshold="0"),
    "hevc.ts": dict(codec="libx265", **{"x265-params": "keyint=250:bframes=3:scenecut=0:log-level=none"}),
    "mpeg2.mpg": dict(codec="mpeg2video", fps=25, g="250", bf="2", b="4000000", sc_threshold="1000000000"),
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


@pytest.mark.parametrize("name", ONE_KEYFRAME)
def test_streams_with_one_keyframe(tmp_path, name):
    path = write_clip(tmp_path / name, textured(60), **ONE_KEYFRAME[name])
    packets, means = from_the_start(path)
    assert sum(packet.is_keyframe for packet in packets) == 1 and packets[0].dts < packets[0].pts
    plan = plan_clip("video", (path,), Options(nframes=12, resized_height=112, resized_width=112))
    assert plan.total_frames == len(means) == 60
    assert np.abs(brightness(plan) - means[list(plan.indices)]).max() < 0.1


def test_h264_with_b_frames_in_avi(tmp_path):
    """AVI holds no presentation times, and those that FFmpeg gives such packets are in decoding order."""
    path = write_clip(tmp_path / "a.avi", textured(60), g="7", bf="3", sc_threshold="0")
    packets, means = from_the_start(path)
    assert [packet.pts for packet in packets] == sorted(packet.pts for packet in packets)
    plan = plan_clip("video", (path,), Options(nframes=30, resized_height=112, resized_width=112))
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


def test_seeking_equals_decoding_all(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (32, 48, 3), dtype=np.uint8) for _ in range(40)]
    path = write_clip(tmp_path / "noise.mp4", noise, g="7", bf="2")
    plan = plan_clip("video", (path,), Options(nframes=10, max_pixels=3136))
    fast = reader.read_frames(path, plan.indices, plan.seeks, plan.size)
    slow = reader.read_frames(path, plan.indices, (), plan.size)
    assert len({keyframe for keyframe, _ in plan.seeks}) > 3
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_rotation_of_a_phone_is_applied(tmp_path):
    top = np.concatenate([np.full((32, 96, 3), 250, np.uint8), np.zeros((32, 96, 3), np.uint8)])
    path = tmp_path / "phone.mp4"
    write_clip(path, [top] * 4)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    clockwise = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # by 90 degrees
    data[matrix : matrix + 36] = struct.pack(">9i", *clockwise)
    path.write_bytes(data)
    plan = plan_clip("video", (str(path),), Options(resized_height=84, resized_width=56))
    assert plan.source_size == (96, 64)
    frame = reader.read_frames(str(path), plan.indices, plan.seeks, plan.size)[0].float()
    assert frame[..., 30:].mean() > 230 and frame[..., :26].mean() < 20


def test_images_and_lists_of_frames(tmp_path):
    png = dict(codec="png", pix_fmt="rgb24")
    png["container"] = {"update": "1"}  # one file, whatever its name
    paths = tuple(write_clip(tmp_path / f"{i}%02d.png", [frame], **png) for i, frame in enumerate(ramp(5)))
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
    path = write_clip(tmp_path / "a.tif", [noise], codec="tiff", pix_fmt="rgb24", container={"update": "1"})
    assert np.array_equal(reader.read_image(path).permute(1, 2, 0).numpy(), noise)
    assert plan_clip("image", (path,), Options()).size == (56, 84)


def test_transparent_pixels_lie_on_white(tmp_path):
    rgba = np.zeros((28, 28, 4), np.uint8)
    rgba[:14, :, 3] = 255
    with av.open(str(tmp_path / "a.png"), "w", options={"update": "1"}) as file:
        stream = file.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 28, 28, "rgba"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        file.mux(stream.encode())
    picture = reader.read_image(str(tmp_path / "a.png"))
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
    for name, told in broken_files(tmp_path).items():
        with pytest.raises(UserError, match=told) as caught:
            read_clip(plan_clip("video", (str(tmp_path / name),), Options()))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_damage_inside_a_file(tmp_path):
    write_clip(tmp_path / "a.mp4", ramp(60, 240, 320), container={"movflags": "faststart"})
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(len(data) // 2, len(data), 300):
        data[place] = rng.integers(256)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(UserError, match="a.mp4: does not decode"):
        read_clip(plan_clip("video", (str(tmp_path / "a.mp4"),), Options()))


PICTURES = [("png", "rgb24", "a.png"), ("mjpeg", "yuvj420p", "a.jpg"), ("tiff", "rgb24", "a.tif")]


@pytest.mark.parametrize("codec, pix_fmt, name", PICTURES)
def test_a_picture_that_breaks_off(tmp_path, codec, pix_fmt, name):
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    write_clip(tmp_path / name, [noise], codec=codec, pix_fmt=pix_fmt, container={"update": "1"})
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name}: does not decode"):
        read_clip(plan_clip("image", (str(tmp_path / name),), Options()))


def test_absurd_sizes_are_refused_unread(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", ramp(4))
    clip = ("video", (path,), Options())
    monkeypatch.setattr(reader, "MAX_VIDEO_PIXELS", 64 * 63)
    with pytest.raises(UserError, match="64 x 64 pixels, above the limit of 4032"):
        plan_clip(*clip)
    with pytest.raises(UserError, match="64 x 64 pixels, above the limit of 4032"):
        reader.read_frames(path, [0], [], (28, 28))
    monkeypatch.undo()
    monkeypatch.setattr(reader, "MAX_SOURCE_SECONDS", 0.3)
    with pytest.raises(UserError, match="seconds long, above the limit"):
        plan_clip(*clip)
    monkeypatch.undo()
    monkeypatch.setattr(reader, "MAX_SOURCE_FRAMES", 3)
    with pytest.raises(UserError, match="4 frames long, above the limit of 3"):
        plan_clip(*clip)
    monkeypatch.undo()
    monkeypatch.setattr(reader, "FILE_SECONDS", -1.0)
    with pytest.raises(UserError, match="takes longer than"):
        plan_clip(*clip)


def test_more_frames_than_announced(tmp_path, monkeypatch):
    """Matroska does not say how many it has: they are counted on the way."""
    path = write_clip(tmp_path / "a.mkv", ramp(6))
    assert plan_clip("video", (path,), Options()).total_frames == 6
    monkeypatch.setattr(reader, "MAX_SOURCE_FRAMES", 5)
    with pytest.raises(UserError, match="more than 5 frames"):
        plan_clip("video", (path,), Options())
    with pytest.raises(UserError, match="more than 5 frames"):
        reader.count_frames(path)


def test_claims_of_60000_pixels_and_a_billion_frames(tmp_path, monkeypatch):
    """Files of some hundred bytes; nothing of theirs reaches a decoder."""
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + bytes(100))
    (tmp_path / "a.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(100))
    data = bytearray(open(write_clip(tmp_path / "a.mp4", ramp(8)), "rb").read())
    at = data.index(b"stsz")  # one size for all, and how many there are: ISO 14496-12
    data[at + 8 : at + 16] = struct.pack(">II", 1, 10**9)
    at = data.index(b"stts")
    data[at + 12 : at + 16] = struct.pack(">I", 10**9)
    (tmp_path / "a.mp4").write_bytes(data)
    monkeypatch.setattr(reader, "decoded", None)
    for name, kind, told in (
        ("a.png", "image", "60000 x 60000 pixels, above the limit"),
        ("a.gif", "image", "60000 x 60000 pixels, above the limit"),
        ("a.gif", "video", "60000 x 60000 pixels, above the limit"),
        ("a.mp4", "video", "1000000000 frames long, above the limit"),
    ):
        with pytest.raises(UserError, match=f"{name}: {told}"):
            plan_clip(kind, (str(tmp_path / name),), Options())

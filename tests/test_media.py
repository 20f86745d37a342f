"""Files of every kind: the frames are those that FFmpeg gives without a seek, pictures those that Pillow opens, and
what is not read is refused with the true reason."""

import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import cases, refused
from PIL import Image
from test_video import brightness, ramp, write_clip, write_picture

from reader import index_frames, read_frames, read_image
from video import Options, plan_clip, read_clip

FIXTURES = Path(__file__).parent / "fixtures" / "media"

# -- Streams

# MPEG transport and program streams are searched by decoding time. AVI holds no presentation times, a raw stream none
STREAMS = dict(cases("streams"))  # file -> options of write_clip


def from_the_start(path):
    """(keyframes, mean of every frame): FFmpeg decodes the file without a seek."""
    with av.open(path) as file:
        keyframes = [packet.is_keyframe for packet in file.demux(video=0) if packet.size]
    with av.open(path) as file:
        return keyframes, np.array([frame.to_ndarray(format="rgb24").mean() for frame in file.decode(video=0)])


def textured(n):
    """As ramp, in noise: MPEG program streams are searched in steps of some kilobytes."""
    noise = np.random.default_rng(0).integers(0, 100, (112, 112, 3), dtype=np.uint8)
    return [noise + np.uint8(i * 155 // (n - 1)) for i in range(n)]


@pytest.mark.parametrize("name", STREAMS)
def test_frames_are_those_of_decoding_all(tmp_path, name):
    """cut: as a recording of a broadcast, whose first packets are gone; it begins with the second keyframe."""
    if STREAMS[name].get("codec") not in {None, *av.codecs_available}:
        pytest.skip("PyAV without this encoder")
    path = Path(write_clip(tmp_path / name, textured(60), **STREAMS[name]))
    is_cut, data = name.startswith("cut"), path.read_bytes()
    if is_cut:
        packet = 188 if name == "cut.ts" else 2048
        path.write_bytes(data[len(data) // 4 // packet * packet :])
    keyframes, means = from_the_start(str(path))
    assert keyframes[0] != is_cut and (sum(keyframes) == 1 or "one_keyframe" not in name)
    plan = plan_clip("video", (str(path),), Options(nframes=30, resized_height=112, resized_width=112))
    assert plan.total_frames == len(means) == (30 if is_cut else 60) and not plan.notes
    assert plan.source_fps == STREAMS[name].get("fps", 10)  # as it was written, in a raw stream too
    assert np.allclose(plan.times, np.array(plan.indices) / plan.source_fps, atol=0.011)
    for some in (plan, replace(plan, indices=plan.indices[2:], seeks=plan.seeks[2:])):  # without the first ones too
        assert np.abs(brightness(some) - means[list(some.indices)]).max() < 0.1


def test_a_varying_frame_rate_is_noted(tmp_path):
    """The times are the true ones; the time ids cannot be. A slide show's header names any rate."""
    ticks = [*range(30), *range(30, 120, 6)]  # 30 frames in a second, then 15 in three seconds
    plan = plan_clip("video", (write_clip(tmp_path / "a.mp4", ramp(45), 30, ticks=ticks),), Options(nframes=6))
    assert np.allclose(plan.times, [ticks[i] / 30 for i in plan.indices], atol=1e-3) and plan.total_frames == 45
    assert "the frame rate varies" in plan.notes[0] and "counts as one of" in plan.notes[0]
    for name, codec in (("a.webm", "libvpx-vp9"), ("a.ts", "libx264"), ("a.avi", "mpeg4")):  # AVI: in empty packets
        path = write_clip(tmp_path / name, ramp(10), 30, codec, ticks=range(0, 900, 90))
        slides = plan_clip("video", (path,), Options())
        assert slides.source_fps == pytest.approx(1 / 3) and slides.times[-1] == 27 and not slides.notes[1:]


def test_of_several_streams_the_largest(tmp_path):
    """Beside one of depth in grey, as of a range camera."""
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        streams = [
            file.add_stream("ffv1", rate=10, width=w, height=56, pix_fmt=p) for w, p in ((28, "gray"), (84, "bgr0"))
        ]
        for stream in streams:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(ramp(1, 56, stream.width)[0], format="rgb24")))
            file.mux(stream.encode())
    assert index_frames(str(tmp_path / "a.mkv")).size == (56, 84)


QUADRANTS = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((32, 48), np.uint8))
# What a display matrix (a, b, c, d) makes of them, by its definition: (x, y) is shown at (a x + c y, b x + d y)
MATRICES = {
    (1, 0, 0, 1): [[0, 80], [160, 240]],
    (-1, 0, 0, 1): [[80, 0], [240, 160]],  # mirrored left to right
    (1, 0, 0, -1): [[160, 240], [0, 80]],  # upside down
    (-1, 0, 0, -1): [[240, 160], [80, 0]],
    (0, 1, -1, 0): [[160, 0], [240, 80]],  # turned clockwise, as phones write it
    (0, -1, 1, 0): [[80, 240], [0, 160]],
    (0, 1, 1, 0): [[0, 160], [80, 240]],  # transposed
    (0, -1, -1, 0): [[240, 80], [160, 0]],
}


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_turned_and_mirrored_clips(tmp_path, matrix):
    path = Path(write_clip(tmp_path / "phone.mp4", [np.repeat(QUADRANTS[..., None], 3, 2)] * 4))
    data, (a, b, c, d) = bytearray(path.read_bytes()), (value << 16 for value in matrix)
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    index = index_frames(str(path))
    assert index.size == ((64, 96) if matrix[0] else (96, 64))
    (frame,) = read_frames(str(path), index.seeks[1:2], index.size)
    h, w = index.size
    shown = [[int(frame[0, y, x]) for x in (w // 4, 3 * w // 4)] for y in (h // 4, 3 * h // 4)]
    assert np.abs(np.array(shown) - MATRICES[matrix]).max() < 6


# -- Pictures

H, W = 120, 160
Y, X = np.mgrid[:H, :W]
COLOURS = np.stack([127 + 127 * np.sin(X / 9), 127 + 127 * np.sin(Y / 7 + 1), 127 + 127 * np.cos((X + Y) / 11)], -1)
COLOURS = COLOURS.astype(np.uint8)
FADING = np.dstack([COLOURS, (2 * X % 256).astype(np.uint8)])
EXIF = Image.Exif()
EXIF[274] = 6  # to be turned, which qwen-vl-utils does not do either
RGB, RGBA = Image.fromarray(COLOURS), Image.fromarray(FADING)
PICTURES = {  # name -> picture, options of Pillow's save, largest mean error
    "rgb.png": (RGB, {}, 0),
    "grey.png": (RGB.convert("L"), {}, 0),
    "bits.png": (RGB.convert("1"), {}, 0),
    "rgba.png": (RGBA, {}, 0.51),
    "grey_alpha.png": (RGBA.convert("LA"), {}, 0.51),
    "palette.png": (RGB.convert("P"), dict(transparency=3), 0),
    "one_clear_colour.png": (RGB, dict(transparency=tuple(COLOURS[5, 5].tolist())), 0),
    "turned.png": (RGB, dict(exif=EXIF), 0),
    "dpi.tif": (RGB, dict(dpi=(72, 72)), 0),
    "rgba.tif": (RGBA, {}, 0.51),
    "a.bmp": (RGB, {}, 0),
    "a.ppm": (RGB, {}, 0),
    "444.jpg": (RGB, dict(quality=90, subsampling=0), 0.1),
    "422.jpg": (RGB, dict(quality=90, subsampling=1), 0.5),
    "420.jpg": (RGB, dict(quality=90, subsampling=2), 0.5),
    "turned.jpg": (RGB, dict(quality=90, subsampling=0, exif=EXIF), 0.1),
    "progressive.jfif": (RGB, dict(format="JPEG", progressive=True), 0.5),
    "lossy.webp": (RGB, dict(quality=90), 0.5),
    "alpha.webp": (RGBA, dict(quality=90), 1.0),
    "420.avif": (RGB, dict(quality=90), 0.5),
    "odd.jpg": (RGB.crop((0, 0, 159, 119)), dict(quality=90), 0.5),
    "odd_alpha.webp": (RGBA.crop((0, 0, 159, 119)), dict(quality=90), 1.0),
    "odd.avif": (RGB.crop((0, 0, 160, 119)), dict(quality=90), 0.5),
}


def on_white(picture):
    """(H, W, 3) of a Pillow image, transparent pixels laid on white."""
    rgba = np.asarray(picture.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_those_of_pillow(tmp_path, name):
    picture, options, most = PICTURES[name]
    picture.save(tmp_path / name, **options)
    mine = read_image(str(tmp_path / name)).permute(1, 2, 0).numpy()
    assert mine.shape[:2] == (picture.height, picture.width)
    assert np.abs(mine - on_white(Image.open(tmp_path / name))).mean() <= most


# -- What is refused


def write_broken_files(folder):
    for name, options in (
        ("mp4.mp4", {}),
        ("ahead.mp4", dict(container={"movflags": "faststart"})),
        ("mkv.mkv", {}),
        ("pieces.mp4", dict(g="10", container={"movflags": "frag_keyframe+empty_moov"})),
    ):
        data = Path(write_clip(folder / name, ramp(60, 128, 128), **options)).read_bytes()
        (folder / f"cut_{name}").write_bytes(data[: int(len(data) * (0.5 if name in ("mp4.mp4", "mkv.mkv") else 0.8))])
    data, rng = bytearray((folder / "ahead.mp4").read_bytes()), np.random.default_rng(0)
    for i in rng.integers(len(data) // 2, len(data), 300):
        data[i] = rng.integers(256)
    texts = {"empty.mp4": "", "text.mp4": "no video\n" * 99, "text.txt": "drawn by FFmpeg\n" * 99}
    texts["list.txt"] = "ffconcat version 1.0\nfile 'mp4.mp4'\n"
    files = {name: text.encode() for name, text in texts.items()} | {"damaged.mp4": data}
    for name, content in (files | {"tiled.avif": (FIXTURES / "tiled.avif").read_bytes()}).items():
        (folder / name).write_bytes(content)
    for name in ("half.png", "half.jpg", "half.tif"):
        path = Path(write_picture(folder / name, np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "audio.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        file.mux(stream.encode(silence))
        file.mux(stream.encode())
    RGBA.save(folder / "alpha.avif")
    RGB.save(folder / "jpeg.tif", compression="jpeg")
    RGB.save(folder / "animated.webp", save_all=True, append_images=[RGB.rotate(90)], duration=100)


def test_broken_files_say_what_is_wrong(tmp_path):
    write_broken_files(tmp_path)
    for name, message in cases("broken"):
        kind = "video" if name.endswith((".mp4", ".mkv", ".avi", ".txt")) else "image"
        said = refused(lambda path, kind=kind: read_clip(plan_clip(kind, (path,), Options())), str(tmp_path / name))
        assert name in said and re.search(message, said), said

"""Frames of clips for people: strips on a page, GIFs for TensorBoard and wandb.

Decoded with PyAV (no torch) and kept for the next page. A clip that cannot be read is told in its place.
"""

import base64
import functools
import os
import stat
import time
from html import escape
from pathlib import Path

import av
import numpy as np

from drawing.preview import write_gif

FRAMES = 8  # of a strip
SIDE = 112  # pixels, longest side of a frame in the page
MAX_PIXELS = 8192 * 8192  # of a source frame; larger ones are not decoded for a picture
SEQUENTIAL = 120_000_000  # pixels of a whole clip up to which it is decoded from end to end; else keyframes only
BUDGET = 1.0  # seconds a page may spend on decoding clips
GIF_SIDE, GIF_FPS = 224, 4  # pixels, longest side; frames a second


def clip_folders(config: dict) -> list[Path]:
    """Where the clips of a run with this config may lie: image_folder, videos/ beside the data, beside the data."""
    found = [Path(config["image_folder"])] if isinstance(config.get("image_folder"), str) else []
    for name in ("data_path", "eval_data_path"):
        if isinstance(config.get(name), str) and config[name]:
            found += [Path(config[name]).parent / "videos", Path(config[name]).parent]
    return list(dict.fromkeys(found))


def media_path(name: str, folders: list[Path]) -> Path | None:
    """The regular file that a record's video means: in one of the folders, or as it is."""
    for path in (*(folder / name for folder in folders), Path(name)):
        try:
            if stat.S_ISREG(path.stat().st_mode):
                return path
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            continue
    return None


def file_names(video) -> list[str]:
    """The files that a record's `video` names: one, or the frames of a clip."""
    while isinstance(video, list) and len(video) == 1:  # one video of several, or the list of its frames
        video = video[0]
    return [name for name in (video if isinstance(video, list) else [video]) if isinstance(name, str) and name]


@functools.lru_cache(512)
def strip(path: Path, _stamp: float) -> list[tuple[float, str]]:
    """[(seconds, JPEG as data URL)] of FRAMES frames spread over the clip. Raises av.FFmpegError or OSError."""
    return [(at, jpeg(picture)) for at, picture in pictures(path, SIDE)]


def pictures(path: Path, side: int) -> list[tuple[float, np.ndarray]]:
    """[(seconds, (H, W, 3) uint8)] of FRAMES frames, at most `side` pixels a side. Raises av.FFmpegError or OSError."""
    # the absolute path and the whitelist keep names like "concat:..." and playlists from opening anything else
    options = {"protocol_whitelist": "file", "pattern_type": "none"}
    with av.open(os.path.abspath(path), timeout=5.0, options=options, metadata_errors="replace") as container:
        if not container.streams.video:
            return []
        stream = container.streams.video[0]
        pixels = stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
        if not 0 < pixels <= MAX_PIXELS:
            return []
        stream.codec_context.thread_count = 1
        whole = 0 < stream.frames and stream.frames * pixels <= SEQUENTIAL
        frames = every(container, stream) if whole else keyframes(container, stream)
        return [(float(frame.time or 0), shrunk(frame, side)) for frame in frames]


def every(container, stream):
    """FRAMES frames, evenly spread, by decoding all of a short clip."""
    count = stream.frames
    wanted = {int(i) for i in np.linspace(0, count - 1, min(FRAMES, count)).round()}
    return (frame for i, frame in enumerate(container.decode(stream)) if i in wanted)


def keyframes(container, stream):
    """Of a long clip: the keyframes at or before FRAMES evenly spread times; fewer if they share one."""
    stream.codec_context.skip_frame = "NONKEY"
    seconds, seen = (container.duration or 0) / av.time_base, set()
    for at in np.linspace(0, seconds, FRAMES, endpoint=False):
        container.seek(int(at * av.time_base))
        frame = next(container.decode(stream), None)
        if frame is not None and frame.pts not in seen:
            seen.add(frame.pts)
            yield frame


def shrunk(frame, side: int) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8, at most `side` pixels a side, the right way up."""
    scale = min(1.0, side / max(frame.width, frame.height))
    rgb = frame.reformat(max(2, int(frame.width * scale)), max(2, int(frame.height * scale)), "rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))


def jpeg(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URL."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.framerate = *picture.shape[:2], "yuvj444p", 1
    codec.options = {"qmin": "2", "qmax": "3"}
    image = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuvj444p")
    data = b"".join(bytes(packet) for packet in [*codec.encode(image), *codec.encode(None)])
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


class Strips:
    """Frames for cards, until the page's time for them is used up."""

    def __init__(self, folders: list[Path]):
        self.folders, self.spent = folders, 0.0

    def html(self, video) -> str:
        names = file_names(video)
        if not names:
            return ""
        began, found = time.perf_counter(), []
        told = f'<p class="soft">{escape(names[0])}: '
        if self.spent > BUDGET:
            return told + "frames left out, the page had used up its time for decoding</p>"
        try:
            for name in names[:: max(1, -(-len(names) // FRAMES))]:
                path = media_path(name, self.folders)
                if path is None:
                    return told + "no such file</p>"
                found += strip(path, path.stat().st_mtime)
        except (av.FFmpegError, OSError) as error:
            return told + f"cannot be decoded ({escape(str(error.strerror))})</p>"
        finally:
            self.spent += time.perf_counter() - began
        items = (f'<li><img src="{url}" alt="frame at {at:.2f} s">{at:.2f} s</li>' for at, url in found)
        return f'<ol class="strip">{"".join(items)}</ol>' if found else told + "no frames</p>"


def gif(video, folders: list[Path], out: Path) -> str:
    """Write FRAMES frames of a record's `video` as an animated GIF. Returns why it cannot be, or ""."""
    names, found = file_names(video), []
    try:
        for name in names[:: max(1, -(-len(names) // FRAMES))]:
            path = media_path(name, folders)
            if path is None:
                return f"{name}: no such file"
            found += [picture for _, picture in pictures(path, GIF_SIDE)]
    except (av.FFmpegError, OSError) as error:
        return f"{names[0]}: cannot be decoded ({error.strerror})"
    if len({picture.shape for picture in found}) != 1:
        return f"{names[0] if names else 'no clip'}: {'frames of several sizes' if found else 'no frames'}"
    write_gif(out, np.stack(found), GIF_FPS)
    return ""

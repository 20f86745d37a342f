"""A media file -> its frames' times, chosen frames, pictures, through PyAV. What to choose is video.py's duty.

Only what is needed is decoded: packet headers tell every frame's time and the keyframes, and reading seeks to the
keyframe before each run of chosen frames. Frames are resized one by one, so memory holds one at full size. The rotation
that phones write into a video is applied; an image's EXIF orientation is not (qwen-vl-utils does not either).

C = 3 colours, H and W pixels.
"""

import base64
import os
import re
import stat
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch import Tensor

from model import UserError

# Refused before anything is decoded: the largest are a scan of a poster and a day of surveillance
MAX_SOURCE_PIXELS = 16384 * 16384
MAX_SOURCE_SECONDS = 24 * 3600
OPEN_TIMEOUT = 30.0  # seconds a file may block while it is opened or read, e.g. on a dead network disk

# Above this size a frame takes long enough that threads inside the decoder pay; below, starting them costs more than
# decoding a short clip does (and several clips are decoded side by side anyway)
THREADED_PIXELS = 1280 * 720
RESIZED_BYTES = 1 << 20  # of frames at full size held back, to resize them in one call


@dataclass(frozen=True)
class Packets:
    """The frames of a video file in presentation order, from its packet headers."""

    size: tuple[int, int]  # H, W as shown, after rotation
    fps: float
    pts: list[int]  # sorted
    keyframes: list[int]  # sorted pts of frames that decode alone; none if the container does not time its packets
    time_base: float

    def seek(self, i: int) -> tuple[int, int]:
        """(time of the last keyframe up to frame i, its own time)"""
        return self.keyframes[max(0, bisect_right(self.keyframes, self.pts[i]) - 1)], self.pts[i]


def check_file(path: str) -> os.stat_result:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the name and image_folder") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a regular file; expected a video, image or list of images")
    if found.st_size == 0:
        raise UserError(f"{path}: empty file (0 bytes); download or write it again")
    return found


class InlineFiles:
    """Clips that stand inside their records as data:…;base64,… addresses, as files; gone when the process ends."""

    def __init__(self):
        self.folder, self.lock = None, threading.Lock()

    def file(self, address: str, where: str) -> str:
        """The file with the bytes of `address`, written once however often it is asked for."""
        head, _, text = address.partition(",")
        suffix = re.sub(r"\W", "", head.partition("/")[2].partition(";")[0])
        name = f"{blake2b(address.encode(), digest_size=16).hexdigest()}.{suffix}"
        with self.lock:  # threads share the folder
            self.folder = self.folder or tempfile.TemporaryDirectory(prefix="inline_clips_")
            path = Path(self.folder.name) / name
            if not path.exists():
                try:
                    path.write_bytes(base64.b64decode(text, validate=True))
                except ValueError as error:
                    told = f"{where}: {address[:40]}… is not base64 ({error})"
                    raise UserError(f"{told}; encode the file again") from None
        return str(path)


inline = InlineFiles()


def open_media(path: str):
    """An av container of a local file. UserError when it is none."""
    check_file(path)
    try:  # the absolute path and the whitelist keep names like "concat:..." and playlists from opening anything else
        options = {"protocol_whitelist": "file", "pattern_type": "none"}
        return av.open(os.path.abspath(path), timeout=OPEN_TIMEOUT, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        told = f"{path}: no readable video or image ({error.strerror})"
        raise UserError(f"{told}; it may be cut off or of another type") from None


class Kept(threading.local):
    """The container that a thread opened last, until it opens another: a clip is planned and then read, and opening a
    small one takes as long as decoding it."""

    key = container = None

    def keep(self, key: tuple, container) -> None:
        """key: identity(path) before it was opened."""
        if self.container is not None:
            self.container.close()
        self.key, self.container = key, container

    def take(self, path: str):
        """The container kept, if it is of this very file; else it is closed, and None comes back."""
        found, self.container = self.container, None
        if found is not None and self.key != identity(path):
            found = found.close()
        return found


kept = Kept()


def identity(path: str) -> tuple:
    """What tells one state of a file from another."""
    found = check_file(path)
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def video_stream(container, path: str):
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        found = ", ".join(s.type for s in container.streams) or "nothing"
        raise UserError(f"{path}: no video in this file, found {found}; expected a video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise UserError(f"{path}: no decoder for this video's codec; convert it to h264")
    height, width = stream.codec_context.height, stream.codec_context.width
    if height * width > MAX_SOURCE_PIXELS:
        raise UserError(f"{path}: {width} x {height} pixels, above the limit of {MAX_SOURCE_PIXELS}; scale it down")
    return stream


def read_packets(path: str) -> Packets:
    """Times and keyframes of all frames, without decoding. UserError for a broken, cut off or frameless file."""
    key, container = identity(path), open_media(path)
    try:
        stream = video_stream(container, path)
        seconds = (container.duration or 0) / av.time_base
        if seconds > MAX_SOURCE_SECONDS:
            raise UserError(f"{path}: {seconds:.0f} seconds long, above the limit of {MAX_SOURCE_SECONDS}; cut it")
        try:
            packets, end = demux_headers(container, stream)
        except av.FFmpegError as error:
            raise UserError(f"{path}: breaks off while it is read ({error.strerror}); it may be cut off") from None
        if not packets:
            raise UserError(f"{path}: a video stream with 0 frames; write it again")
        if len(packets) < 0.99 * stream.frames - 1 or packets[-1].is_corrupt:
            told = f"{path}: cut off: {len(packets)} frames found, its header promises {stream.frames}"
            raise UserError(f"{told}; download it again")
        time_base, rate = float(stream.time_base), stream.average_rate or stream.guessed_rate
        if "matroska" in container.format.name and end + 2 / float(rate or 1) < 0.9 * seconds:  # it counts no frames
            told = f"{path}: cut off: {end:.1f} seconds found, its header promises {seconds:.1f}"
            raise UserError(f"{told}; download it again")
        shown = [p.pts for p in packets if not p.is_discard]
        pts = sorted(p for p in shown if p is not None)
        keyframes = sorted(p.pts for p in packets if p.is_keyframe and p.pts is not None)
        if len(set(pts)) < len(shown) or not keyframes:
            return count_frames(path)
        container.seek(keyframes[0], stream=stream)
        first = next(decoded(container, stream, path), None)  # only a frame tells whether it is to be rotated
        if first is None:
            raise UserError(f"{path}: none of its {len(pts)} frames decodes; write it again")
    finally:
        kept.keep(key, container)
    fps = float(rate) if rate else (len(pts) - 1) / max((pts[-1] - pts[0]) * time_base, 1e-9)
    return Packets(shown_size(first), fps, pts, keyframes, time_base)


class Header(NamedTuple):
    """What is kept of a packet: not its data."""

    pts: int | None
    is_keyframe: bool
    is_discard: bool  # to be decoded, not to be shown (an edit list)
    is_corrupt: bool


def demux_headers(container, stream) -> tuple[list[Header], float]:
    """The headers of a stream's packets, and the time in seconds that the last packet of any stream begins."""
    headers, ends = [], [0] * len(container.streams)  # in each stream's own units: a Fraction a packet is slow
    for p in container.demux():
        if not p.size:
            continue
        pts, number = p.pts, p.stream_index
        if number == stream.index:
            headers.append(Header(pts, p.is_keyframe, p.is_discard, p.is_corrupt))
        if pts is not None and number < len(ends) and pts > ends[number]:
            ends[number] = pts
    bases = [stream.time_base for stream in container.streams]
    return headers, max((float(end * base) for end, base in zip(ends, bases) if base), default=0.0)


def count_frames(path: str) -> Packets:
    """The slow twin of read_packets, for containers that do not time their packets: decodes and counts everything."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or 25)  # 25: FFmpeg's own guess for raw streams
        sizes = [shown_size(frame) for frame in decoded(container, stream, path)]
    if not sizes:
        raise UserError(f"{path}: a video stream with 0 frames; write it again")
    return Packets(sizes[0], rate, list(range(len(sizes))), [], 1 / rate)


def shown_size(frame) -> tuple[int, int]:
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def decoded(container, stream, path: str, wanted: set[int] | None = None):
    """Frames from where the container stands. `wanted` (pts): others may be left out if nothing depends on them."""
    context = stream.codec_context
    threaded = context.width * context.height >= THREADED_PIXELS
    if not context.is_open:
        context.thread_type, context.thread_count = ("AUTO", 0) if threaded else ("NONE", 1)
    skip = None
    try:
        for packet in container.demux(stream):
            if wanted is not None:  # B-frames that no other frame needs cost a quarter of an h264 clip's decoding
                before, skip = skip, "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
                if skip != before:
                    context.skip_frame = skip
            yield from packet.decode()
    except av.FFmpegError as error:
        raise UserError(f"{path}: does not decode ({error.strerror}); it may be damaged, write it again") from None


@cache
def transparent(name: str) -> bool:
    """Whether a pixel format may have an alpha channel."""
    found = av.VideoFormat(name)
    return found.has_palette or any(c.is_alpha for c in found.components)


def pixels(frame, rotate: bool, scaler: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Transparent pixels are laid on white, as qwen-vl-utils does.

    scaler: one for all frames of a clip, and on one thread: setting it up takes fifty times longer than a 64x64 frame.
    """
    if transparent(frame.format.name):
        rgba = scaler.reformat(frame, format="rgba", threads=1).to_ndarray().astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(rgb, frame.rotation // 90) if rotate and frame.rotation else rgb


def resize(rgb: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, *size) uint8, bicubic with antialias in integers, as torchvision does on uint8."""
    frames = torch.from_numpy(np.ascontiguousarray(rgb)).permute(0, 3, 1, 2)
    if tuple(frames.shape[2:]) != size:
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
    return frames


class Resized:
    """Frames resized as they come: large ones each at once, so that memory holds one, small ones many in one call."""

    def __init__(self, size: tuple[int, int]):
        self.size, self.waiting, self.done = size, [], []

    def add(self, rgb: np.ndarray) -> None:
        """rgb: (H, W, 3) uint8"""
        if self.waiting and rgb.shape != self.waiting[0].shape:  # the picture's size changes within the file
            self.flush()
        self.waiting.append(rgb)
        if rgb.nbytes * len(self.waiting) >= RESIZED_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.done += resize(np.stack(self.waiting), self.size).unbind()
            self.waiting = []

    def all(self) -> list[Tensor]:
        self.flush()
        return self.done


def read_frames(path: str, indices: Sequence[int], seeks: Sequence[tuple[int, int]], size) -> list[Tensor]:
    """Frames of one video by number, each (3, *size) uint8.

    seeks: (keyframe's time, own time) of each, from Packets.seek, so that only what they need is decoded; empty = all
    is decoded. size: H, W after resizing.
    """
    found: dict[int, Tensor] = {}
    with kept.take(path) or open_media(path) as container:
        stream = video_stream(container, path)
        for keyframe, run in groupby(dict.fromkeys(seeks), key=lambda seek: seek[0]):
            found |= read_run(container, stream, path, keyframe, {pts for _, pts in run}, size)
    if seeks and all(pts in found for _, pts in seeks):
        return [found[pts] for _, pts in seeks]
    found = read_all(path, set(indices), size)  # no times, or packets and frames do not match one to one: count frames
    missing = [i for i in indices if i not in found]
    if missing:
        told = f"{path}: frame {missing[0]} is announced but does not decode"
        raise UserError(f"{told}; the file may be damaged, write it again")
    return [found[i] for i in indices]


def read_run(container, stream, path: str, keyframe: int, wanted: set[int], size) -> dict[int, Tensor]:
    """{pts: frame} of the wanted ones that follow one keyframe."""
    times, frames, last, scaler = [], Resized(size), max(wanted), VideoReformatter()
    container.seek(keyframe, stream=stream)
    for frame in decoded(container, stream, path, wanted):
        if frame.pts in wanted and frame.pts not in times:
            times.append(frame.pts)
            frames.add(pixels(frame, True, scaler))
        if len(times) == len(wanted) or (frame.pts is not None and frame.pts > last):
            break
    return dict(zip(times, frames.all(), strict=True))


def read_all(path: str, wanted: set[int], size) -> dict[int, Tensor]:
    """{number: frame}, the slow twin of seeking: decodes from the start."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        frames, scaler = enumerate(decoded(container, stream, path)), VideoReformatter()
        return {i: resize(pixels(frame, True, scaler)[None], size)[0] for i, frame in frames if i in wanted}


def read_image(path: str, size: tuple[int, int] | None = None) -> Tensor:
    """The first frame of an image file, (3, H, W) uint8, resized if a size is given."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        stream.codec_context.options = {"err_detect": "explode"}  # a JPEG that breaks off would end in grey
        frame = next(decoded(container, stream, path), None)
        if frame is None:
            raise UserError(f"{path}: no picture in this file; write it again")
        rgb = pixels(frame, False, VideoReformatter())
    return resize(rgb[None], size or rgb.shape[:2])[0]


def image_size(path: str) -> tuple[int, int]:
    with open_media(path) as container:
        context = video_stream(container, path).codec_context
        size = context.height, context.width
    return size if all(size) else tuple(read_image(path).shape[1:])

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
import struct
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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

# Refused before anything is decoded, by what the file's header claims: the largest are a scan of a poster, 8K video
# (the decoder keeps up to 17 frames) and a day of surveillance. So a file never takes more than some 2 GiB.
MAX_IMAGE_PIXELS = 2**27
MAX_VIDEO_PIXELS = 2**25
MAX_SOURCE_SECONDS = 24 * 3600
MAX_SOURCE_FRAMES = MAX_SOURCE_SECONDS * 30
OPEN_TIMEOUT = 30.0  # seconds a file may block while it is opened or read, e.g. on a dead network disk
FILE_SECONDS = 300.0  # seconds that looking at or reading one file may take, looked at between two packets

STRIP = 256  # rows blended at once

# Above this size a frame takes long enough that threads inside the decoder pay; below, starting them costs more than
# decoding a short clip does (and several clips are decoded side by side anyway)
THREADED_PIXELS = 1280 * 720
RESIZED_BYTES = 1 << 20  # of frames at full size held back, to resize them in one call

SEEK_TO_PTS = 0x4000000  # AVFMT_SEEK_TO_PTS in libavformat/avformat.h: this container is searched by presentation time


@dataclass(frozen=True)
class Packets:
    """The frames of a video file in presentation order, from its packet headers."""

    size: tuple[int, int]  # H, W as shown, after rotation
    fps: float
    pts: list[int]  # sorted
    keyframes: list[int]  # sorted pts of frames that decode alone; none if the container does not time its packets
    seek_times: list[int]  # what to seek to, for each keyframe: its pts, or its dts where the container goes by it
    time_base: float

    def seek(self, i: int) -> tuple[int, int]:
        """(seek time of the last keyframe up to frame i, its own time)"""
        return self.seek_times[max(0, bisect_right(self.keyframes, self.pts[i]) - 1)], self.pts[i]


def check_file(path: str) -> os.stat_result:
    """UserError for what is no regular file, a link's target included: a fifo would block for good."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half a character in the name
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read ({reason}); check the name and image_folder") from None
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


@dataclass(frozen=True)
class MediaFile:
    """An open file and its video stream."""

    container: av.container.InputContainer
    stream: av.VideoStream
    path: str
    end: float  # of time.monotonic(): the file is given up then

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def seek(self, pts: int) -> None:
        try:
            self.container.seek(pts, stream=self.stream)
        except av.FFmpegError as error:
            raise UserError(f"{self.path}: cannot be read from {pts} on ({error.strerror}); write it again") from None

    def packets(self, stream=None) -> Iterator[av.Packet]:
        """Of one stream, or all. UserError when the file takes too long."""
        for packet in self.container.demux() if stream is None else self.container.demux(stream):
            yield packet
            if time.monotonic() > self.end:
                raise UserError(f"{self.path}: takes longer than {FILE_SECONDS:g} seconds; cut or convert it")


def open_media(path: str, most_pixels: int) -> MediaFile:
    """A local file. UserError when it is none, or claims more than most_pixels, frames or seconds."""
    check_file(path)
    check_size(path, claimed_size(path), most_pixels)
    end = time.monotonic() + FILE_SECONDS
    try:  # the absolute path and the whitelist keep names like "concat:..." and playlists from opening anything else
        options = {"protocol_whitelist": "file", "pattern_type": "none", "max_pixels": str(most_pixels)}
        container = av.open(os.path.abspath(path), timeout=OPEN_TIMEOUT, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        told = f"{path}: no readable video or image ({error.strerror})"
        raise UserError(f"{told}; it may be cut off or of another type") from None
    try:
        return MediaFile(container, video_stream(container, path, most_pixels), path, end)
    except UserError:
        container.close()
        raise


class Kept(threading.local):
    """The file that a thread opened last, until it opens another: a clip is planned and then read, and opening a small
    one takes as long as decoding it."""

    key = media = None

    def keep(self, key: tuple, media: MediaFile) -> None:
        """key: identity(path) before it was opened."""
        if self.media is not None:
            self.media.container.close()
        self.key, self.media = key, media

    def take(self, path: str) -> MediaFile | None:
        """The open file, with all its time again, if it is this very one; else it is closed, and None comes back."""
        found, self.media = self.media, None
        if found is None:
            return None
        if self.key != identity(path):
            return found.container.close()
        return replace(found, end=time.monotonic() + FILE_SECONDS)


kept = Kept()


def identity(path: str) -> tuple:
    """What tells one state of a file from another."""
    found = check_file(path)
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def claimed_size(path: str) -> tuple[int, int] | None:
    """H, W in the header of a PNG or GIF, which FFmpeg does not tell before it has decoded a frame."""
    with open(path, "rb") as file:
        head = file.read(24)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 24:
        return struct.unpack(">II", head[16:])[::-1]
    return struct.unpack("<HH", head[6:10])[::-1] if head[:4] == b"GIF8" and len(head) >= 10 else None


def check_size(path: str, size: tuple[int, int] | None, most_pixels: int) -> None:
    if size is not None and size[0] * size[1] > most_pixels:
        raise UserError(f"{path}: {size[1]} x {size[0]} pixels, above the limit of {most_pixels}; scale it down")


def video_stream(container, path: str, most_pixels: int):
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not streams:
        found = ", ".join(s.type for s in container.streams) or "nothing"
        raise UserError(f"{path}: no video in this file, found {found}; expected a video stream")
    stream, context = streams[0], streams[0].codec_context
    if context is None:
        raise UserError(f"{path}: no decoder for this video's codec; convert it to h264")
    check_size(path, (context.height, context.width), most_pixels)
    context.options = {"max_pixels": str(most_pixels)}  # also where the stream itself tells another size
    for found, most, what in (
        ((container.duration or 0) / av.time_base, MAX_SOURCE_SECONDS, "seconds"),
        (stream.frames, MAX_SOURCE_FRAMES, "frames"),
    ):
        if found > most:
            raise UserError(f"{path}: {found:.0f} {what} long, above the limit of {most}; cut it")
    return stream


def read_packets(path: str) -> Packets:
    """Times and keyframes of all frames, without decoding. UserError for a broken, cut off or frameless file."""
    key, media = identity(path), open_media(path, MAX_VIDEO_PIXELS)
    container, stream = media.container, media.stream
    try:
        seconds = (container.duration or 0) / av.time_base
        try:
            packets, end = demux_headers(media)
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
        keyframes = sorted((p for p in packets if p.is_keyframe and p.pts is not None), key=lambda p: p.pts)
        # AVI holds no presentation times; for H.264 FFmpeg makes up some in decoding order, wrong where it has B-frames
        made_up = container.format.name == "avi" and stream.codec_context.has_b_frames and pts == shown
        if len(set(pts)) < len(shown) or not keyframes or made_up:
            return count_frames(path)
        seek_times = [seek_time(container, p) for p in keyframes]
        keyframes = [p.pts for p in keyframes]
        pts = pts[bisect_left(pts, keyframes[0]) :]  # a stream cut at its head: nothing decodes before a keyframe
        if not pts:
            raise UserError(f"{path}: no frame follows its first keyframe; write it again")
        media.seek(seek_times[0])
        first = next(decoded(media), None)  # only a frame tells whether it is to be rotated
        if first is None:
            raise UserError(f"{path}: none of its {len(pts)} frames decodes; write it again")
    finally:
        kept.keep(key, media)
    fps = float(rate) if rate else (len(pts) - 1) / max((pts[-1] - pts[0]) * time_base, 1e-9)
    return Packets(shown_size(first), fps, pts, keyframes, seek_times, time_base)


def seek_time(container, keyframe: "Header") -> int:
    """The time at which a seek finds this keyframe: its pts in mp4 and Matroska, its dts elsewhere.

    MPEG transport and program streams are searched by dts. With B-frames a keyframe's dts is earlier than its pts, so a
    seek to the pts would land behind it.
    """
    by_pts = container.format.flags & SEEK_TO_PTS or "matroska" in container.format.name
    return keyframe.pts if by_pts or keyframe.dts is None else keyframe.dts


class Header(NamedTuple):
    """What is kept of a packet: not its data."""

    pts: int | None
    dts: int | None
    is_keyframe: bool
    is_discard: bool  # to be decoded, not to be shown (an edit list)
    is_corrupt: bool


def demux_headers(media: MediaFile) -> tuple[list[Header], float]:
    """The headers of the video's packets, and the time in seconds that the last packet of any stream begins."""
    streams = media.container.streams
    headers, ends = [], [0] * len(streams)  # in each stream's own units: a Fraction a packet is slow
    for p in media.packets():
        if not p.size:
            continue
        pts, number = p.pts, p.stream_index
        if number == media.stream.index:
            if len(headers) == MAX_SOURCE_FRAMES:
                raise UserError(f"{media.path}: more than {MAX_SOURCE_FRAMES} frames, the limit; cut it")
            headers.append(Header(pts, p.dts, p.is_keyframe, p.is_discard, p.is_corrupt))
        if pts is not None and number < len(ends) and pts > ends[number]:
            ends[number] = pts
    bases = [stream.time_base for stream in streams]
    return headers, max((float(end * base) for end, base in zip(ends, bases) if base), default=0.0)


def count_frames(path: str) -> Packets:
    """The slow twin of read_packets, for containers that do not time their packets: decodes and counts everything."""
    with open_media(path, MAX_VIDEO_PIXELS) as media:
        stream = media.stream
        rate = float(stream.average_rate or stream.guessed_rate or 25)  # 25: FFmpeg's own guess for raw streams
        sizes = [shown_size(frame) for frame in limited(decoded(media), path)]
    if not sizes:
        raise UserError(f"{path}: a video stream with 0 frames; write it again")
    return Packets(sizes[0], rate, list(range(len(sizes))), [], [], 1 / rate)


def limited(frames: Iterable, path: str) -> Iterator:
    for i, frame in enumerate(frames):
        if i == MAX_SOURCE_FRAMES:
            raise UserError(f"{path}: more than {MAX_SOURCE_FRAMES} frames, the limit; cut it")
        yield frame


def shown_size(frame) -> tuple[int, int]:
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def decoded(media: MediaFile, wanted: set[int] | None = None):
    """Frames from where the container stands. `wanted` (pts): others may be left out if nothing depends on them."""
    context = media.stream.codec_context
    threaded = context.width * context.height >= THREADED_PIXELS
    if not context.is_open:
        context.thread_type, context.thread_count = ("AUTO", 0) if threaded else ("NONE", 1)
    skip = None
    try:
        for packet in media.packets(media.stream):
            if wanted is not None:  # B-frames that no other frame needs cost a quarter of an h264 clip's decoding
                before, skip = skip, "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
                if skip != before:
                    context.skip_frame = skip
            yield from packet.decode()
    except av.FFmpegError as error:
        told = f"{media.path}: does not decode ({error.strerror})"
        raise UserError(f"{told}; it may be damaged, write it again") from None


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
        rgba = scaler.reformat(frame, format="rgba", threads=1).to_ndarray()
        rgb = np.empty((*rgba.shape[:2], 3), np.uint8)
        for top in range(0, len(rgba), STRIP):  # 16 bits a value, but not of a whole poster
            strip = rgba[top : top + STRIP].astype(np.uint16)
            alpha = strip[..., 3:]
            rgb[top : top + STRIP] = (strip[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
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

    seeks: (keyframe's seek time, own time) of each, from Packets.seek, so that only what they need is decoded; empty =
    all is decoded. size: H, W after resizing.
    """
    found: dict[int, Tensor] = {}
    with kept.take(path) or open_media(path, MAX_VIDEO_PIXELS) as media:
        for keyframe, run in groupby(dict.fromkeys(seeks), key=lambda seek: seek[0]):
            found |= read_run(media, keyframe, {pts for _, pts in run}, size)
    if seeks and all(pts in found for _, pts in seeks):
        return [found[pts] for _, pts in seeks]
    found = read_all(path, set(indices), size)  # no times, or packets and frames do not match one to one: count frames
    missing = [i for i in indices if i not in found]
    if missing:
        told = f"{path}: frame {missing[0]} is announced but does not decode"
        raise UserError(f"{told}; the file may be damaged, write it again")
    return [found[i] for i in indices]


def read_run(media: MediaFile, keyframe: int, wanted: set[int], size) -> dict[int, Tensor]:
    """{pts: frame} of the wanted ones that follow one keyframe."""
    times, frames, last, scaler = [], Resized(size), max(wanted), VideoReformatter()
    media.seek(keyframe)
    for frame in decoded(media, wanted):
        if frame.pts in wanted and frame.pts not in times:
            times.append(frame.pts)
            frames.add(pixels(frame, True, scaler))
        if len(times) == len(wanted) or (frame.pts is not None and frame.pts > last):
            break
    return dict(zip(times, frames.all(), strict=True))


def read_all(path: str, wanted: set[int], size) -> dict[int, Tensor]:
    """{number: frame}, the slow twin of seeking: decodes from the start."""
    with open_media(path, MAX_VIDEO_PIXELS) as media:
        frames, scaler = enumerate(decoded(media)), VideoReformatter()
        return {i: resize(pixels(frame, True, scaler)[None], size)[0] for i, frame in frames if i in wanted}


def read_image(path: str, size: tuple[int, int] | None = None) -> Tensor:
    """The first frame of an image file, (3, H, W) uint8, resized if a size is given."""
    with open_media(path, MAX_IMAGE_PIXELS) as media:
        context = media.stream.codec_context
        if context.name == "mjpeg":  # a JPEG that breaks off would end in grey; a TIFF would fail at any unknown tag
            context.options |= {"err_detect": "explode"}
        frame = next(decoded(media), None)
        if frame is None:
            raise UserError(f"{path}: no picture in this file; write it again")
        rgb = pixels(frame, False, VideoReformatter())
    return resize(rgb[None], size or rgb.shape[:2])[0]


def image_size(path: str) -> tuple[int, int]:
    with open_media(path, MAX_IMAGE_PIXELS) as media:
        size = media.stream.codec_context.height, media.stream.codec_context.width
    return size if all(size) else tuple(read_image(path).shape[1:])

"""A video or image file -> the times of its frames, and their pixels. FFmpeg by PyAV.

    index_frames(path)          size, rate and times of all frames: reads packet headers and decodes one frame
    read_frames(path, ...)      frames of a video by number, each (3, H, W) uint8, as players show them
    read_image(path, size)      the first picture of a file, (3, H, W) uint8, as it is stored

A video's display matrix is obeyed: phones store clips turned or mirrored. A picture's EXIF rotation and the shape of
pixels are not, as in qwen-vl-utils. Sizes are (H, W). Everything raises UserError naming the file.
"""

import math
import os
import stat
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from torch import Tensor

from model import UserError

MAX_SOURCE_PIXELS = 2**27  # of a picture in a file: a scan of a poster
THREADED_PIXELS = 1280 * 720  # smaller frames decode faster without threads
RESIZE_BYTES = 2**20  # small frames are resized many in one call: up to this many bytes of them
SEEK_TO_PTS = 0x4000000  # AVFMT_SEEK_TO_PTS of libavformat/avformat.h
# What FFmpeg opens and is no media file: playlists, which name other files, and text, which it would draw
NO_MEDIA = ("concat", "dash", "hls", "tty")
PICTURE_BRANDS = ("avif", "avis", "heic", "heix", "heif", "mif1", "msf1")  # of pictures in an MP4's container
COMPRESSION, ORIENTATION = 259, 274  # tags of a TIFF
# A picture's halved chroma is interpolated, as libjpeg does; by default FFmpeg repeats it, for speed
SMOOTH = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


# ---- Files


def file_stamp(path: str) -> tuple:
    """What tells one state of a file from another. UserError unless it is a regular file with something in it."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half a character in the name
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read ({reason}); check the name and image_folder") from None
    if not stat.S_ISREG(status.st_mode):  # a fifo would block for good
        raise UserError(f"{path}: not a regular file; expected a video, image or list of images")
    if status.st_size == 0:
        raise UserError(f"{path}: empty file (0 bytes); download or write it again")
    return path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_stream(path: str, file_format: str | None = None) -> av.VideoStream:
    """The file's video stream. UserError without one, or above a limit. The caller closes stream.container."""
    file_stamp(path)
    # The absolute path and these options keep playlists, "concat:..." and "%02d" from opening anything else
    limit = {"max_pixels": str(MAX_SOURCE_PIXELS)}
    options = {"protocol_whitelist": "file", "pattern_type": "none", **limit}
    try:
        container = av.open(os.path.abspath(path), format=file_format, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        message = f"{path}: no readable video or image ({error.strerror})"
        raise UserError(f"{message}; it may be cut off or of another type") from None
    stream, problem = choose_stream(container)
    if problem:
        container.close()
        raise UserError(f"{path}: {problem}")
    stream.codec_context.options = limit  # a picture may be larger than the header says
    return stream


def open_picture(path: str) -> av.VideoStream:
    """As open_stream. UserError for a video."""
    stream = open_stream(path)
    if not is_picture(stream.container):
        stream.container.close()
        raise UserError(f"{path}: a video where a picture is expected; name it as a video")
    if stream.container.format.name == "apng":  # a PNG's own picture need not be one of its animation
        stream.container.close()
        return open_stream(path, "png_pipe")
    return stream


def is_picture(container) -> bool:
    """Whether a file holds pictures, one or an animation of them, by its format."""
    name = container.format.name
    still = name.endswith("_pipe") or name in ("image2", "ico", "gif", "apng")
    return still or container.metadata.get("major_brand") in PICTURE_BRANDS


def choose_stream(container) -> tuple[av.VideoStream | None, str | None]:
    """The default video stream, or else the largest; and why it cannot be read, None if it can."""
    if container.format.name in NO_MEDIA:
        return None, "a playlist or text, no media file; name the video or image itself"
    if container.format.name == "gif" and not ends_with(container.name, b";"):
        return None, "cut off: no end of the GIF; download it again"
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        types = ", ".join("cover picture" if s.type == "video" else s.type for s in container.streams) or "nothing"
        return None, f"no video in this file, found {types}; expected a video stream"
    if tiles := [s for s in streams if s.disposition & Disposition.dependent]:
        return None, f"a picture in {len(tiles)} tiles (HEIC, AVIF), which FFmpeg does not join; convert it to png"
    readable = [s for s in streams if s.codec_context is not None]
    if not readable:
        return None, "no decoder for this codec; convert it to h264, or a picture to png"
    stream = max(readable, key=lambda s: (bool(s.disposition & Disposition.default), s.height * s.width, s.frames))
    if any(s is not stream and (s.pix_fmt or "").startswith("gray") for s in readable):
        return None, "its transparency or depth is a stream of its own (AVIF), which is not read; convert it to png"
    return stream, None


@contextmanager
def ffmpeg_errors(path: str):
    """FFmpeg's errors inside become a UserError. A picture above max_pixels is one of them."""
    try:
        yield
    except av.FFmpegError as error:
        with open(path, "rb") as file:
            head = file.read(21)
        if head[8:16] == b"WEBPVP8X" and head[20] & 2:  # the flag of an animation
            raise UserError(f"{path}: an animated webp, which FFmpeg does not read; convert it to gif or mp4") from None
        message = f"{path}: does not decode ({error.strerror})"
        reasons = "it may be damaged, cut off, too large or of a kind that FFmpeg does not read"
        raise UserError(f"{message}; {reasons}; write it again or convert it") from None


def ends_with(path: str, mark: bytes) -> bool:
    """Whether a file ends with a mark, and perhaps zeros."""
    with open(path, "rb") as file:
        file.seek(max(0, os.stat(path).st_size - 4096))
        return file.read().rstrip(b"\0").endswith(mark)


def tiff_tags(path: str) -> dict[int, int]:
    """{tag: its value, or the half of it that comes first} of a TIFF's first directory."""
    with open(path, "rb") as file:
        head = file.read(8)
        order = "<" if head[:2] == b"II" else ">"
        file.seek(*struct.unpack(f"{order}I", head[4:]))
        (count,) = struct.unpack(f"{order}H", file.read(2))
        entries = [struct.unpack(f"{order}HHIHH", file.read(12)) for _ in range(count)]
    return {tag: value for tag, _, _, value, _ in entries}


# ---- Times of all frames


class FrameIndex(NamedTuple):
    """The frames of a video file in the order shown."""

    size: tuple[int, int]  # as shown, after rotation
    fps: float
    pts: list[int]  # sorted, in units of time_base
    time_base: float  # seconds
    keyframes: list[tuple[int, int]]  # sorted (pts, where a seek finds it); [] if the packets carry no usable times
    is_picture: bool = False  # by its format; it may be an animation

    def seconds(self, i: int) -> float:
        return (self.pts[i] - self.pts[0]) * self.time_base

    def seek(self, i: int) -> tuple[int | None, int]:
        """(where to seek for frame i, its pts); (None, i) if it has to be counted from the start."""
        if not self.keyframes:
            return None, i
        k = bisect_right(self.keyframes, self.pts[i], key=itemgetter(0)) - 1
        return self.keyframes[max(0, k)][1], self.pts[i]


def index_frames(path: str) -> FrameIndex:
    """Times and keyframes from the packet headers; one frame is decoded. UserError for a broken or cut off file."""
    stream = open_stream(path)
    with stream.container, ffmpeg_errors(path):
        shown, keyframes, picture = *read_packets(path, stream), is_picture(stream.container)
        pts = sorted(t for t in shown if t is not None)
        # AVI stores no presentation times. FFmpeg makes some up; for H.264 with B-frames they are in decoding order
        made_up = stream.container.format.name == "avi" and stream.codec_context.has_b_frames and pts == shown
        untimed = len(set(pts)) < len(shown) or not keyframes or made_up
        rate, time_base = stream.average_rate or stream.guessed_rate, float(stream.time_base)
        if stream.container.format.long_name.startswith("raw"):  # it has no header; the codec's may name a rate
            rate = stream.codec_context.framerate or stream.guessed_rate
        if not untimed:
            pts = pts[bisect_left(pts, keyframes[0][0]) :]  # cut at its head: nothing decodes before a keyframe
            mean = (len(pts) - 1) / max((pts[-1] - pts[0]) * time_base, 1e-9) if pts else 0.0
            if "matroska" in stream.container.format.name and rate and not 2 / 3 < mean / rate < 1.5 and mean:
                rate = None  # of a slide show: its header names any rate
            stream.container.seek(keyframes[0][1], stream=stream)
            sizes = [shown_size(frame) for frame in islice(decode(stream), 1)]  # only a frame knows its rotation
    if untimed:  # all frames are decoded and counted
        stream = open_stream(path)
        with stream.container, ffmpeg_errors(path):
            sizes = [shown_size(frame) for frame in decode(stream)]
    if not sizes or not pts and not untimed:
        raise UserError(f"{path}: none of its {len(shown)} frames decodes; write it again")
    if untimed:
        fps = float(rate or 25)  # 25: FFmpeg's own guess for raw streams
        return FrameIndex(sizes[0], fps, list(range(len(sizes))), 1 / fps, [], picture)
    return FrameIndex(sizes[0], float(rate or mean), pts, time_base, keyframes, picture)


def read_packets(path: str, stream: av.VideoStream) -> tuple[list[int | None], list[tuple[int, int]]]:
    """(pts of each frame that is shown, sorted (pts, seek time) of the keyframes, or []). UserError: cut off."""
    container, shown, keyframes, count, corrupt, end = stream.container, [], [], 0, False, 0.0
    matroska = "matroska" in container.format.name
    # Other containers, such as MPEG transport streams, are searched by dts. A keyframe with B-frames has an earlier dts
    # than pts, so a seek to its pts would land behind it
    by_pts = matroska or container.format.flags & SEEK_TO_PTS
    promised = stream.frames
    if container.format.name.startswith("mov"):  # an edit list leaves the first ones out of the index
        promised = min(promised, len(stream.index_entries))
    time_bases = {s.index: float(s.time_base or 0) for s in container.streams}
    for packet in container.demux():
        if not packet.size:
            continue
        pts = packet.pts
        if pts is not None:
            end = max(end, pts * time_bases.get(packet.stream_index, 0))
        if packet.stream_index == stream.index:
            count += 1
            corrupt = packet.is_corrupt
            if not packet.is_discard:  # a discarded one is decoded but not shown (an edit list)
                shown.append(pts)
            if packet.is_keyframe and pts is not None:
                keyframes.append((pts, pts if by_pts or packet.dts is None else packet.dts))
    if not count:
        raise UserError(f"{path}: a video stream with 0 frames; write it again")
    if count < 0.99 * promised - 1:
        raise UserError(f"{path}: cut off: {count} frames, its header promises {promised}; download it again")
    if corrupt:
        raise UserError(f"{path}: cut off: only a part of its frame {count - 1}; download it again")
    seconds = (container.duration or 0) / av.time_base  # all that some headers promise
    by_time = not stream.frames and container.format.name.startswith(("matroska", "mov", "flv", "mxf"))
    if by_time and end + 2 / float(stream.average_rate or stream.guessed_rate or 1) < 0.9 * seconds:
        raise UserError(f"{path}: cut off: {end:.1f} seconds, its header promises {seconds:.1f}; download it again")
    # Of two recordings in one file the second may begin at an earlier time: the times are of no use
    return shown, keyframes if keyframes == sorted(keyframes) else []


# ---- Pixels


def display_matrix(frame: av.VideoFrame) -> tuple[float, ...]:
    """a, b, c, d: a pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift. FFmpeg's libavutil/display.h"""
    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # PyAV has no name for some of the frame's data; it still tells the angle
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    return (1, 0, 0, 1) if data is None else tuple(np.frombuffer(data, np.int32)[[0, 1, 3, 4]].tolist())


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    a, b, _, _ = display_matrix(frame)
    return (frame.width, frame.height) if abs(b) > abs(a) else (frame.height, frame.width)


def as_shown(rgb: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """(H, W, 3) turned and mirrored as a display matrix says."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def to_rgb(frame: av.VideoFrame, scaler: VideoReformatter, interpolation=None) -> np.ndarray:
    """(H, W, 3) uint8 as stored. Transparent pixels are laid on white.

    scaler: the same for all frames of a clip, as setting one up takes fifty times longer than a 64x64 frame.
    """
    if frame.format.has_palette or any(c.is_alpha for c in frame.format.components):
        rgba = scaler.reformat(frame, format="rgba", interpolation=interpolation, threads=1).to_ndarray()
        rgba, alpha = rgba.astype(np.uint16), rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return scaler.reformat(frame, format="rgb24", interpolation=interpolation, threads=1).to_ndarray()


def decode(stream: av.VideoStream, wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
    """Frames from where the container stands. With `wanted` (pts), other frames may be missing."""
    context = stream.codec_context
    if not context.is_open:
        threaded = context.width * context.height >= THREADED_PIXELS
        context.thread_type, context.thread_count = ("AUTO", 0) if threaded else ("NONE", 1)
    skip = None
    for packet in stream.container.demux(stream):
        if wanted is not None:  # frames that no other frame needs cost a quarter of an h264 clip's decoding
            previous, skip = skip, "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
            if skip != previous:
                context.skip_frame = skip
        yield from packet.decode()


def resize(pictures: Iterable[np.ndarray], size: tuple[int, int]) -> Iterator[Tensor]:
    """(H, W, 3) uint8 each -> (3, *size) uint8 each: antialiased bicubic in integers, as torchvision on uint8.

    Large pictures are resized one at a time, so that memory holds one at full size; small ones many in one call.
    """
    for shape, same in groupby(pictures, key=lambda rgb: rgb.shape):
        count = max(1, RESIZE_BYTES // math.prod(shape))
        while batch := list(islice(same, count)):
            frames = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
            if tuple(frames.shape[2:]) != size:
                frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
            yield from frames


def read_frames(path: str, indices: Sequence[int], seeks: Sequence[tuple[int | None, int]], size) -> list[Tensor]:
    """Frames of one video by number, each (3, *size) uint8. seeks: FrameIndex.seek of each."""
    frames = decode_frames(path, seeks, size)
    if any(seek not in frames for seek in seeks):  # packets and frames do not match one to one: count frames
        seeks = [(None, i) for i in indices]
        frames = decode_frames(path, seeks, size)
    missing = [i for i, seek in zip(indices, seeks, strict=True) if seek not in frames]
    if missing:
        problem = f"{path}: frame {missing[0]} is announced but does not decode"
        raise UserError(f"{problem}; the file may be damaged, write it again")
    return [frames[seek] for seek in seeks]


def decode_frames(path: str, seeks: Sequence[tuple[int | None, int]], size) -> dict[tuple, Tensor]:
    """{seek: frame} of those of `seeks` that decode."""
    stream, scaler, decoded, matrix = open_stream(path), VideoReformatter(), [], None

    def pictures() -> Iterator[np.ndarray]:
        nonlocal matrix
        for position, run in groupby(dict.fromkeys(seeks), key=itemgetter(0)):
            missing = {time for _, time in run}
            wanted, last = (None if position is None else set(missing)), max(missing)
            if position is not None:
                stream.container.seek(position, stream=stream)
            for number, frame in enumerate(decode(stream, wanted)):
                time = number if position is None else frame.pts
                if time in missing:
                    missing.remove(time)
                    decoded.append((position, time))
                    matrix = matrix or display_matrix(frame)  # the same for all frames of a clip
                    yield as_shown(to_rgb(frame, scaler), matrix)
                if not missing or (time is not None and time > last):
                    break

    with stream.container, ffmpeg_errors(path):
        frames = list(resize(pictures(), size))
    return dict(zip(decoded, frames, strict=True))


def read_image(path: str, size: tuple[int, int] | None = None, source: tuple[int, int] | None = None) -> Tensor:
    """The first picture of a file, (3, H, W) uint8, resized if a size is given. UserError unless it has the size
    `source`, if that is given."""
    stream = open_picture(path)
    with stream.container, ffmpeg_errors(path):
        if stream.codec_context.name == "mjpeg":  # one that breaks off would end in grey; a TIFF would fail at any tag
            stream.codec_context.options |= {"err_detect": "explode"}
        frame = next(decode(stream), None)
        if frame is None:
            raise UserError(f"{path}: no picture in this file; write it again")
        if stream.codec_context.name == "tiff":
            tags = tiff_tags(path)
            if tags.get(COMPRESSION) in (6, 7):  # FFmpeg makes it black
                raise UserError(f"{path}: a TIFF with a JPEG inside, which FFmpeg does not read; convert it to png")
            if tags.get(ORIENTATION, 1) != 1:  # here Pillow does turn
                raise UserError(f"{path}: a TIFF to be shown turned or mirrored, which is not done; save it upright")
            frame.color_range = ColorRange.JPEG  # which FFmpeg leaves open
        rgb = to_rgb(frame, VideoReformatter(), SMOOTH)
    if source and rgb.shape[:2] != source:
        sizes = f"{rgb.shape[1]} x {rgb.shape[0]} among frames of {source[1]} x {source[0]}"
        raise UserError(f"{path}: {sizes}; the frames of a clip have one size")
    return next(resize([rgb], size or rgb.shape[:2]))


def image_size(path: str) -> tuple[int, int]:
    stream = open_picture(path)
    with stream.container:
        size = stream.codec_context.height, stream.codec_context.width
    return size if all(size) else tuple(read_image(path).shape[1:])

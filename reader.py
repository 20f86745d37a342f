"""A video or image file -> the times of its frames, and their pixels. FFmpeg by PyAV.

    index_frames(path)          size, rate and times of all frames: reads packet headers and decodes one frame
    read_frames(path, ...)      frames of a video by number, each (3, H, W) uint8, as players show them
    read_image(path, size)      the first picture of a file, (3, H, W) uint8, as it is stored

A video's display matrix is obeyed: phones store clips turned or mirrored. A picture's EXIF rotation and the shape of
pixels are not, as in qwen-vl-utils. Sizes are (H, W). Everything raises UserError naming the file.
"""

import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

from model import UserError

MAX_SOURCE_PIXELS = 2**27  # of a picture in a file: a scan of a poster
THREADED_PIXELS = 1280 * 720  # smaller frames decode faster without threads
SEEK_TO_PTS = 0x4000000  # AVFMT_SEEK_TO_PTS of libavformat/avformat.h
# What FFmpeg opens and is no media file: playlists, which name other files, and text, which it would draw
NO_MEDIA = ("concat", "dash", "hls", "tty")
PICTURE_BRANDS = ("avif", "avis", "heic", "heix", "heif", "mif1", "msf1")  # of pictures in an MP4's container
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


@contextmanager
def open_stream(path: str, picture: bool = False) -> Iterator[av.VideoStream]:
    """A file's default video stream; of a picture, if that is expected. FFmpeg's errors inside become a UserError."""
    file_stamp(path)
    # The absolute path and these options keep playlists, "concat:..." and "%02d" from opening anything else
    limit = {"max_pixels": str(MAX_SOURCE_PIXELS)}
    options = {"protocol_whitelist": "file", "pattern_type": "none", **limit}
    try:
        container = av.open(os.path.abspath(path), options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        message = f"{path}: no readable video or image ({error.strerror})"
        raise UserError(f"{message}; it may be cut off or of another type") from None
    with container:
        stream, problem = choose_stream(container)
        if problem or (picture and not is_picture(container)):
            raise UserError(f"{path}: {problem or 'a video where a picture is expected; name it as a video'}")
        codec = stream.codec_context
        codec.options = limit  # a picture may be larger than the header says
        is_large = codec.width * codec.height >= THREADED_PIXELS
        codec.thread_type, codec.thread_count = ("AUTO", 0) if is_large else ("NONE", 1)
        try:
            yield stream
        except av.FFmpegError as error:
            reasons = "damaged, cut off, too large, or of a kind that FFmpeg does not read, as an animated webp"
            raise UserError(f"{path}: does not decode ({error.strerror}): {reasons}; convert it") from None


def choose_stream(container) -> tuple[av.VideoStream | None, str | None]:
    """The default video stream, or else the largest; and why it cannot be read, None if it can."""
    if container.format.name in NO_MEDIA:
        return None, "a playlist or text, no media file; name the video or image itself"
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    readable = [s for s in streams if s.codec_context is not None]
    if not readable:
        types = ", ".join(s.type for s in container.streams) or "nothing"
        return None, f"no video that FFmpeg decodes, got {types}; convert it to h264, or a picture to png"
    if any(s.disposition & Disposition.dependent for s in streams):
        return None, "a picture in tiles (HEIC, AVIF), which FFmpeg does not join; convert it to png"
    stream = max(readable, key=lambda s: (bool(s.disposition & Disposition.default), s.height * s.width, s.frames))
    if any(s is not stream and (s.pix_fmt or "").startswith("gray") for s in readable):
        return None, "its transparency or depth is a stream of its own (AVIF), which is not read; convert it to png"
    return stream, None


def is_picture(container) -> bool:
    """Whether a file holds pictures, one or an animation of them, by its format."""
    name = container.format.name
    still = name.endswith("_pipe") or name in ("image2", "ico", "gif", "apng")
    return still or container.metadata.get("major_brand") in PICTURE_BRANDS


# ---- Times of all frames


class FrameIndex(NamedTuple):
    """The frames of a video file in the order shown."""

    size: tuple[int, int]  # as shown, after rotation
    fps: float
    pts: list[int]  # sorted, in units of time_base
    time_base: float  # seconds
    keyframes: list[tuple[int, int]]  # sorted (pts, where a seek finds it); [] if the packets carry no usable times

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
    with open_stream(path) as stream:
        container = stream.container
        shown, keyframes = read_packets(path, stream)
        pts = sorted(time for time in shown if time is not None)
        rate, time_base = stream.average_rate or stream.guessed_rate, float(stream.time_base)
        # AVI stores no presentation times. FFmpeg makes some up; for H.264 with B-frames they are in decoding order
        made_up = container.format.name == "avi" and stream.codec_context.has_b_frames and pts == shown
        if container.format.long_name.startswith("raw"):  # it has no header; the codec's may name a rate
            rate, made_up = stream.codec_context.framerate or stream.guessed_rate, True
        if len(set(pts)) == len(shown) and keyframes and not made_up:
            pts = pts[bisect_left(pts, keyframes[0][0]) :]  # cut at its head: nothing decodes before a keyframe
            seconds = (pts[-1] - pts[0]) * time_base if pts else 0.0
            mean = (len(pts) - 1) / seconds if seconds else float(rate or 25)
            is_show = "matroska" in container.format.name and rate and not 2 / 3 < mean / rate < 1.5
            rate = mean if is_show else rate or mean  # the header of a slide show names any rate
            container.seek(keyframes[0][1], stream=stream)
            size = next((shown_size(frame) for frame in stream.container.decode(stream)), None)
            if pts and size:
                return FrameIndex(size, float(rate), pts, time_base, keyframes)
    with open_stream(path) as stream:  # the times are of no use: all frames are decoded and counted
        sizes = [shown_size(frame) for frame in stream.container.decode(stream)]
        if not sizes:
            raise UserError(f"{path}: none of its {len(shown)} frames decodes; write it again")
        fps = float(rate or 25)  # 25: FFmpeg's own guess for raw streams
        return FrameIndex(sizes[0], fps, list(range(len(sizes))), 1 / fps, [])


def read_packets(path: str, stream: av.VideoStream) -> tuple[list[int | None], list[tuple[int, int]]]:
    """(pts of each frame that is shown, sorted (pts, seek time) of the keyframes, or []). UserError: cut off."""
    container, shown, keyframes, count, corrupt, end = stream.container, [], [], 0, False, 0.0
    name, time_bases = container.format.name, {s.index: float(s.time_base or 0) for s in container.streams}
    # Other containers, such as MPEG transport streams, are searched by dts. A keyframe with B-frames has an earlier dts
    # than pts, so a seek to its pts would land behind it
    by_pts = name.startswith("matroska") or container.format.flags & SEEK_TO_PTS
    for packet in container.demux():
        pts = packet.pts
        if packet.size and pts is not None:
            end = max(end, pts * time_bases.get(packet.stream_index, 0))
        if packet.size and packet.stream_index == stream.index:
            count, corrupt = count + 1, packet.is_corrupt
            if not packet.is_discard:  # a discarded one is decoded but not shown (an edit list)
                shown.append(pts)
            if packet.is_keyframe and pts is not None:
                keyframes.append((pts, pts if by_pts or packet.dts is None else packet.dts))
    # An edit list of an MP4 leaves the first frames out of the index
    promised = min(stream.frames, len(stream.index_entries)) if name.startswith("mov") else stream.frames
    seconds = (container.duration or 0) / av.time_base  # all that some headers promise
    by_time = not stream.frames and name.startswith(("matroska", "mov", "flv", "mxf"))
    is_short = end + 2 / float(stream.average_rate or stream.guessed_rate or 1) < 0.9 * seconds
    if corrupt or count < 0.99 * promised - 1 or (by_time and is_short):
        header = f"its header promises {promised} frames, {seconds:.1f} seconds"
        raise UserError(f"{path}: cut off after {count} frames, {end:.1f} seconds; {header}; download it again")
    # Of two recordings in one file the second may begin at an earlier time: the times are of no use
    return shown, keyframes if keyframes == sorted(keyframes) else []


# ---- Pixels


def as_shown(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """(H, W, C) turned and mirrored as the frame's display matrix says: a pixel (x, y) is shown at (a x + c y,
    b x + d y), up to a shift. FFmpeg's libavutil/display.h"""
    try:
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # PyAV has no name for some of the frame's data; it still tells the angle
        return np.rot90(pixels, frame.rotation // 90)
    if matrix is None:
        return pixels
    a, b, c, d = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    return as_shown(np.empty((frame.height, frame.width, 0)), frame).shape[:2]


def to_rgb(frame: av.VideoFrame, scaler: VideoReformatter, interpolation=None) -> np.ndarray:
    """(H, W, 3) uint8 as stored. Transparent pixels are laid on white.

    scaler: the same for all frames of a clip, as setting one up takes fifty times longer than a 64x64 frame.
    """
    if frame.format.has_palette or any(c.is_alpha for c in frame.format.components):
        rgba = scaler.reformat(frame, format="rgba", interpolation=interpolation, threads=1).to_ndarray()
        rgba, alpha = rgba.astype(np.uint16), rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return scaler.reformat(frame, format="rgb24", interpolation=interpolation, threads=1).to_ndarray()


def resize(rgb: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) uint8 -> (3, *size) uint8: antialiased bicubic in integers, as torchvision on uint8."""
    frame = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    return frame if rgb.shape[:2] == size else F.interpolate(frame[None], size, mode="bicubic", antialias=True)[0]


def decode(stream: av.VideoStream, wanted: set[int] | None) -> Iterator[av.VideoFrame]:
    """Frames from where the container stands; with `wanted` (pts), without those that neither it nor another frame
    needs, which takes a quarter less time."""
    for packet in stream.container.demux(stream):
        is_needed = wanted is None or not packet.size or packet.pts in wanted
        stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        yield from packet.decode()


def read_frames(path: str, indices: Sequence[int], seeks: Sequence[tuple[int | None, int]], size) -> list[Tensor]:
    """Frames of one video by number, each (3, *size) uint8. seeks: FrameIndex.seek of each."""
    scaler, frames = VideoReformatter(), {}
    with open_stream(path) as stream:
        smooth = SMOOTH if is_picture(stream.container) else None
        for position, run in groupby(dict.fromkeys(seeks), key=itemgetter(0)):
            missing = {time for _, time in run}
            last = max(missing)
            if position is not None:
                stream.container.seek(position, stream=stream)
            for number, frame in enumerate(decode(stream, None if position is None else missing)):
                time = number if position is None else frame.pts
                if time in missing:
                    missing.remove(time)
                    frames[position, time] = resize(as_shown(to_rgb(frame, scaler, smooth), frame), size)
                if not missing or (time is not None and time > last):
                    break
    missing = [i for i, seek in zip(indices, seeks, strict=True) if seek not in frames]
    counted = [(None, i) for i in indices]
    if missing and list(seeks) != counted:  # packets and frames do not match one to one: count frames
        return read_frames(path, indices, counted, size)
    if missing:
        raise UserError(f"{path}: frame {missing[0]} does not decode; the file may be damaged, write it again")
    return [frames[seek] for seek in seeks]


def read_image(path: str, size: tuple[int, int] | None = None, source: tuple[int, int] | None = None) -> Tensor:
    """The first picture of a file, (3, H, W) uint8, resized if a size is given. UserError unless it has the size
    `source`, if that is given."""
    with open_stream(path, picture=True) as stream:
        codec = stream.codec_context
        if codec.name == "mjpeg":  # one that breaks off would end in grey
            codec.options |= {"err_detect": "explode"}
        frame = next(stream.container.decode(stream), None)
        if frame is None:
            raise UserError(f"{path}: no picture in this file; write it again")
        rgb = to_rgb(frame, VideoReformatter(), SMOOTH)
    if codec.name == "tiff" and not rgb.any():
        raise UserError(f"{path}: black; a TIFF with a JPEG inside is not read, convert it to png")
    h, w = rgb.shape[:2]
    if source not in (None, (h, w)):
        raise UserError(f"{path}: {w} x {h} among frames of {source[1]} x {source[0]}; those of a clip have one size")
    return resize(rgb, size or (h, w))


def image_size(path: str) -> tuple[int, int]:
    with open_stream(path, picture=True) as stream:
        size = stream.codec_context.height, stream.codec_context.width
    return size if all(size) else tuple(read_image(path).shape[1:])

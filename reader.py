"""A video or image file -> the times of its frames, and their pixels. FFmpeg by PyAV.

    index_frames(path)          size, rate and times of all frames
    read_frames(path, ...)      frames of a video, each (3, H, W) uint8, as players show them
    read_image(path, size)      the first picture of a file, (3, H, W) uint8, as it is stored

A video's display matrix is obeyed: phones store clips turned or mirrored. A picture's EXIF rotation and the shape of
pixels are not, as in qwen-vl-utils. Sizes are (H, W). Everything raises UserError naming the file.
"""

import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
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
def errors_name(path: str) -> Iterator[None]:
    """A UserError inside begins with the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def open_stream(path: str, picture: bool = False) -> Iterator[av.VideoStream]:
    """A file's default video stream; of a picture, if that is expected. FFmpeg's errors inside become a UserError."""
    file_stamp(path)
    # The absolute path and these options keep playlists, "concat:..." and "%02d" from opening anything else
    limit = {"max_pixels": str(MAX_SOURCE_PIXELS)}
    options = {"protocol_whitelist": "file", "pattern_type": "none", **limit}
    try:
        with av.open(os.path.abspath(path), options=options, metadata_errors="replace") as container:
            stream = choose_stream(path, container)
            if picture and not is_picture(container):
                raise UserError(f"{path}: a video where a picture is expected; name it as a video")
            codec = stream.codec_context
            codec.options = limit  # a picture may be larger than the header says
            is_large = codec.width * codec.height >= THREADED_PIXELS
            codec.thread_type, codec.thread_count = ("AUTO", 0) if is_large else ("NONE", 1)
            yield stream
    except av.FFmpegError as error:
        reasons = "damaged, cut off, too large, or of a kind that FFmpeg does not read, as an animated webp"
        raise UserError(f"{path}: no readable video or image ({error.strerror}): {reasons}") from None


def choose_stream(path: str, container) -> av.VideoStream:
    """The default video stream, or else the largest. UserError where it would show only a part of the picture."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    readable = [s for s in streams if s.codec_context is not None]
    in_tiles = any(s.disposition & Disposition.dependent for s in streams)
    has_alpha = len(readable) > 1 and any((s.pix_fmt or "").startswith("gray") for s in readable)
    if container.format.name in NO_MEDIA:
        raise UserError(f"{path}: a playlist or text, no media file; name the video or image itself")
    if not readable:
        types = ", ".join(s.type for s in container.streams) or "nothing"
        raise UserError(f"{path}: no video that FFmpeg decodes, got {types}; convert it to h264, or a picture to png")
    if in_tiles or (has_alpha and is_picture(container)):  # a video may have its depth in a stream of its own
        problem = "a picture in tiles, or with its transparency in a stream of its own (HEIC, AVIF)"
        raise UserError(f"{path}: {problem}, which is not read; convert it to png")
    return max(readable, key=lambda s: (bool(s.disposition & Disposition.default), s.height * s.width, s.frames))


def is_picture(container) -> bool:
    """Whether a file holds pictures, one or an animation of them, by its format."""
    name = container.format.name
    still = name.endswith("_pipe") or name in ("image2", "ico", "gif", "apng")
    return still or container.metadata.get("major_brand") in PICTURE_BRANDS


# ---- Times of all frames


class FrameIndex(NamedTuple):
    """The N frames of a video file in the order shown."""

    size: tuple[int, int]  # as shown, after rotation
    fps: float
    times: list[float]  # N seconds since the first frame
    seeks: list[tuple[int | None, int]]  # N (where to seek, pts); (None, i): frame i, counted from the start


def index_frames(path: str) -> FrameIndex:
    """Of MP4, Matroska, and AVI without B-frames: from the packet headers and one decoded frame. Elsewhere times may
    be made up, missing, or not what a seek goes by: all frames are decoded. UserError for a broken file."""
    with open_stream(path) as stream:
        container = stream.container
        shown, keyframes = read_packets(path, stream)
        is_raw = container.format.long_name.startswith("raw")  # it has no header; the codec's may name a rate
        fps = float((stream.codec_context.framerate if is_raw else stream.average_rate) or stream.guessed_rate or 25)
        time_base = float(stream.time_base)
        is_plain_avi = container.format.name == "avi" and not stream.codec_context.has_b_frames
        has_times = is_plain_avi or container.format.name.startswith(("mov", "matroska"))
        if has_times and keyframes and is_increasing(shown):
            pts = shown[bisect_left(shown, keyframes[0]) :]  # nothing decodes before a keyframe
            container.seek(keyframes[0], stream=stream)
            size = next((shown_size(frame) for frame in container.decode(stream)), None)
            if size:
                seeks = [(keyframes[max(0, bisect_right(keyframes, time) - 1)], time) for time in pts]
                times = [(time - pts[0]) * time_base for time in pts]
                return FrameIndex(size, rate_of(times, fps), times, seeks)
    with open_stream(path) as stream:
        frames = [(frame.pts, shown_size(frame)) for frame in stream.container.decode(stream)]
    if not frames:
        raise UserError(f"{path}: none of its {len(shown)} frames decodes; write it again")
    pts, sizes = zip(*frames)
    if not is_increasing(pts) or is_raw:
        pts, time_base = range(len(frames)), 1 / fps
    counted = [(None, i) for i in range(len(pts))]
    times = [(time - pts[0]) * time_base for time in pts]
    return FrameIndex(sizes[0], rate_of(times, fps), times, counted)


def rate_of(times: Sequence[float], fps: float) -> float:
    """The header's rate, or the mean of the times where it is far from that: a slide show's names any."""
    mean = (len(times) - 1) / times[-1] if times[1:] else fps
    return fps if 2 / 3 < mean / fps < 1.5 else mean


def is_increasing(times: Sequence[int | None]) -> bool:
    return None not in times and all(a < b for a, b in pairwise(times))


def read_packets(path: str, stream: av.VideoStream) -> tuple[list[int | None], list[int]]:
    """(sorted pts of the frames that are shown, sorted pts of the keyframes). UserError where the file is cut off."""
    container, shown, keyframes, count, corrupt, end = stream.container, [], [], 0, False, 0.0
    for packet in container.demux():
        if packet.size and packet.pts is not None:
            end = max(end, packet.pts * float(packet.time_base or 0))
        if packet.size and packet.stream_index == stream.index:
            count, corrupt = count + 1, packet.is_corrupt
            if not packet.is_discard:  # a discarded one is decoded but not shown (an edit list)
                shown.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keyframes.append(packet.pts)
    name, rate = container.format.name, float(stream.average_rate or stream.guessed_rate or 1)
    if name == "avi":  # of frames that were dropped it has empty packets
        count = max(count, round(end * rate))
    # An edit list of an MP4 leaves the first frames out of the index
    promised = min(stream.frames, len(stream.index_entries)) if name.startswith("mov") else stream.frames
    seconds = (container.duration or 0) / av.time_base  # all that some headers promise
    by_time = not stream.frames and name.startswith(("matroska", "mov", "flv", "mxf"))
    is_short = end + 2 / rate < 0.9 * seconds
    if corrupt or count < 0.99 * promised - 1 or (by_time and is_short):
        header = f"its header promises {promised} frames, {seconds:.1f} seconds"
        raise UserError(f"{path}: cut off after {count} frames, {end:.1f} seconds; {header}; download it again")
    return shown if None in shown else sorted(shown), sorted(keyframes)


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
    height, width = frame.height, frame.width
    if interpolation is not None:
        frame = in_whole_cells(frame)
    if frame.format.has_palette or any(c.is_alpha for c in frame.format.components):
        rgba = scaler.reformat(frame, format="rgba", interpolation=interpolation, threads=1).to_ndarray()
        rgba, alpha = rgba.astype(np.uint16), rgba[..., 3:].astype(np.uint16)
        rgb = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = scaler.reformat(frame, format="rgb24", interpolation=interpolation, threads=1).to_ndarray()
    return rgb[:height, :width]


def in_whole_cells(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame with halved chroma and an odd side, with its last row or column repeated: where a chroma value has but
    half of its pixels, FFmpeg would stretch all of the chroma by less than two."""
    height, width = (side + side % 2 for side in (frame.height, frame.width))
    is_halved = frame.format.name.startswith("yuv") and "444" not in frame.format.name
    if not is_halved or (height, width) == (frame.height, frame.width):
        return frame
    whole = av.VideoFrame(width, height, frame.format.name)
    whole.colorspace, whole.color_range = frame.colorspace, frame.color_range
    for source, target in zip(frame.planes, whole.planes):
        size = 2 if frame.format.components[0].bits > 8 else 1  # bytes
        pixels = np.frombuffer(source, f"u{size}").reshape(source.height, -1)[:, : source.width]
        rows, columns = target.height - source.height, target.line_size // size - source.width
        target.update(np.pad(pixels, ((0, rows), (0, columns)), mode="edge"))
    return whole


def resize(rgb: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) uint8 -> (3, *size) uint8: antialiased bicubic in integers, as torchvision on uint8."""
    frame = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    return frame if rgb.shape[:2] == size else F.interpolate(frame[None], size, mode="bicubic", antialias=True)[0]


def decode(stream: av.VideoStream, wanted: set[int] | None) -> Iterator[av.VideoFrame]:
    """Frames from where the container stands; with `wanted` (pts), without those that neither it nor another frame
    needs, which takes a quarter less time. Not of AV1: its decoder asks only once, at its first packet."""
    if stream.codec_context.codec.canonical_name == "av1":
        wanted = None
    for packet in stream.container.demux(stream):
        is_needed = wanted is None or not packet.size or packet.pts in wanted
        stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        yield from packet.decode()


def read_frames(path: str, seeks: Sequence[tuple], size: tuple[int, int], skip: bool = True) -> list[Tensor]:
    """Frames of one video, each (3, *size) uint8. seeks: FrameIndex.seeks of each, in ascending order. skip: decode
    only what is needed; where that misses frames, as behind a keyframe that only begins a refresh, all are decoded."""
    scaler, frames = VideoReformatter(), {}
    with open_stream(path) as stream:
        smooth = SMOOTH if is_picture(stream.container) else None
        for position, run in groupby(dict.fromkeys(seeks), key=itemgetter(0)):
            missing = {time for _, time in run}
            if position is not None and skip:
                stream.container.seek(position, stream=stream)
            for number, frame in enumerate(decode(stream, missing if skip and position is not None else None)):
                time = number if position is None else frame.pts
                if time in missing:
                    missing.remove(time)
                    frames[position, time] = resize(as_shown(to_rgb(frame, scaler, smooth), frame), size)
                if not missing:
                    break
    missing = [time for position, time in seeks if (position, time) not in frames]
    if missing and skip:
        seeks = [(position and 0, time) for position, time in seeks]  # in one go, from the start
        return read_frames(path, seeks, size, skip=False)
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(seeks)} frames do not decode; write it again")
    return [frames[seek] for seek in seeks]


def read_image(path: str, size: tuple[int, int] | None = None, source: tuple[int, int] | None = None) -> Tensor:
    """The first picture of a file, (3, H, W) uint8, resized if a size is given. UserError unless it has the size
    `source`, if that is given: of another frame of the clip."""
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
    if source not in (None, rgb.shape[:2]):
        raise UserError(f"{path}: {rgb.shape[:2]} pixels among frames of {source}; those of a clip have one size")
    return resize(rgb, size or rgb.shape[:2])

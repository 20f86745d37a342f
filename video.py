"""A video file, a list of frame images, or one image -> uint8 patches for the vision tower.

    plan_clip(kind, paths, options)   which frames, when, at what size: reads packet headers and decodes one frame
    read_clip(plan)                   decodes those frames, resizes them and cuts them into patches: (P, 1176) uint8
    apply_control(patches, ...)       the same clip reversed, shuffled or blank

Frame sampling and sizes follow qwen-vl-utils 0.0.14 (vision_process.py), with two deliberate differences: an explicit
max_pixels beats a default min_pixels, and the rotation that phones store in a video is applied.
F frames, P patches, H and W pixels. Sizes are (H, W).
"""

import math
import os
import random
import stat
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch import Tensor

from model import UserError

PATCH, TEMPORAL, MERGE = 14, 2, 2  # pixels, frames, patches a side; the same in every Qwen2.5-VL
FACTOR = PATCH * MERGE  # 28: heights and widths are multiples of it
ROW = 3 * TEMPORAL * PATCH * PATCH  # 1176 values a patch
MEAN_COLOUR = (123, 116, 104)  # what normalisation subtracts: a blank clip of this colour becomes about zero

# Defaults of qwen-vl-utils 0.0.14
IMAGE_PIXELS = 4 * FACTOR**2, 16384 * FACTOR**2  # (min, max) after resizing
VIDEO_PIXELS = 128 * FACTOR**2, 768 * FACTOR**2  # of one frame
VIDEO_TOTAL_PIXELS = int(128000 * FACTOR**2 * 0.9)  # of all frames, per temporal patch
MAX_RATIO = 200  # of the sides

# Limits of a source file: a scan of a poster, a day of surveillance
MAX_SOURCE_PIXELS = 2**27
MAX_SOURCE_SECONDS = 24 * 3600
MAX_SOURCE_FRAMES = 30 * MAX_SOURCE_SECONDS
OPTION_RANGE = 1e-4, 2**31  # of the numbers in a record; beyond them positions or sizes overflow

THREADED_PIXELS = 1280 * 720  # smaller frames decode faster without threads
RESIZE_BYTES = 2**20  # small frames are resized many in one call: up to this many bytes of them
SEEK_TO_PTS = 0x4000000  # AVFMT_SEEK_TO_PTS of libavformat/avformat.h


@dataclass(frozen=True)
class Options:
    """How one video or image is sampled and resized. None = not set."""

    fps: float = 2.0  # frames a second; for a list of frames: the rate it was taken at
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    video_start: float | None = None  # seconds; only the frames from here on, as qwen-vl-utils takes them
    video_end: float | None = None

    @classmethod
    def from_args(cls, kind: str, args, item: dict, where: str) -> "Options":
        """The script's options (a config.VideoArgs), overruled by those of one item of a record.

        UserError, beginning with `where`, for an option that is unknown, out of range, or contradicts another.
        """
        sizes = ("min_pixels", "max_pixels", "resized_height", "resized_width")
        values = {name: getattr(args, f"{kind}_{name}") for name in sizes}
        values |= {name: getattr(args, name) for name in ("fps", "nframes", "min_frames", "max_frames")}
        item = {"fps" if name == "sample_fps" else name: value for name, value in item.items()}
        for name, value in item.items():
            if name not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise UserError(f"{where}: unknown {kind} option {name!r}; expected some of {known}")
            low, high = (0 if name == "video_start" else OPTION_RANGE[0]), OPTION_RANGE[1]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(f"{where}: {name} is {str(value)[:40]!r}; expected a number from {low} to {high}")
        if {"fps", "nframes"} <= set(item):
            raise UserError(f"{where}: fps {item['fps']} and nframes {item['nframes']} are both given; give one")
        if "fps" in item:
            values["nframes"] = None
        if "max_pixels" in item and values["min_pixels"] is not None:  # the item's bound beats the script's other bound
            values["min_pixels"] = min(values["min_pixels"], item["max_pixels"])
        if "min_pixels" in item and values["max_pixels"] is not None:
            values["max_pixels"] = max(values["max_pixels"], item["min_pixels"])
        options = cls(**values | item)
        low, high, height, width = (getattr(options, name) for name in sizes)
        if low is not None and high is not None and low > high:
            raise UserError(f"{where}: min_pixels {low} is above max_pixels {high}; lower the one or raise the other")
        if (height is None) != (width is None):
            raise UserError(f"{where}: resized_height {height}, resized_width {width}; give both or none")
        return options


@dataclass(frozen=True)
class ClipPlan:
    """Everything about a clip except its pixels."""

    kind: str  # "video" or "image"
    paths: tuple[str, ...]  # one file, or one image per frame
    indices: tuple[int, ...]  # F frame numbers; with the repetition of an odd last frame
    times: tuple[float, ...]  # F seconds since the first frame
    size: tuple[int, int]  # after resizing
    source_size: tuple[int, int]
    total_frames: int
    source_fps: float
    sample_fps: float
    seeks: tuple[tuple[int | None, int], ...] = ()  # of a video file: FrameIndex.seek of each frame
    notes: tuple[str, ...] = ()  # options that were overruled, and by what
    stamp: tuple = ()  # times and sizes of the files, so that a changed file is another clip in a cache

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        return max(1, len(self.indices) // TEMPORAL), self.size[0] // PATCH, self.size[1] // PATCH

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid_thw) // MERGE**2

    @property
    def second_per_grid(self) -> float:
        """Seconds from one temporal patch to the next; 0 for an image."""
        return TEMPORAL / self.sample_fps if self.kind == "video" else 0.0


# ---- Which frames


def smart_nframes(total: int, video_fps: float, options: Options) -> int:
    """Number of frames to sample of `total`: even, at least 2. Raises UserError when there are too few."""
    if options.nframes is not None:
        n = round(options.nframes / TEMPORAL) * TEMPORAL
        if not TEMPORAL <= n <= total:
            raise UserError(f"nframes {options.nframes} of a video with {total} frames; expected 2 to {total}")
        return n
    low = math.ceil(options.min_frames / TEMPORAL) * TEMPORAL
    high = math.floor(min(options.max_frames, total) / TEMPORAL) * TEMPORAL
    n = min(max(total / video_fps * options.fps, low), high, total)
    n = math.floor(n / TEMPORAL) * TEMPORAL
    if n < TEMPORAL:
        raise UserError(f"{total} frame(s); a video needs 2, a single picture is given as an image")
    return n


def frame_indices(total: int, n: int, first: int = 0) -> list[int]:
    """n of `total` frame numbers, evenly from `first` to the last. In float32, as qwen-vl-utils rounds them."""
    return torch.linspace(first, first + total - 1, n).round().long().tolist()


def frame_span(total: int, video_fps: float, options: Options) -> tuple[int, int]:
    """(first frame, number of frames) from video_start to video_end, as qwen-vl-utils' calculate_video_frame_range."""
    first, last, seconds = 0, total - 1, total / video_fps
    if options.video_start is not None:
        first = math.ceil(min(options.video_start, seconds) * video_fps)
    if options.video_end is not None:
        last = min(math.floor(min(options.video_end, seconds) * video_fps), last)
    if first >= last and total > 1:
        span = f"video_start {options.video_start}, video_end {options.video_end}"
        raise UserError(f"{span}: no two frames of its {seconds:.2f} seconds lie between them")
    return first, last - first + 1


# ---- Which size


def smart_resize(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Multiples of 28 near (height, width) with an area within the bounds. UserError above a side ratio of 200."""
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UserError(f"sides {height} x {width}: their ratio is above {MAX_RATIO}; crop it")
    h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if h * w > max_pixels:
        return shrink(height, width, max_pixels)
    if h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / FACTOR) * FACTOR for side in (height, width))
    return h, w


def shrink(height: int, width: int, max_pixels: float) -> tuple[int, int]:
    beta = math.sqrt(height * width / max_pixels)
    return tuple(max(FACTOR, math.floor(side / beta / FACTOR) * FACTOR) for side in (height, width))


def frame_size(kind: str, height: int, width: int, n: int, options: Options) -> tuple[int, int, list[str]]:
    """(H, W) after resizing of one frame among n, and notes on options that were overruled."""
    if options.resized_height is not None:
        wanted = options.resized_height, options.resized_width
        h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in wanted)
        if h * w > IMAGE_PIXELS[1]:
            raise UserError(f"resized to {h} x {w}: above {IMAGE_PIXELS[1]} pixels a frame; ask for less")
        note = f"resized_height and _width {wanted} are rounded to {(h, w)}, multiples of {FACTOR}"
        return h, w, [] if (h, w) == wanted else [note]
    notes, asked = [], options.max_pixels
    low, high = IMAGE_PIXELS if kind == "image" else VIDEO_PIXELS
    if options.min_pixels is not None:
        low = options.min_pixels
    elif asked is not None and asked < low:
        notes.append(f"max_pixels {asked} is below the default minimum {low}; the minimum falls to it")
        low = asked
    if kind == "image":
        high = asked or max(high, low)
    else:
        total = options.total_pixels or VIDEO_TOTAL_PIXELS
        high = max(min(high, total / n * TEMPORAL), int(low * 1.05))
        if asked is not None and asked > high:
            notes.append(f"max_pixels {asked} is lowered to {int(high)}, the limit of a frame among {n}")
        high = min(asked or high, high)
    h, w = smart_resize(height, width, low, high)
    if options.min_pixels is None and asked is not None and h * w > high:
        h, w = shrink(height, width, high)  # enlarging to the default minimum went past the explicit maximum
    return h, w, notes


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


def open_stream(path: str) -> av.VideoStream:
    """The file's video stream. UserError without one, or above a limit. The caller closes stream.container."""
    file_stamp(path)
    # The absolute path and these options keep playlists, "concat:..." and "%02d" from opening anything else
    limit = {"max_pixels": str(MAX_SOURCE_PIXELS)}
    options = {"protocol_whitelist": "file", "pattern_type": "none", **limit}
    try:
        container = av.open(os.path.abspath(path), options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        message = f"{path}: no readable video or image ({error.strerror})"
        raise UserError(f"{message}; it may be cut off or of another type") from None
    streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    types = ", ".join(s.type for s in container.streams) or "nothing"
    frames, seconds = max([s.frames for s in streams], default=0), (container.duration or 0) / av.time_base
    problem = None
    if not streams:
        problem = f"no video in this file, found {types}; expected a video stream"
    elif streams[0].codec_context is None:
        problem = "no decoder for this video's codec; convert it to h264"
    elif seconds > MAX_SOURCE_SECONDS or frames > MAX_SOURCE_FRAMES:
        most = f"{MAX_SOURCE_SECONDS} seconds or {MAX_SOURCE_FRAMES} frames"
        problem = f"{seconds:.0f} seconds, {frames} frames, above the limit of {most}; cut it"
    if problem:
        container.close()
        raise UserError(f"{path}: {problem}")
    streams[0].codec_context.options = limit  # a picture may be larger than the header says
    return streams[0]


@contextmanager
def ffmpeg_errors(path: str):
    """FFmpeg's errors inside become a UserError. A picture above max_pixels is one of them."""
    try:
        yield
    except av.FFmpegError as error:
        message = f"{path}: does not decode ({error.strerror})"
        raise UserError(f"{message}; it may be damaged, cut off or too large, write it again") from None


class OpenFile(threading.local):
    """The file that this thread indexed last, still open: opening a small file takes as long as decoding it."""

    stamp = stream = None

    def take(self, stamp: tuple | None) -> av.VideoStream | None:
        """The open stream if it is of this very file, unchanged. Any other is closed, and None comes back."""
        stream, self.stream = self.stream, None
        if stream is not None and self.stamp != stamp:
            stream.container.close()
            return None
        return stream


open_file = OpenFile()


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
    open_file.take(None)
    open_file.stamp, open_file.stream = file_stamp(path), open_stream(path)
    stream = open_file.stream
    rate, time_base = stream.average_rate or stream.guessed_rate, float(stream.time_base)
    with ffmpeg_errors(path):
        shown, keyframes = read_packets(path, stream)
        pts = sorted(t for t in shown if t is not None)
        # AVI stores no presentation times. FFmpeg makes some up; for H.264 with B-frames they are in decoding order
        made_up = stream.container.format.name == "avi" and stream.codec_context.has_b_frames and pts == shown
        untimed = len(set(pts)) < len(shown) or not keyframes or made_up
        if untimed:  # all frames are decoded and counted
            open_file.take(None)
            stream = open_stream(path)
            with stream.container:
                frames = [shown_size(frame) for frame in decode(stream)]
        else:
            pts = pts[bisect_left(pts, keyframes[0][0]) :]  # cut at its head: nothing decodes before a keyframe
            stream.container.seek(keyframes[0][1], stream=stream)
            frames = [shown_size(frame) for frame in islice(decode(stream), 1)]  # only a frame knows its rotation
    if not frames or not pts and not untimed:
        raise UserError(f"{path}: none of its {len(shown)} frames decodes; write it again")
    if untimed:
        fps = float(rate or 25)  # 25: FFmpeg's own guess for raw streams
        return FrameIndex(frames[0], fps, list(range(len(frames))), 1 / fps, [])
    fps = float(rate) if rate else (len(pts) - 1) / max((pts[-1] - pts[0]) * time_base, 1e-9)
    return FrameIndex(frames[0], fps, pts, time_base, keyframes)


def read_packets(path: str, stream: av.VideoStream) -> tuple[list[int | None], list[tuple[int, int]]]:
    """(pts of each frame that is shown, sorted (pts, seek time) of the keyframes). UserError for a cut off file."""
    container, shown, keyframes, count, corrupt, end = stream.container, [], [], 0, False, 0.0
    matroska = "matroska" in container.format.name
    # Other containers, such as MPEG transport streams, are searched by dts. A keyframe with B-frames has an earlier dts
    # than pts, so a seek to its pts would land behind it
    by_pts = matroska or container.format.flags & SEEK_TO_PTS
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
    if count < 0.99 * stream.frames - 1 or corrupt:
        raise UserError(f"{path}: cut off: {count} frames, its header promises {stream.frames}; download it again")
    seconds = (container.duration or 0) / av.time_base  # all that Matroska's header promises
    if matroska and end + 2 / float(stream.average_rate or stream.guessed_rate or 1) < 0.9 * seconds:
        raise UserError(f"{path}: cut off: {end:.1f} seconds, its header promises {seconds:.1f}; download it again")
    return shown, sorted(keyframes)


# ---- Pixels


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


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


def to_rgb(frame: av.VideoFrame, scaler: VideoReformatter, rotate: bool = True) -> np.ndarray:
    """(H, W, 3) uint8. Transparent pixels are laid on white.

    scaler: the same for all frames of a clip, as setting one up takes fifty times longer than a 64x64 frame.
    """
    if frame.format.has_palette or any(c.is_alpha for c in frame.format.components):
        rgba = scaler.reformat(frame, format="rgba", threads=1).to_ndarray().astype(np.uint16)
        alpha = rgba[..., 3:]
        rgb = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        rgb = scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(rgb, frame.rotation // 90) if rotate and frame.rotation else rgb


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
    frames = decode_frames(path, open_file.take(file_stamp(path)) or open_stream(path), seeks, size)
    if any(seek not in frames for seek in seeks):  # packets and frames do not match one to one: count frames
        seeks = [(None, i) for i in indices]
        frames = decode_frames(path, open_stream(path), seeks, size)
    missing = [i for i, seek in zip(indices, seeks, strict=True) if seek not in frames]
    if missing:
        problem = f"{path}: frame {missing[0]} is announced but does not decode"
        raise UserError(f"{problem}; the file may be damaged, write it again")
    return [frames[seek] for seek in seeks]


def decode_frames(path: str, stream: av.VideoStream, seeks: Sequence, size) -> dict[tuple, Tensor]:
    """{seek: frame} of those of `seeks` that decode. The stream's file is closed."""
    scaler, decoded = VideoReformatter(), []

    def pictures() -> Iterator[np.ndarray]:
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
                    yield to_rgb(frame, scaler)
                if not missing or (time is not None and time > last):
                    break

    with stream.container, ffmpeg_errors(path):
        frames = list(resize(pictures(), size))
    return dict(zip(decoded, frames, strict=True))


def read_image(path: str, size: tuple[int, int] | None = None) -> Tensor:
    """The first picture of an image file, (3, H, W) uint8, resized if a size is given."""
    stream = open_stream(path)
    with stream.container, ffmpeg_errors(path):
        if stream.codec_context.name == "mjpeg":  # one that breaks off would end in grey; a TIFF would fail at any tag
            stream.codec_context.options |= {"err_detect": "explode"}
        frame = next(decode(stream), None)
        if frame is None:
            raise UserError(f"{path}: no picture in this file; write it again")
        rgb = to_rgb(frame, VideoReformatter(), rotate=False)
    return next(resize([rgb], size or rgb.shape[:2]))


def image_size(path: str) -> tuple[int, int]:
    stream = open_stream(path)
    with stream.container:
        size = stream.codec_context.height, stream.codec_context.width
    return size if all(size) else tuple(read_image(path).shape[1:])


# ---- Plan and read


def plan_clip(kind: str, paths: tuple[str, ...], options: Options, most_frames: int | None = None, size=None):
    """Which frames of a clip, and at what size: a ClipPlan.

    kind: "video" (one file, or one image file per frame) or "image". most_frames, size: set by the token budget of a
    sample, on top of the options. Raises UserError naming the file.
    """
    is_file = kind == "video" and len(paths) == 1
    source = index_frames(paths[0]) if is_file else image_size(paths[0])
    try:
        plan = (plan_video if is_file else plan_pictures)(kind, paths, source, options, most_frames)
    except UserError as error:  # of the options, or of the picture's shape
        raise UserError(f"{paths[0]}: {error}") from None
    return plan if size is None else replace(plan, size=size)


def plan_video(kind: str, paths, frames: FrameIndex, options: Options, most_frames: int | None) -> ClipPlan:
    total, fps, notes = len(frames.pts), frames.fps, []
    first, span = frame_span(total, fps, options)
    n = smart_nframes(span, fps, options)
    by_rate = span / fps * options.fps
    if options.nframes is None and not n <= by_rate < n + TEMPORAL:
        asked = f"fps {options.fps:g} asks for {by_rate:.1f} of {span} frames"
        notes.append(f"{asked}; min_frames and max_frames make it {n}")
    n = min(n, most_frames or n)
    h, w, size_notes = frame_size("video", *frames.size, n, options)
    indices = tuple(frame_indices(span, n, first))
    times, seeks = tuple(map(frames.seconds, indices)), tuple(map(frames.seek, indices))
    notes = (*notes, *size_notes)
    return ClipPlan(kind, paths, indices, times, (h, w), frames.size, total, fps, n / span * fps, seeks, notes)


def plan_pictures(kind: str, paths, source: tuple[int, int], options: Options, most_frames: int | None) -> ClipPlan:
    """An image; or a list of frames, taken whole, an odd last one repeated. nframes and max_frames thin it out."""
    total = len(paths)
    if (options.video_start, options.video_end) != (None, None):
        raise UserError("video_start and video_end need one video file")
    if kind == "image":
        h, w, notes = frame_size(kind, *source, 1, options)
        return ClipPlan(kind, paths, (0,), (0.0,), (h, w), source, 1, 0.0, 0.0, notes=tuple(notes))
    n = options.nframes or min(total, options.max_frames)
    n = min(n, most_frames or n)
    if n > total:
        raise UserError(f"nframes {n} of a list of {total} frames; expected at most {total}")
    indices = list(range(total)) if n == total else frame_indices(total, math.ceil(n / TEMPORAL) * TEMPORAL)
    rates = options.fps, options.fps * len(indices) / total  # of the list, and of what is taken of it
    indices += indices[-1:] * (len(indices) % TEMPORAL)
    h, w, notes = frame_size(kind, *source, len(indices), options)
    times = tuple(i / options.fps for i in indices)
    return ClipPlan(kind, paths, tuple(indices), times, (h, w), source, total, *rates, notes=tuple(notes))


def read_clip(plan: ClipPlan) -> Tensor:
    """The planned frames as patches: (P, 1176) uint8. Raises UserError naming the file."""
    if plan.kind == "video" and len(plan.paths) == 1:
        frames = read_frames(plan.paths[0], plan.indices, plan.seeks, plan.size)
    else:
        frames = [read_image(plan.paths[i], plan.size) for i in plan.indices]
    times = TEMPORAL if plan.kind == "image" else 1  # an image is a clip of two equal frames
    return to_patches(torch.stack(frames * times))


def to_patches(frames: Tensor) -> Tensor:
    """(F, 3, H, W) -> (P, 1176). The 4 patches of a merge cell are neighbours; a row is (colour, frame, y, x)."""
    n, c, h, w = frames.shape
    assert n % TEMPORAL == 0 and h % FACTOR == 0 and w % FACTOR == 0, f"{n} frames of {h} x {w}"
    x = frames.reshape(n // TEMPORAL, TEMPORAL, c, h // FACTOR, MERGE, PATCH, w // FACTOR, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * TEMPORAL * PATCH * PATCH)


def from_patches(patches: np.ndarray, grid_thw) -> np.ndarray:
    """(P, 1176) -> frames (F, H, W, 3) uint8: undoes to_patches."""
    t, h, w = grid_thw
    x = patches.reshape(t, h // MERGE, w // MERGE, MERGE, MERGE, 3, TEMPORAL, PATCH, PATCH)
    return x.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(TEMPORAL * t, PATCH * h, PATCH * w, 3)


# ---- Controls for evaluation


def apply_control(patches: Tensor, grid_thw, control: str, seed: str) -> tuple[Tensor, list[int]]:
    """A clip's patches with its frames in another order, or blank; and that order. The input is not changed.

    control: none, reversed, shuffled (neither forwards nor backwards; the same for the same seed) or blank.
    """
    t = grid_thw[0]
    order = list(range(t * TEMPORAL))
    if control == "blank":
        row = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).repeat_interleave(ROW // 3)
        return row.expand(len(patches), ROW).contiguous(), order
    if control == "reversed":
        order.reverse()
    elif control == "shuffled":
        if len(order) < 3:
            raise UserError(f"control shuffled: {len(order)} frames have only two orders; take more frames")
        forward, rng = list(order), random.Random(seed)
        while order in (forward, forward[::-1]):
            rng.shuffle(order)
    else:
        assert control == "none", f"control {control!r}, expected none, reversed, shuffled or blank"
        return patches, order
    x = patches.view(t, -1, 3, TEMPORAL, PATCH * PATCH).permute(0, 3, 1, 2, 4)  # (T, frame, cell, colour, pixel)
    x = x.reshape(t * TEMPORAL, *x.shape[2:])[order].view(x.shape)
    return x.permute(0, 2, 3, 1, 4).reshape(patches.shape), order

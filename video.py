"""A video file, a list of frame images, or one image -> uint8 patches for the vision tower.

    plan_clip(kind, paths, options)   which frames, when, at what size: reads packet headers and decodes one frame
    read_clip(plan)                   decodes those frames, resizes them and cuts them into patches: (P, 1176) uint8
    apply_control(patches, ...)       the same clip reversed, shuffled or blank

Frame sampling and sizes follow qwen-vl-utils 0.0.14 (vision_process.py), except that an explicit max_pixels beats a
default min_pixels. reader.py reads the files.
F frames, P patches, H and W pixels. Sizes are (H, W).
"""

import math
import os
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import UserError
from reader import errors_name, index_frames, read_frames, read_image
from records import IMAGE_SUFFIXES

PATCH, TEMPORAL, MERGE = 14, 2, 2  # pixels, frames, patches a side; the same in every Qwen2.5-VL
FACTOR = PATCH * MERGE  # 28: heights and widths are multiples of it
ROW = 3 * TEMPORAL * PATCH * PATCH  # 1176 values a patch
MEAN_COLOUR = (123, 116, 104)  # what normalisation subtracts: a blank clip of this colour becomes about zero

# Defaults of qwen-vl-utils 0.0.14
IMAGE_PIXELS = 4 * FACTOR**2, 16384 * FACTOR**2  # (min, max) after resizing
VIDEO_PIXELS = 128 * FACTOR**2, 768 * FACTOR**2  # of one frame
VIDEO_TOTAL_PIXELS = int(128000 * FACTOR**2 * 0.9)  # of all frames, per temporal patch
MAX_RATIO = 200  # of the sides
SMALLEST, LARGEST = 1e-4, 2**31  # of the numbers in a record; beyond them positions or sizes overflow
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # the options of an image


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
    def from_args(cls, kind: str, args, item: dict) -> "Options":
        """The script's options (a config.VideoArgs), overruled by those of one item of a record. UserError for an
        option that is unknown, out of range, or contradicts another."""
        known = SIZES if kind == "image" else cls.__dataclass_fields__
        values = {name: getattr(args, f"{kind}_{name}") for name in SIZES}
        values |= {name: getattr(args, name) for name in ("fps", "nframes", "min_frames", "max_frames")}
        item = {"fps" if name == "sample_fps" else name: value for name, value in item.items()}
        for name, value in item.items():
            low = 0 if name == "video_start" else SMALLEST
            if name not in known or type(value) not in (int, float) or not low <= value <= LARGEST:
                expected = f"one of {', '.join(known)}, from {low} to {LARGEST}"
                raise UserError(f"{kind} option {name}: {str(value)[:40]}; expected {expected}")
        if {"fps", "min_frames", "max_frames"} & set(item):  # these say how many frames, unless the item's nframes does
            values["nframes"] = None
        if "max_pixels" in item and values["min_pixels"]:  # the item's bound beats the script's other bound
            values["min_pixels"] = min(values["min_pixels"], item["max_pixels"])
        if "min_pixels" in item and values["max_pixels"]:
            values["max_pixels"] = max(values["max_pixels"], item["min_pixels"])
        options = cls(**values | item)
        bounds = (options.min_pixels or 0) > (options.max_pixels or math.inf)
        half_a_size = (options.resized_height is None) != (options.resized_width is None)
        if bounds or half_a_size:
            rules = "min_pixels at most max_pixels, both of resized_height and resized_width or none"
            raise UserError(f"options that contradict each other, {values | item}; expected {rules}")
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
    second_per_grid: float  # from one temporal patch to the next; 0 for an image
    seeks: tuple[tuple[int | None, int], ...]  # of a video file: FrameIndex.seeks of each frame
    notes: tuple[str, ...]  # options that were overruled, and by what
    stamp: tuple  # times and sizes of the files, so that a changed file is another clip in a cache

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        return max(1, len(self.indices) // TEMPORAL), self.size[0] // PATCH, self.size[1] // PATCH

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid_thw) // MERGE**2


# ---- Which frames


def smart_nframes(total: int, video_fps: float, options: Options) -> int:
    """Number of frames to sample of `total`: even, at least 2. Raises UserError when there are too few."""
    if options.nframes is not None:
        n = round(options.nframes / TEMPORAL) * TEMPORAL
    else:
        low = math.ceil(options.min_frames / TEMPORAL) * TEMPORAL
        high = math.floor(min(options.max_frames, total) / TEMPORAL) * TEMPORAL
        n = math.floor(min(max(total / video_fps * options.fps, low), high, total) / TEMPORAL) * TEMPORAL
    if not TEMPORAL <= n <= total:
        wanted = f"nframes {options.nframes}" if options.nframes is not None else f"max_frames {options.max_frames}"
        raise UserError(f"{wanted} of a video with {total} frames; expected 2 to {total}")
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
    if first > last or first == last and total > 1:
        span = f"video_start {options.video_start}, video_end {options.video_end}"
        raise UserError(f"{span}: no two frames of its {seconds:.2f} seconds lie between them")
    return first, last - first + 1


def sample_frames(total: int, fps: float, options: Options, listed: bool) -> tuple[list[int], float]:
    """(frame numbers, frames a second of them). A list of frames is taken whole unless nframes or max_frames thin it
    out; an odd last one is repeated."""
    first, span = frame_span(total, fps, options)
    if listed:
        most = (total > 1 and options.nframes) or options.max_frames
        n = min(span, math.ceil(most / TEMPORAL) * TEMPORAL)
    else:
        n = smart_nframes(span, fps, options)
    indices = frame_indices(span, n, first)
    return indices + indices[-1:] * (n % TEMPORAL), n / span * fps


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
        h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (options.resized_height, options.resized_width))
        if h * w > IMAGE_PIXELS[1]:
            raise UserError(f"resized to {h} x {w}: above {IMAGE_PIXELS[1]} pixels a frame; ask for less")
        return h, w, []
    least, most, notes = options.min_pixels, options.max_pixels, []
    low, high = IMAGE_PIXELS if kind == "image" else VIDEO_PIXELS
    low = least or min(low, most or low)
    if kind == "image":
        high = most or max(high, low)
    else:
        total = options.total_pixels or VIDEO_TOTAL_PIXELS
        high = max(min(high, total / n * TEMPORAL), int(low * 1.05))
        if most is not None and most > high:
            notes.append(f"max_pixels {most} is lowered to {int(high)}, the limit of a frame among {n}")
        high = min(most or high, high)
    h, w = smart_resize(height, width, low, high)
    if least is None and most is not None and h * w > high:
        h, w = shrink(height, width, high)  # enlarging to the default minimum went past the explicit maximum
    return h, w, notes


# ---- Plan and read


def frames_in(folder: str) -> tuple[str, ...]:
    """The images of a folder, the frames of one clip, by number: 2.jpg before 10.jpg. UserError without any."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    if not names:
        raise UserError(f"{folder}: a folder without images; expected the frames of a clip, or give one file")
    names.sort(key=lambda name: [int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", name))])
    return tuple(os.path.join(folder, name) for name in names)


def plan_clip(kind: str, paths: tuple[str, ...], options: Options, stamp: tuple = ()) -> ClipPlan:
    """Which frames of a clip, and at what size. kind: "video" (one file, or one image file per frame) or "image".
    stamp: reader.file_stamp of each file. UserError."""
    index = index_frames(paths[0]) if kind == "video" and len(paths) == 1 else None
    source = index.size if index else tuple(read_image(paths[0]).shape[1:])
    total = len(index.times) if index else len(paths)
    fps = 0.0 if kind == "image" else index.fps if index and total > 1 else options.fps
    indices, sample_fps, notes = [0], math.inf, []
    with errors_name(paths[0]):
        if kind == "video":
            indices, sample_fps = sample_frames(total, fps, options, listed=index is None or total == 1)
        h, w, size_notes = frame_size(kind, *source, len(indices), options)
    if kind == "video" and total == 1:
        notes.append("one picture where a video is expected: a clip of two equal frames")
    times = tuple(index.times[i] if index else i / options.fps for i in indices)
    if index and total > 1:
        off, time, by_rate = max((abs(time - i / fps), time, i / fps) for time, i in zip(times, indices))
        if off > 1 / sample_fps / 4:
            shown = f"a frame of {time:.2f} s counts as one of {by_rate:.2f} s"
            notes.append(f"the frame rate varies, time ids follow its mean, {fps:.4g}: {shown}")
    return ClipPlan(
        kind=kind,
        paths=paths,
        indices=tuple(indices),
        times=times,
        size=(h, w),
        source_size=source,
        total_frames=total,
        source_fps=fps,
        second_per_grid=TEMPORAL / sample_fps,
        seeks=tuple(index.seeks[i] for i in indices) if index else (),
        notes=(*notes, *size_notes),
        stamp=stamp,
    )


def read_clip(plan: ClipPlan) -> Tensor:
    """The planned frames as patches: (P, 1176) uint8. Raises UserError naming the file."""
    if plan.seeks:
        frames = read_frames(plan.paths[0], plan.seeks, plan.size)
    else:
        frames = [read_image(plan.paths[i], plan.size, plan.source_size) for i in plan.indices]
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


def apply_control(patches: Tensor, grid_thw, control: str, seed: str) -> tuple[Tensor, list[int]]:
    """A clip's patches with its frames in another order, or blank; and that order. The input is not changed.

    control: none, reversed, shuffled (neither forwards nor backwards; the same for the same seed) or blank.
    """
    t = grid_thw[0]
    order = list(range(t * TEMPORAL))
    if control == "none":
        return patches, order
    if control == "blank":
        row = torch.tensor(MEAN_COLOUR, dtype=torch.uint8).repeat_interleave(ROW // 3)
        return row.expand(len(patches), ROW).contiguous(), order
    if control == "reversed":
        order.reverse()
    elif len(order) < 3:
        raise UserError(f"control shuffled: {len(order)} frames have only two orders; take more frames")
    else:
        forward, rng = list(order), random.Random(seed)
        while order in (forward, forward[::-1]):
            rng.shuffle(order)
    frames = torch.from_numpy(from_patches(patches.numpy(), grid_thw)[order])
    return to_patches(frames.permute(0, 3, 1, 2)), order

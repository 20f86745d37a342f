"""A video file, a list of frames or an image -> the chosen frames, resized -> (P, 1176) uint8 patch rows.

    plan_clip(kind, paths, options)   which frames, at what times, at what size: reads packet headers, decodes one frame
    read_clip(plan)                   decodes those frames only, resizes each, and lays the patches in 2x2-block order
    apply_control(patches, ...)       the same clip reversed, shuffled or blanked

Frame choice and sizes follow qwen-vl-utils 0.0.14 (vision_process.py), made for the hub's checkpoints. What differs, on
purpose: an explicit max_pixels beats a default min_pixels, and the rotation that phones write into a video is applied.
Decoding is reader.py's duty; records, chat text and batches are data.py's.

F frames, P patches, M merged vision tokens (P / 4), C = 3 colours, H and W pixels.
"""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset.reader import image_size, read_frames, read_image, read_packets
from model import UserError

PATCH, TEMPORAL, MERGE = 14, 2, 2  # pixels, frames, patches a side; every Qwen2.5-VL config.json has these
FACTOR = PATCH * MERGE  # 28: heights and widths are multiples of it
ROW = 3 * TEMPORAL * PATCH * PATCH  # 1176 values a patch

# qwen-vl-utils 0.0.14, vision_process.py
IMAGE_MIN_PIXELS = 4 * FACTOR**2
IMAGE_MAX_PIXELS = 16384 * FACTOR**2
VIDEO_MIN_PIXELS = 128 * FACTOR**2
VIDEO_MAX_PIXELS = 768 * FACTOR**2
VIDEO_TOTAL_PIXELS = int(128000 * FACTOR**2 * 0.9)  # of all frames, per temporal patch
MAX_RATIO = 200  # of the sides

GREY = (123, 116, 104)  # the mean colour that normalisation subtracts, so that a blank clip is about zero


@dataclass(frozen=True)
class Options:
    """How one video or image is sampled and sized. None = not asked for."""

    fps: float = 2.0  # frames a second; for a list of frames: the rate it was taken at
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    @classmethod
    def of(cls, kind: str, args, item: dict, where: str) -> "Options":
        """The script's options (a VideoArgs), overruled by those of one item of a record. Unknown ones raise."""
        sized = ("min_pixels", "max_pixels", "resized_height", "resized_width")
        base = {name: getattr(args, f"{kind}_{name}") for name in sized}
        base |= {name: getattr(args, name) for name in ("fps", "nframes", "min_frames", "max_frames")}
        item = {"fps" if name == "sample_fps" else name: value for name, value in item.items()}
        unknown = sorted(set(item) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise UserError(f"{where}: unknown {kind} option {unknown[0]!r}; expected some of {known}")
        for name, value in item.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{where}: {name} is {value!r}; expected a number above 0")
        if "fps" in item:
            base["nframes"] = None
        for mine, other in (("max_pixels", "min_pixels"), ("min_pixels", "max_pixels")):
            if mine in item and other not in item and base[other] is not None:  # the item's bound beats the script's
                base[other] = (min if other == "min_pixels" else max)(base[other], item[mine])
        options = cls(**base | item)
        options.check(where, both_rates={"fps", "nframes"} <= set(item))
        return options

    def check(self, where: str, both_rates: bool = False) -> None:
        low, high = self.min_pixels, self.max_pixels
        if low is not None and high is not None and low > high:
            raise UserError(f"{where}: min_pixels {low} is above max_pixels {high}; lower the one or raise the other")
        if (self.resized_height is None) != (self.resized_width is None):
            found = f"resized_height {self.resized_height}, resized_width {self.resized_width}"
            raise UserError(f"{where}: {found}; give both or none")
        if both_rates:
            raise UserError(f"{where}: fps {self.fps} and nframes {self.nframes} are both given; give one")


@dataclass(frozen=True)
class ClipPlan:
    """Everything about a clip but its pixels."""

    kind: str  # "video" or "image"
    paths: tuple[str, ...]  # one file, or one per frame
    indices: tuple[int, ...]  # F frame numbers in presentation order; the odd one's repetition included
    times: tuple[float, ...]  # F seconds since the first frame
    size: tuple[int, int]  # H, W after resizing
    source_size: tuple[int, int]
    total_frames: int
    source_fps: float
    sample_fps: float
    seeks: tuple[tuple[int, int], ...] = ()  # of a file: a frame's (keyframe's seek time, own time) in stream units
    notes: tuple[str, ...] = ()  # options that were overruled, and by what
    stamp: tuple = ()  # times and sizes of the files, so that a changed file is another clip

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        return max(1, len(self.indices) // TEMPORAL), self.size[0] // PATCH, self.size[1] // PATCH

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid_thw) // MERGE**2

    @property
    def second_per_grid(self) -> float:
        """Seconds from one grid step to the next; 0 for an image."""
        return TEMPORAL / self.sample_fps if self.kind == "video" else 0.0


# -- Which frames


def smart_nframes(total: int, video_fps: float, options: Options) -> int:
    """Number of frames to take of `total`: even, at least 2. Raises UserError when there are too few."""
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


def frame_indices(total: int, n: int) -> list[int]:
    """n frame numbers from the first to the last. float32, because qwen-vl-utils rounds torch.linspace's values."""
    return torch.linspace(0, total - 1, n).round().long().tolist()


# -- What size


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
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


def shrink(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    beta = math.sqrt(height * width / max_pixels)
    return tuple(max(FACTOR, math.floor(side / beta / FACTOR) * FACTOR) for side in (height, width))


def pixel_bounds(kind: str, n: int, options: Options) -> tuple[int, float, list[str]]:
    """(min_pixels, max_pixels, notes) of one frame among n."""
    notes = []
    default_min = IMAGE_MIN_PIXELS if kind == "image" else VIDEO_MIN_PIXELS
    low, asked = options.min_pixels, options.max_pixels
    if low is None:
        low = default_min
        if asked is not None and asked < default_min:
            low = asked
            notes.append(f"max_pixels {asked} is below the default minimum {default_min}; the minimum falls to it")
    if kind == "image":
        return low, max(IMAGE_MAX_PIXELS, low) if asked is None else asked, notes
    total = options.total_pixels or VIDEO_TOTAL_PIXELS
    high = max(min(VIDEO_MAX_PIXELS, total / n * TEMPORAL), int(low * 1.05))
    if asked is not None and asked > high:
        notes.append(f"max_pixels {asked} is lowered to {int(high)}, the limit of a frame among {n}")
    return low, high if asked is None else min(asked, high), notes


def frame_size(kind: str, height: int, width: int, n: int, options: Options) -> tuple[int, int, list[str]]:
    """Height and width after resizing, and notes on options that were overruled."""
    if options.resized_height is not None:
        asked = (options.resized_height, options.resized_width)
        h, w = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in asked)
        if h * w > IMAGE_MAX_PIXELS:
            raise UserError(f"resized to {h} x {w}: above {IMAGE_MAX_PIXELS} pixels a frame; ask for less")
        note = f"resized_height and _width {asked} are rounded to {(h, w)}, multiples of {FACTOR}"
        return h, w, [] if (h, w) == asked else [note]
    low, high, notes = pixel_bounds(kind, n, options)
    h, w = smart_resize(height, width, low, high)
    if options.min_pixels is None and options.max_pixels is not None and h * w > high:
        h, w = shrink(height, width, high)  # enlarging to the default minimum went past the maximum that was asked for
    return h, w, notes


# -- Plan and read


def plan_clip(kind: str, paths: tuple[str, ...], options: Options, most_frames: int | None = None, size=None):
    """Which frames of a clip, and at what size: a ClipPlan.

    kind: "video" (one file, or one image file per frame) or "image". most_frames, size: bounds that a sample's token
    budget sets on top of the options. Raises UserError naming the file.
    """
    try:
        if kind == "image":
            plan = plan_image(paths[0], options)
        else:
            plan = (plan_frames if len(paths) > 1 else plan_video)(paths, options, most_frames)
    except UserError as error:
        told = str(error)
        raise UserError(told if any(path in told for path in paths) else f"{paths[0]}: {told}") from None
    return plan if size is None else replace(plan, size=size)


def plan_image(path: str, options: Options) -> ClipPlan:
    source = image_size(path)
    h, w, notes = frame_size("image", *source, 1, options)
    return ClipPlan("image", (path,), (0,), (0.0,), (h, w), source, 1, 0.0, 0.0, notes=tuple(notes))


def plan_video(paths: tuple[str, ...], options: Options, most_frames: int | None) -> ClipPlan:
    packets = read_packets(paths[0])
    total, fps = len(packets.pts), packets.fps
    n = smart_nframes(total, fps, options)
    notes = []
    by_rate = total / fps * options.fps
    if options.nframes is None and not n <= by_rate < n + TEMPORAL:
        asked = f"fps {options.fps:g} asks for {by_rate:.1f} of {total} frames"
        notes.append(f"{asked}; min_frames and max_frames make it {n}")
    n = min(n, most_frames or n)
    h, w, size_notes = frame_size("video", *packets.size, n, options)
    indices = tuple(frame_indices(total, n))
    times = tuple((packets.pts[i] - packets.pts[0]) * packets.time_base for i in indices)
    seeks = tuple(packets.seek(i) for i in indices) if packets.keyframes else ()
    notes = (*notes, *size_notes)
    return ClipPlan("video", paths, indices, times, (h, w), packets.size, total, fps, n / total * fps, seeks, notes)


def plan_frames(paths: tuple[str, ...], options: Options, most_frames: int | None) -> ClipPlan:
    """A list of frames is taken whole, an odd one out repeated; nframes and max_frames thin it out evenly."""
    total = len(paths)
    n = options.nframes or min(total, options.max_frames)
    n = min(n, most_frames or n)
    if n > total:
        raise UserError(f"nframes {n} of a list of {total} frames; expected at most {total}")
    indices = list(range(total)) if n == total else frame_indices(total, math.ceil(n / TEMPORAL) * TEMPORAL)
    sample_fps = options.fps * len(indices) / total
    indices += indices[-1:] * (len(indices) % TEMPORAL)
    source = image_size(paths[0])
    h, w, notes = frame_size("video", *source, len(indices), options)
    times = tuple(i / options.fps for i in indices)
    rates = options.fps, sample_fps
    return ClipPlan("video", paths, tuple(indices), times, (h, w), source, total, *rates, notes=tuple(notes))


def read_clip(plan: ClipPlan) -> Tensor:
    """The planned frames as patch rows: (P, 1176) uint8. Raises UserError naming the file."""
    if plan.kind == "image":
        frames = [read_image(plan.paths[0], plan.size)] * TEMPORAL  # a picture is a clip of two equal frames
    elif len(plan.paths) > 1:
        frames = [read_image(plan.paths[i], plan.size) for i in plan.indices]
    else:
        frames = read_frames(plan.paths[0], plan.indices, plan.seeks, plan.size)
    return to_patches(torch.stack(frames))


def to_patches(frames: Tensor) -> Tensor:
    """(F, 3, H, W) -> (P, 1176); the 4 patches of a merge cell stand together, a row is (colour, frame, y, x)."""
    n, c, h, w = frames.shape
    assert n % TEMPORAL == 0 and h % FACTOR == 0 and w % FACTOR == 0, f"{n} frames of {h} x {w}"
    x = frames.reshape(n // TEMPORAL, TEMPORAL, c, h // FACTOR, MERGE, PATCH, w // FACTOR, MERGE, PATCH)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, c * TEMPORAL * PATCH * PATCH)


# -- Controls for evaluation


def apply_control(patches: Tensor, grid_thw, control: str, seed: str) -> tuple[Tensor, list[int]]:
    """A clip's patches with its frames in another order, or blank, and that order. The input is left as it is.

    control: none, reversed, shuffled (neither the order nor its reverse; the same for the same seed), blank.
    """
    t = grid_thw[0]
    order = list(range(t * TEMPORAL))
    if control == "blank":
        grey = torch.tensor(GREY, dtype=torch.uint8).repeat_interleave(ROW // 3)
        return grey.expand(len(patches), ROW).contiguous(), order
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

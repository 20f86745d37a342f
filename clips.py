"""The drawn clips of generate.py: a ball on a torus, its pixels and its file, and what is said about it.

numpy and PyAV only: drawing does not wait for torch.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

FPS = 30  # frames a second of every file, as the original project's
SAMPLED = 8  # frames, first and last included, at which positions are kept: what a model with 8 frames sees

# label -> signs of the velocity (x to the right, y downwards)
DIRECTIONS = {"Left to Right": (1, 0), "Right to Left": (-1, 0), "Falling Down": (0, 1), "Ascending": (0, -1)}
CORNERS = {"top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1)}
SIGNS = DIRECTIONS | CORNERS
OPTIONS = {label: f"({letter}) {label}" for letter, label in zip("ABCD", DIRECTIONS)}

# Pixels of a 64-pixel picture; larger pictures scale them. The largest ball needs a picture of 40.
RADIUS = (4.0, 20.0)
# Pixels a frame over 30 frames. Backwards looks like forwards when the ball passes half the picture between two sampled
# frames: here it passes at most 0.22 with 8 frames (up to 5 apart), 0.44 with 4 (up to 10 apart), as of --fps 1.
SPEED = (1.5, 2.8)

BALLS = {
    "red": (225, 45, 45), "green": (50, 190, 70), "blue": (65, 110, 250),
    "yellow": (245, 215, 50), "white": (245, 245, 245), "purple": (190, 80, 220),
}  # fmt: skip
BACKGROUNDS = {"black": (8, 8, 8), "gray": (96, 96, 96), "navy": (18, 24, 72), "brown": (74, 44, 22)}


class Track(NamedTuple):
    """Where the ball is at the sampled times, in pixels of the clip as it is shown (x to the right, y downwards)."""

    times: np.ndarray  # (F,) seconds
    xy: np.ndarray  # (F, 2) centre of the ball
    lap: np.ndarray  # (F, 2) int: how often it has left along x and y, and come back, before this time
    inside: np.ndarray  # (F,) bool: is the centre within the picture

    def longest_run(self) -> np.ndarray:
        """Indices of the longest stretch in which the ball is seen and does not jump to the other side."""
        cuts = np.flatnonzero(np.diff(self.lap, axis=0).any(axis=1) | ~self.inside[1:] | ~self.inside[:-1]) + 1
        runs = [run for run in np.split(np.arange(len(self.times)), cuts) if self.inside[run].all()]
        return max(runs, key=len, default=np.arange(0))


@dataclass(frozen=True)
class Clip:
    """All that fixes a clip's pixels. Lengths in pixels of the uncropped picture, of `size` a side."""

    label: str
    size: int
    length: int  # frames
    start: tuple[float, float]  # x, y of the centre in frame 0
    velocity: tuple[float, float]  # pixels a frame
    radius: float
    ball: str
    ball_rgb: tuple[float, float, float]
    background: str
    background_rgb: tuple[float, float, float]
    gradient: tuple[float, float] = (0.0, 0.0)  # relative brightness from edge to edge, along x and y
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)  # window shown: left, top (pixels), side (share of `size`)
    blur: tuple[float, float, float] = (0.0, 0.0, 0.0)  # isotropic sigma, or length and angle of a motion blur
    moves: tuple[int, int] | None = None  # rests before and after these frames; None: moves throughout

    def centres(self, frames) -> np.ndarray:
        """(F, 2) float64: x, y of the ball in the given frames, not yet folded back into the picture."""
        first, last = self.moves or (0, self.length)
        frames_moved = np.clip(np.asarray(frames, np.float64), first, last) - first
        return np.asarray(self.start) + frames_moved[:, None] * np.asarray(self.velocity)

    def track(self) -> Track:
        """Positions as shown (cropped) in the SAMPLED evenly spaced frames."""
        frames = sampled_frames(self.length)
        path = self.centres(frames)
        left, top, side = self.crop
        shown = (path % self.size - (left, top)) / side
        inside = ((shown >= 0) & (shown < self.size)).all(axis=1)
        return Track(frames / FPS, shown, np.floor(path / self.size).astype(int), inside)


def sampled_frames(length: int) -> np.ndarray:
    return np.linspace(0, length - 1, SAMPLED).round().astype(int)


def draw_clip(rng: np.random.Generator, label: str, size: int, length: int) -> Clip:
    """A clip of this label: everything but its direction is drawn independently of the label."""
    # as rng.choice draws, which swallows a Ctrl-C
    ball, background = (list(names)[rng.integers(len(names))] for names in (BALLS, BACKGROUNDS))
    jitter = rng.uniform(-12, 12, (2, 3))
    # A longer clip is a slower one, so that the same share of the picture passes between the frames a model samples.
    speed = rng.uniform(*SPEED, 2) * size / 64 * min(1.0, 30 / length)
    return Clip(
        label,
        size,
        length,
        start=tuple(rng.uniform(0, size, 2).tolist()),
        velocity=tuple((speed * SIGNS[label]).tolist()),
        radius=float(rng.uniform(*RADIUS) * max(1.0, size / 64)),
        ball=str(ball),
        ball_rgb=tuple((BALLS[ball] + jitter[0]).tolist()),
        background=str(background),
        background_rgb=tuple((BACKGROUNDS[background] + jitter[1]).tolist()),
        gradient=tuple((rng.uniform(-0.5, 0.5, 2) * (rng.random() < 0.5)).tolist()),
    )


def resting(clip: Clip, rng: np.random.Generator) -> Clip:
    """The clip with a ball that rests, moves, and rests: from and to a tenth of a second, at least two of them apart,
    each such pair equally often."""
    tenths = range(clip.length * 10 // FPS + 1)
    pairs = [(a, b) for a in tenths for b in tenths if a + 2 <= b]
    first, last = pairs[rng.integers(len(pairs))]
    return replace(clip, moves=(first * FPS // 10, last * FPS // 10))


def augmented(clip: Clip, names: list[str], rng: np.random.Generator) -> Clip:
    """The clip with one draw of a random non-empty subset of the augmentations, the same in all its frames."""
    picked = [name for name in names if rng.random() < 0.5] or [names[rng.integers(len(names))]]
    if "blur" in picked:
        strength = rng.uniform(0.6, 1.5) * clip.size / 64
        isotropic = rng.random() < 0.5
        clip = replace(clip, blur=(strength, 0.0, 0.0) if isotropic else (0.0, 4 * strength, rng.uniform(0, np.pi)))
    if "crop" in picked:
        for shrink in np.linspace(0.35, 0.0, 40):  # the window grows until enough of the ball's way is in sight
            side = 1 - rng.uniform(shrink / 2, shrink)
            tried = replace(clip, crop=(*rng.uniform(0, clip.size * (1 - side), 2).tolist(), side))
            long_enough = len(tried.track().longest_run()) >= min(3, len(clip.track().longest_run()))
            if long_enough and tried.track().inside.mean() >= 0.6:
                return tried
    return clip


def render(clip: Clip, frames=None) -> np.ndarray:
    """(F, S, S, 3) uint8 RGB of the given frames (default: all), anti-aliased, cropped and blurred as the clip says."""
    frames = np.arange(clip.length) if frames is None else np.asarray(frames)
    left, top, side = clip.crop
    grid = (np.arange(clip.size, dtype=np.float32) + 0.5) * side  # the crop is drawn at its final size, never resampled
    x, y = grid + left, grid + top
    centre = (clip.centres(frames) % clip.size).astype(np.float32)
    half = clip.size / 2  # distances on the torus are measured the short way round
    dx = (x - centre[:, :1] + half) % clip.size - half  # (F, S)
    dy = (y - centre[:, 1:] + half) % clip.size - half
    distance = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)  # (F, S, S)
    cover = ((clip.radius - distance) / side + 0.5).clip(0, 1)[..., None]
    light = 1 + clip.gradient[0] * (x / clip.size - 0.5) + (clip.gradient[1] * (y / clip.size - 0.5))[:, None]
    behind = light[..., None] * np.asarray(clip.background_rgb, np.float32)  # (S, S, 3)
    picture = behind + cover * (np.asarray(clip.ball_rgb, np.float32) - behind)
    return (blurred(picture, *clip.blur) + 0.5).clip(0, 255).astype(np.uint8)


def blurred(picture: np.ndarray, sigma: float, length: float, angle: float) -> np.ndarray:
    """(F, S, S, 3) float32 -> the same, convolved with a Gaussian if sigma > 0, else with a line; edges repeat. Both
    kernels are symmetric about 0, so that a blur tells no direction."""
    if not sigma and not length:
        return picture
    reach, size = int(np.ceil(3 * sigma if sigma > 0 else length / 2 + 1)), picture.shape[1]
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    if sigma > 0:
        weight = np.exp(-(dx**2 + dy**2) / (2 * sigma**2))
    else:
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        weight = (length / 2 + 0.5 - abs(along)).clip(0, 1) * (1 - abs(across)).clip(0, 1)
    weight /= weight.sum()
    taps = [(y, x) for y, x in np.argwhere(weight > 1e-3).tolist()]
    padded = np.pad(picture, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    total = sum(float(weight[y, x]) * padded[:, y : y + size, x : x + size] for y, x in taps)
    return total / sum(float(weight[y, x]) for y, x in taps)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """(F, S, S, 3) uint8 -> h264, yuv420p, FPS. One thread, for many clips are made at a time, and no lookahead
    (zerolatency): with it x264 gave other bytes for the same frames from run to run."""
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))


# -- What is said about a clip

# label -> coordinate that changes, how, the one that stays, heading, edge where it leaves, edge where it comes back
MOTION = {
    "Left to Right": ("x", "grows", "y", "to the right", "right", "left"),
    "Right to Left": ("x", "shrinks", "y", "to the left", "left", "right"),
    "Falling Down": ("y", "grows", "x", "down", "bottom", "top"),
    "Ascending": ("y", "shrinks", "x", "up", "top", "bottom"),
}
POSITIONS = (  # of the first position, of each further one
    ("At {t:.1f} s the ball is at ({x:.0f}, {y:.0f})", ", at {t:.1f} s at ({x:.0f}, {y:.0f})"),
    ("The ball is at ({x:.0f}, {y:.0f}) at {t:.1f} s", ", then at ({x:.0f}, {y:.0f}) at {t:.1f} s"),
    ("I see the ball at ({x:.0f}, {y:.0f}) ({t:.1f} s)", ", ({x:.0f}, {y:.0f}) ({t:.1f} s)"),
)
CHANGES = ("{a} {grows}, {b} stays the same", "{b} stays the same and {a} {grows}", "only {a} changes: it {grows}")
ENDS = ("so the ball moves {}.", "so it is going {}.", "which means it travels {}.")
TASKS = {  # --task -> problem_type, question, answer about a resting clip: "0.2 to 0.7" seconds, "36" pixels on its way
    "time_span": (
        "time span",
        "When does the ball move? Answer in seconds.",
        lambda clip: f"{clip.moves[0] / FPS:.1f} to {clip.moves[1] / FPS:.1f}",
    ),
    "distance": (
        "regression",
        "How far does the ball move? Answer in pixels.",
        lambda clip: f"{(clip.moves[1] - clip.moves[0]) * np.hypot(*clip.velocity):.0f}",
    ),
}


def explain(clip: Clip, rng: np.random.Generator, coordinates: int) -> str:
    """The answer with its reasoning, `<think>...</think><answer>(A) Left to Right</answer>`: `coordinates` positions,
    out of one unbroken stretch if it is long enough; otherwise the text also says that the ball leaves and comes back.
    """
    a, grows, b, heading, out, back = MOTION[clip.label]
    track = clip.track()
    run = track.longest_run()
    pool = run if len(run) >= coordinates else np.flatnonzero(track.inside)
    picks = pool[np.unique(np.linspace(0, len(pool) - 1, min(coordinates, len(pool))).round().astype(int))]
    text = ""
    if len(picks):
        first, further = POSITIONS[rng.integers(3)]
        for k in picks:
            text += (further if text else first).format(t=track.times[k], x=track.xy[k, 0], y=track.xy[k, 1])
        text += ". "
        if (track.lap[picks] != track.lap[picks[0]]).any():
            text += f"It leaves at the {out} and comes back at the {back}. "
    change = CHANGES[rng.integers(len(CHANGES))].format(a=a, b=b, grows=grows)
    text += f"Over time {change}, {ENDS[rng.integers(len(ENDS))].format(heading)}"
    return f"<think>{text}</think><answer>{OPTIONS[clip.label]}</answer>"


# -- Pictures for people and servers


def strip(frames: np.ndarray) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 in one row, in time order, enlarged to 112 pixels or more: (H', W', 3)."""
    enlarge, gap = -(-112 // frames.shape[2]), 6
    frames = frames.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    frames = np.pad(frames, ((0, 0), (gap, gap), (gap, 0), (0, 0)), constant_values=255)
    return np.pad(np.concatenate(frames, axis=1), ((0, 0), (0, gap), (0, 0)), constant_values=255)


def png(page: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    return encode_image(av.VideoFrame.from_ndarray(page, "rgb24"), "png")


def encode_image(picture: av.VideoFrame, codec: str, **options: str) -> bytes:
    """A picture as a file of FFmpeg's codec "png" or "mjpeg"."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = picture.width, picture.height, picture.format.name
    encoder.framerate, encoder.options = 1, options
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])

"""Pictures of clips, for people and for the model that words chains of thought: PNG and GIF through PyAV, no PIL."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# 5x8 bitmap letters, one byte a column, lowest bit at the top; only what the labels below need.
# fmt: off
_GLYPHS = {
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "5": "2745454539",
    "6": "3c4a494930", "7": "0171090503", "8": "3649494936", "9": "064949291e", ".": "0060600000", " ": "0000000000",
    "A": "7e1111117e", "D": "7f4141221c", "F": "7f09090901", "L": "7f40404040", "R": "7f09192946", "a": "2054545478",
    "b": "7f48444438", "c": "3844444420", "d": "384444487f", "e": "3854545418", "f": "087e090102", "g": "18a4a4a47c",
    "h": "7f08040478", "i": "00447d4000", "k": "7f10284400", "l": "00417f4000", "m": "7c04180478", "n": "7c08040478",
    "o": "3844444438", "p": "fc24242418", "r": "7c08040408", "s": "4854545420", "t": "043f444020", "u": "3c4040207c",
    "v": "1c2040201c", "w": "3c4030403c", "z": "4464544c44",
}
# fmt: on
PAPER, INK = 255, 40  # grey levels of the page and of its letters
GAP = 6  # pixels between tiles


def text_mask(text: str, scale: int = 2) -> np.ndarray:
    """(8 scale, 6 scale len(text)) bool: where the letters are inked."""
    columns = [list(bytes.fromhex(_GLYPHS[letter])) + [0] for letter in text]
    bits = np.array(columns, np.uint8).reshape(-1)[None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return np.kron(bits, np.ones((scale, scale), np.uint8)).astype(bool)


def write_text(page: np.ndarray, text: str, y: int, x: int, anchor: str = "left") -> None:
    """Inks `text` on the (H, W, 3) page at row y; x is its left end, its middle or its right end."""
    mask = text_mask(text)
    x -= {"left": 0, "middle": mask.shape[1] // 2, "right": mask.shape[1]}[anchor]
    page[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = INK


def enlarge(frames: np.ndarray, at_least: int) -> np.ndarray:
    """(..., S, S, 3) uint8 -> the same, each pixel repeated, so that a side has at least `at_least` pixels."""
    times = -(-at_least // frames.shape[-2])
    return frames.repeat(times, axis=-3).repeat(times, axis=-2)


def sheet(rows: list[tuple[str, np.ndarray]], times) -> np.ndarray:
    """Contact sheet, (H, W, 3) uint8: a labelled row of frames for each (label, (F, S, S, 3)), `times` (F,) s above."""
    rows = [(label, enlarge(frames, 112)) for label, frames in rows]
    count, side = rows[0][1].shape[0], rows[0][1].shape[1]
    left, top = 12 * max(len(label) for label, _ in rows) + 3 * GAP, 16 + 3 * GAP
    page = np.full((top + len(rows) * (side + GAP) + GAP, left + count * (side + GAP) + GAP, 3), PAPER, np.uint8)
    for k, t in enumerate(times):
        write_text(page, f"{t:.2f} s", 2 * GAP, left + k * (side + GAP) + side // 2, "middle")
    for i, (label, frames) in enumerate(rows):
        y = top + i * (side + GAP)
        write_text(page, label, y + side // 2 - 8, left - 2 * GAP, "right")
        for k, frame in enumerate(frames):
            x = left + k * (side + GAP)
            page[y : y + side, x : x + side] = frame
    return page


def strip(frames: np.ndarray, times) -> bytes:
    """One row of frames (F, H, W, 3) in time order with its times below, as PNG."""
    frames = enlarge(frames, 112)
    count, height, width = frames.shape[:3]
    page = np.full((height + 2 * GAP + 22, count * (width + GAP) + GAP, 3), PAPER, np.uint8)
    for k, frame in enumerate(frames):
        x = GAP + k * (width + GAP)
        page[GAP : GAP + height, x : x + width] = frame
        write_text(page, f"{times[k]:.2f} s", height + 2 * GAP, x + width // 2, "middle")
    return png(page)


def animation(clips: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Clips side by side, labelled: (F, H, W, 3) uint8 from [(label, (F, S, S, 3))]."""
    clips = [(label, enlarge(frames, 160)) for label, frames in clips]
    count, side = clips[0][1].shape[:2]
    page = np.full((count, side + 3 * GAP + 16, len(clips) * (side + GAP) + GAP, 3), PAPER, np.uint8)
    for k, (label, frames) in enumerate(clips):
        x = GAP + k * (side + GAP)
        page[:, GAP : GAP + side, x : x + side] = frames
        for picture in page:
            write_text(picture, label, side + 2 * GAP, x + side // 2, "middle")
    return page


def png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> the bytes of a PNG file."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt, codec.framerate = *picture.shape[:2], "rgb24", 1
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def write_gif(path: Path, frames: np.ndarray, fps: int = 25) -> None:
    """(F, H, W, 3) uint8 -> an endless GIF, one palette for all frames. GIF counts in 1/100 s: 25 fps is exact."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frames.shape[2], height=frames.shape[1], format="rgb24", time_base="1/100")
    split, fit, use = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(fit, 1, 0)
    fit.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for k, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        frame.pts, frame.time_base = k * (100 // fps), Fraction(1, 100)
        source.push(frame)
    source.push(None)
    with av.open(str(path), "w", format="gif", options={"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "pal8"
        for _ in frames:
            frame = sink.pull()
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

"""Frames of clips for a page: decoded with PyAV, without torch, and kept for the next page."""

import base64
import functools
import os
from pathlib import Path

import av
import numpy as np

FRAMES = 8  # of a strip
SIDE = 112  # pixels, longest side of a frame on the page
MAX_PIXELS = 8192 * 8192  # of a source frame; larger ones are not decoded for a picture
SEQUENTIAL = 120_000_000  # pixels of a whole clip up to which it is decoded from end to end; else keyframes only


def clip_folders(config: dict) -> list[Path]:
    """Where the clips of a run may lie: image_folder, videos/ beside the data, beside the data."""
    folders = [Path(config["image_folder"])] if isinstance(config.get("image_folder"), str) else []
    for name in ("data_path", "eval_data_path"):
        if isinstance(config.get(name), str) and config[name]:
            folders += [Path(config[name]).parent / "videos", Path(config[name]).parent]
    return list(dict.fromkeys(folders))


def strip(video, folders: list[Path]) -> dict:
    """{"images": [(seconds, data URL)], "error"} of a record's `video`: a file, or a list of a clip's frames."""
    while isinstance(video, list) and len(video) == 1:
        video = video[0]
    names = [name for name in (video if isinstance(video, list) else [video]) if isinstance(name, str) and name]
    images = []
    try:
        for name in names[:: max(1, -(-len(names) // FRAMES))]:
            paths = (path for path in (*(folder / name for folder in folders), Path(name)) if path.is_file())
            path = next(paths, None)
            if path is None:
                return {"images": [], "error": f"{name}: no such file"}
            images += decode(path, path.stat().st_mtime)
    except (av.FFmpegError, OSError) as error:
        return {"images": [], "error": f"{names[0]}: cannot be decoded ({error.strerror})"}
    return {"images": images, "error": f"{names[0]}: no frames" if names and not images else ""}


@functools.lru_cache(512)
def decode(path: Path, _changed: float) -> list[tuple[float, str]]:
    """[(seconds, JPEG as data URL)] of FRAMES frames spread over the clip. Raises av.FFmpegError or OSError."""
    # the absolute path and the whitelist keep names like "concat:..." and playlists from opening anything else
    options = {"protocol_whitelist": "file", "pattern_type": "none"}
    with av.open(os.path.abspath(path), timeout=5.0, options=options, metadata_errors="replace") as container:
        if not container.streams.video:
            return []
        stream = container.streams.video[0]
        pixels = stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0
        if not 0 < pixels <= MAX_PIXELS:
            return []
        stream.codec_context.thread_count = 1
        whole = 0 < stream.frames and stream.frames * pixels <= SEQUENTIAL
        frames = evenly_spread(container, stream) if whole else keyframes(container, stream)
        return [(float(frame.time or 0), jpeg(shrink(frame))) for frame in frames]


def evenly_spread(container, stream):
    """FRAMES frames of a short clip, all of which is decoded."""
    indices = set(np.linspace(0, stream.frames - 1, min(FRAMES, stream.frames)).round().astype(int).tolist())
    return (frame for i, frame in enumerate(container.decode(stream)) if i in indices)


def keyframes(container, stream):
    """Of a long clip: the keyframes at or before FRAMES evenly spread times; fewer if they share one."""
    stream.codec_context.skip_frame = "NONKEY"
    seen = set()
    for at in np.linspace(0, container.duration or 0, FRAMES, endpoint=False):
        container.seek(int(at))
        frame = next(container.decode(stream), None)
        if frame is not None and frame.pts not in seen:
            seen.add(frame.pts)
            yield frame


def shrink(frame) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8, at most SIDE pixels a side, the right way up."""
    scale = min(1.0, SIDE / max(frame.width, frame.height))
    rgb = frame.reformat(max(2, int(frame.width * scale)), max(2, int(frame.height * scale)), "rgb24").to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))


def jpeg(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URL."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.framerate = *picture.shape[:2], "yuvj444p", 1
    codec.options = {"qmin": "2", "qmax": "3"}
    image = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuvj444p")
    data = b"".join(bytes(packet) for packet in [*codec.encode(image), *codec.encode(None)])
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()

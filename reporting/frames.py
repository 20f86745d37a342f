"""Clips as the model saw them: the frames that video.py samples and resizes, as small JPEGs for the page."""

import base64
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np

from config import SFT, as_dict
from model import UserError
from records import IMAGE_SUFFIXES, data_files

FRAMES = 8  # shown of a clip
SIDE = 168  # pixels: larger frames are shrunk for the page, their longest side to this


def strip(video: str | None, config: dict) -> dict:
    """{"images": [(seconds, data URL)], "note", "error"} of a record's `video`, which lies in image_folder, in videos/
    beside the data, or beside the data."""
    from video import Options  # not at the top: it imports torch, and --help must not wait for that

    if not isinstance(video, str):
        return {}
    texts = (config.get(key) or "" for key in ("data_path", "eval_data_path"))
    data = [Path(file).parent for text in texts for file, _ in data_files(text)]
    folders = [Path(config.get("image_folder") or ""), *(folder / sub for folder in data for sub in ("videos", ""))]
    path = next((folder / video for folder in folders if (folder / video).is_file()), None)
    if path is None:
        return {"error": f"{video}: no such file"}
    kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
    try:
        options = Options.from_args(kind, SimpleNamespace(**(as_dict(SFT()) | config)), {})
        return sampled(kind, str(path), options)
    except (UserError, OSError) as error:
        return {"error": str(error)}


@lru_cache(256)  # a run's page is written again and again
def sampled(kind: str, path: str, options) -> dict:
    """The strip of a clip: FRAMES of its sampled frames. Raises UserError naming the file."""
    from video import from_patches, plan_clip, read_clip

    plan = plan_clip(kind, (path,), options)
    count = len(plan.indices)
    shown = np.linspace(0, count - 1, min(FRAMES, count)).round().astype(int).tolist()
    few = replace(plan, indices=[plan.indices[k] for k in shown], seeks=[plan.seeks[k] for k in shown if plan.seeks])
    pictures = [jpeg(picture) for picture in from_patches(read_clip(few).numpy(), few.grid_thw)]
    note = f"{len(shown)} of {count} sampled frames, {plan.size[1]} x {plan.size[0]} pixels"
    return {"images": list(zip((plan.times[k] for k in shown), pictures)), "note": note}


def jpeg(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URL, at most SIDE pixels a side."""
    scale = min(1.0, SIDE / max(picture.shape[:2]))
    height, width = (max(2, int(side * scale)) for side in picture.shape[:2])
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width, codec.pix_fmt, codec.framerate = height, width, "yuvj444p", 1
    codec.options = {"qmin": "2", "qmax": "3"}
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24").reformat(width, height, "yuvj444p")
    data = b"".join(bytes(packet) for packet in [*codec.encode(image), *codec.encode(None)])
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()

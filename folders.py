"""Class-named folders of videos -> multiple-choice questions about the clips where they lie, for generate.py.

    DIR/class_name/clip.mp4                     as UCF101 and HMDB51 come; the split is made here, class by class
    DIR/train/class_name/, DIR/val/class_name/  as Kinetics comes (torchvision.datasets.Kinetics): the split is kept

Each clip is asked about once: the question, and options drawn from the class names in random order. Hard negatives are
names spelt much like the right one, drawn out of twice as many as needed: the nearest alone would be one set of options
for each class, and tell it. `infer.py --controls blank` shows how much is guessed without the clip.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import clips
from model import UserError, nearest_path
from reader import index_frames, read_frames

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif", ".ts")
# What published copies of Kinetics call their folders
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val"}
STRIP_HEIGHT = 160  # pixels of a frame that the server is shown


@dataclass(frozen=True)
class Video:
    path: Path  # DIR/…
    label: str  # its class, in words
    split: str  # train or val; "" = not yet known


# -- The clips


def words_of(name: str) -> str:
    """A folder's name as words: "playing_guitar" and "PlayingGuitar" -> "playing guitar", "Playing Guitar"."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).split())


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def videos_in(folder: Path) -> list[Path]:
    return [path for path in entries(folder) if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()]


def list_videos(root: Path) -> list[Video]:
    """The clips of all classes, in order. train/ and val/ are splits unless they hold videos themselves."""
    folders = filter(Path.is_dir, entries(root))
    named = [path for path in folders if path.name.lower() in SPLITS and not videos_in(path)]
    splits = {path: SPLITS[path.name.lower()] for path in named}
    if set(splits.values()) == {"val"}:
        raise UserError(f"--from_folder {root}: {next(iter(splits)).name}/ but no train/; expected both, or none")
    if set(splits.values()) == {"train"}:
        splits = dict.fromkeys(splits, "")
    return [
        Video(file, words_of(folder.name), split)
        for parent, split in (splits or {root: ""}).items()
        for folder in filter(Path.is_dir, entries(parent))
        for file in videos_in(folder)
    ]


def why_unreadable(video: Video) -> str | None:
    """Why training could not read it, None if it can: both index it by the same function."""
    try:
        str(video.path).encode()
        index_frames(str(video.path))
    except UnicodeEncodeError:
        return f"{os.fsencode(video.path)!r}: its name is not UTF-8; rename it"
    except UserError as error:
        return str(error)
    return None


def find_videos(cfg) -> tuple[list[Video], dict[str, str]]:
    """(the clips that can be read, each with its split; {path: why not} of the others)"""
    root = Path(cfg.from_folder)
    if not root.is_dir():
        expected = f"expected one with a folder for each class{nearest_path(root)}"
        raise UserError(f"--from_folder {root}: no such folder; {expected}")
    try:
        videos = list_videos(root)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
    with ThreadPoolExecutor(cfg.workers or os.cpu_count()) as pool:
        reasons = list(tqdm(pool.map(why_unreadable, videos), "reading", len(videos), disable=None, unit="clip"))
    pairs = list(zip(videos, reasons, strict=True))
    unreadable = {os.fsencode(video.path).decode("utf-8", "backslashreplace"): why for video, why in pairs if why}
    for why in [*unreadable.values()][:20]:
        print(f"unreadable: {why}")
    if unreadable:
        print(f"{len(unreadable)} clips are unreadable; metadata.json lists them")
    videos = [video for video, why in pairs if not why]
    labels = sorted({video.label for video in videos})
    if len(labels) < 2:
        classes = f"classes with readable videos: {', '.join(labels) or 'none'}"
        raise UserError(f"--from_folder {root}: {classes}; expected two or more, DIR/class/clip.mp4")
    if not videos[0].split:
        videos = split_by_class(videos, cfg.split, np.random.default_rng([cfg.seed, 7]))
    return videos, unreadable


def split_by_class(videos: list[Video], share: float, rng: np.random.Generator) -> list[Video]:
    """Each class on its own: `share` of its clips to train, at least one to each split where it has two."""
    result, classes = list(videos), {}
    for i, video in enumerate(videos):
        classes.setdefault(video.label, []).append(i)
    for mine in classes.values():
        train = min(max(round(len(mine) * share), 1), max(len(mine) - 1, 1))
        for k, i in enumerate(rng.permutation(mine).tolist()):
            result[i] = replace(videos[i], split="train" if k < train else "val")
    return result


# -- What is asked


def multiple_choice(cfg, videos: list[Video]) -> list[tuple[str, str]]:
    """What is asked of each clip: (question with its options, the right one of them, "(A) playing guitar")."""
    labels, wrong, result = sorted({video.label for video in videos}), cfg.num_options - 1, []
    pools = {label: [name for name in labels if name != label] for label in labels}
    if cfg.hard_negatives:
        pools = {label: get_close_matches(label, pool, 2 * wrong, cutoff=0) for label, pool in pools.items()}
    for i, video in enumerate(videos):
        rng, pool = np.random.default_rng([cfg.seed, 6, i]), pools[video.label]
        picks = rng.choice(len(pool), min(wrong, len(pool)), replace=False)
        options = [video.label, *(pool[i] for i in picks)]
        options = [options[i] for i in rng.permutation(len(options))]
        lines = [f"({letter}) {words}" for letter, words in zip("ABCDEFGH", options)]
        result.append(("\n".join([cfg.question, "Options:", *lines]), lines[options.index(video.label)]))
    return result


# -- For the server


def file_hash(video: Video) -> str:
    with open(video.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strip_of(video: Video, count: int) -> bytes:
    """`count` frames of the clip, evenly spaced, as one PNG."""
    index = index_frames(str(video.path))
    picks = np.linspace(0, len(index.pts) - 1, count).round().astype(int).tolist()
    h, w = index.size
    size = STRIP_HEIGHT, max(1, round(w * STRIP_HEIGHT / h))
    frames = torch.stack(read_frames(str(video.path), picks, [index.seek(i) for i in picks], size))
    return clips.png(clips.strip(frames.permute(0, 2, 3, 1).numpy()))

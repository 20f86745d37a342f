"""Class-named folders of videos -> multiple-choice questions about the clips where they lie, for generate.py.

    DIR/class_name/clip.mp4                     as UCF101 and HMDB51 come; the split is made here, class by class
    DIR/train/class_name/, DIR/val/class_name/  as Kinetics comes (torchvision.datasets.Kinetics): the split is kept

Each clip is asked about once: the question, and options drawn from the class names in random order. Hard negatives come
from the names nearest the right one: those that share most words with it, then most letter triples (Jaccard's index of
both sets); out of twice as many as needed they are drawn at random, or else the set of options would be one for each
class and tell it. A hint remains, for the right name lies in the middle of its neighbours: `infer.py --controls blank`
shows how much is guessed without the clip.

A clip counts as unreadable if training could not read it: the same function plans it. Not a part of generate.py, for
this imports torch.
"""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import clips
from config import VideoArgs
from model import UserError, nearest_path
from records import read_turns
from rewards import is_correct, sample_from_record
from video import Options, index_frames, plan_clip, read_frames

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif", ".ts")
# What published copies of Kinetics call their folders
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val"}
STRIP_HEIGHT = 160  # pixels of a frame that the server is shown


@dataclass(frozen=True)
class Video:
    path: Path  # DIR/…
    label: str  # its class, in words
    split: str  # train or val; "" = not yet known


@dataclass(frozen=True)
class Choice:
    """What is asked of one clip."""

    text: str  # with its options
    options: list[str]  # as they stand in it, "(A) playing guitar"
    right: str  # one of them


# -- The clips


def words_of(name: str) -> str:
    """A folder's name as words: "playing_guitar" and "PlayingGuitar" -> "playing guitar", "Playing Guitar"."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).split())


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def is_split(path: Path) -> bool:
    """Whether it is train/ or val/ with classes in it; with videos in it, it is a class of that name."""
    if path.name.lower() not in SPLITS or not path.is_dir():
        return False
    inside = entries(path)
    return any(entry.is_dir() for entry in inside) and not any(map(is_video, inside))


def find_videos(root: Path) -> tuple[list[Video], list[str]]:
    """The clips of all classes, in order, and lines on what was passed over. UserError where there are no classes."""
    if not root.is_dir():
        hint = nearest_path(root)
        raise UserError(f"--from_folder {root}: no such folder; expected one with a folder for each class{hint}")
    splits = {path: SPLITS[path.name.lower()] for path in entries(root) if is_split(path)}
    videos, notes = [], []
    if splits and "train" not in splits.values():
        raise UserError(f"--from_folder {root}: found {next(iter(splits)).name}/ but no train/; expected both, or none")
    beside = [path.name for path in entries(root) if path.is_dir() and path not in splits] if splits else []
    notes += [f"not read, for it lies beside train/: {', '.join(beside)}"] if beside else []
    if set(splits.values()) == {"train"}:
        splits = dict.fromkeys(splits, "")
    for folder, split in (splits or {root: ""}).items():
        for path in filter(Path.is_dir, entries(folder)):
            videos += [Video(file, words_of(path.name), split) for file in entries(path) if is_video(file)]
            deeper = sum(file.is_dir() for file in entries(path))
            notes += [f"{path}: {deeper} folder(s) inside a class are not read"] if deeper else []
        loose = sum(map(is_video, entries(folder)))
        notes += [f"{folder}: {loose} video(s) in no class's folder are not read"] if loose else []
    labels = sorted({video.label for video in videos})
    if len(labels) < 2:
        found = ", ".join(labels) or "none"
        raise UserError(f"--from_folder {root}: classes with videos: {found}; expected two or more, DIR/class/clip.mp4")
    return videos, notes


def check_labels(videos: list[Video]) -> None:
    """UserError for two classes that read alike: no answer could be judged."""
    folders = {}
    for video in videos:
        folders.setdefault(video.label.casefold(), set()).add(video.path.parent.name)
    alike = next((sorted(names) for names in folders.values() if len(names) > 1), None)
    if alike:
        raise UserError(f"the classes {' and '.join(alike)} read alike; rename one of the folders")


def why_unreadable(video: Video) -> str | None:
    """Why training could not read it; None if it can."""
    try:
        str(video.path).encode()
        plan_clip("video", (str(video.path),), Options.from_args("video", VideoArgs(), {}, video.path.name))
    except UnicodeEncodeError:
        return f"{os.fsencode(video.path)!r}: its name is not UTF-8; rename it"
    except UserError as error:
        return str(error)
    return None


def readable(videos: list[Video], workers: int) -> tuple[list[Video], dict[str, str]]:
    """(those that can be read, {path: why not} of the others)"""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        reasons = list(tqdm(pool.map(why_unreadable, videos), "reading", len(videos), disable=None, unit="clip"))
    pairs = list(zip(videos, reasons, strict=True))
    broken = {os.fsencode(video.path).decode("utf-8", "backslashreplace"): why for video, why in pairs if why}
    return [video for video, why in pairs if not why], broken


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


def gather(cfg) -> tuple[list[Video], dict[str, str], list[str]]:
    """(the clips that can be read, each with its split; {path: why not} of the others; notes for the user)"""
    root = Path(cfg.from_folder)
    try:
        videos, notes = find_videos(root)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
    check_labels(videos)
    videos, broken = readable(videos, cfg.workers)
    lost = {path.parent.name for path in map(Path, broken)} - {video.path.parent.name for video in videos}
    notes += [f"no clip can be read of: {', '.join(sorted(lost))}"] if lost else []
    if len({video.label for video in videos}) < 2:
        first = next(iter(broken.values()))
        raise UserError(f"--from_folder {root}: {len(broken)} clips unreadable, fewer than two classes left; {first}")
    if not videos[0].split:
        videos = split_by_class(videos, cfg.split, np.random.default_rng([cfg.seed, 7]))
    elif "split" in getattr(cfg, "given", ()):
        notes.append("--split has no effect: train/ and val/ are there")
    labels = {split: {video.label for video in videos if video.split == split} for split in ("train", "val")}
    for split, other in (("train", "val"), ("val", "train")):
        absent = sorted(labels[other] - labels[split])
        notes += [f"{len(absent)} class(es) have no clip in {split}: {', '.join(absent[:5])}"] if absent else []
    return videos, broken, notes


# -- What is asked


def likeness(a: str, b: str) -> tuple[float, float]:
    """Share of the words that two names have in common, and of their letter triples: Jaccard's index of each."""

    def share(x: set, y: set) -> float:
        return len(x & y) / len(x | y)

    a, b = a.casefold(), b.casefold()
    triples = [{f"  {name} "[i : i + 3] for i in range(len(name) + 1)} for name in (a, b)]
    return share(set(a.split()), set(b.split())), share(*triples)


def nearest_names(label: str, labels: list[str]) -> list[str]:
    """The other names, the most alike first."""
    others = sorted(name for name in labels if name != label)
    return sorted(others, key=partial(likeness, label), reverse=True)


def choose(label: str, pool: list[str], wrong: int, rng: np.random.Generator) -> list[str]:
    """The right name and `wrong` others out of the pool, shuffled."""
    picks = rng.choice(len(pool), min(wrong, len(pool)), replace=False)
    options = [label, *(pool[i] for i in picks)]
    return [options[i] for i in rng.permutation(len(options))]


def choices(cfg, videos: list[Video]) -> list[Choice]:
    """What is asked of each clip."""
    labels, pools, result = sorted({video.label for video in videos}), {}, []
    wrong = cfg.num_options - 1
    for label in labels:
        near = nearest_names(label, labels)[: 2 * wrong]
        pools[label] = near if cfg.hard_negatives else [name for name in labels if name != label]
    for i, video in enumerate(videos):
        options = choose(video.label, pools[video.label], wrong, np.random.default_rng([cfg.seed, 6, i]))
        lines = [f"({letter}) {words}" for letter, words in zip("ABCDEFGH", options)]
        text = "\n".join([cfg.question, "Options:", *lines])
        result.append(Choice(text, lines, lines[options.index(video.label)]))
    return result


def check_judged(record: dict, choice: Choice) -> None:
    """UserError if the rewards would judge an option of the record otherwise than it is meant."""
    read_turns(record, record["id"])
    sample = sample_from_record(record)
    meant = [line == choice.right for line in choice.options]
    whole = [is_correct(line, sample) for line in choice.options]
    by_letter = [is_correct(line[:3], sample) for line in choice.options]
    if not whole == by_letter == meant:
        alike = f"{record['id']}: its options cannot be told apart: {', '.join(choice.options)}"
        raise UserError(f"{alike}; rename the classes, or put --question otherwise")


def check_options(cfg) -> None:
    """Raises UserError for what config.py cannot judge: where the files lie, how chains of thought are made."""
    root, out = Path(cfg.from_folder).resolve(), Path(cfg.output_dir).resolve()
    if root == out or root in out.parents or out in root.parents:
        raise UserError(f"--output_dir {out}: lies in --from_folder {root}, or that in it; give a folder of its own")
    if cfg.cot and (cfg.cot_source == "trajectory" or not os.environ.get("OPENAI_API_KEY", "").strip()):
        known = "the path of what moves is known only for drawn clips"
        advice = "set OPENAI_API_KEY (and leave --cot_source at auto or openai), or leave --cot out"
        raise UserError(f"--cot with --from_folder: {known}; {advice}")


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
    return clips.strip(frames.permute(0, 2, 3, 1).numpy(), [index.seconds(i) for i in picks])

"""Class-named folders of videos -> a multiple-choice dataset: records that name the clips where they lie.

    DIR/class_name/clip.mp4                     as UCF101 and HMDB51 come; the split is made here, class by class
    DIR/train/class_name/, DIR/val/class_name/  as Kinetics comes (torchvision.datasets.Kinetics): the split is kept

Each clip is asked about once: the question, and options drawn from the class names in random order. Hard negatives come
from the names nearest the right one: those that share most words with it, then most letter triples (Jaccard's index of
both sets); out of twice as many as needed they are drawn at random, or else the set of options would be one for each
class and tell it. A hint remains, for the right name lies in the middle of its neighbours: `infer.py --controls blank`
shows how much is guessed without the clip.

A clip counts as unreadable if training could not read it: the same function plans it.
"""

import hashlib
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from config import Generate, VideoArgs
from dataset.records import read_turns
from drawing import cot, preview
from model import UserError, nearest_path
from rewards import is_correct, sample_from_record
from video import Options, index_frames, plan_clip, read_frames

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif", ".ts")
# What published copies of Kinetics call their folders
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val"}
STRIP_HEIGHT = 160  # pixels of a frame that the server is shown


@dataclass(frozen=True)
class Clip:
    path: Path  # DIR/…
    label: str  # its class, in words
    part: str  # train or val; "" = not yet known


# -- What is there


def words_of(name: str) -> str:
    """A folder's name as words: "playing_guitar" and "PlayingGuitar" -> "playing guitar", "Playing Guitar"."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " ")).split())


def find_clips(root: Path) -> tuple[list[Clip], list[str]]:
    """The clips of all classes, in order, and lines on what was passed over. UserError where there are no classes."""
    if not root.is_dir():
        hint = nearest_path(root)
        raise UserError(f"--from_folder {root}: no such folder; expected one with a folder for each class{hint}")
    parts = {path: PARTS[path.name.lower()] for path in entries(root) if is_part(path)}
    clips, notes = [], []
    if parts and set(parts.values()) != {"train", "val"} and "train" not in parts.values():
        raise UserError(f"--from_folder {root}: found {next(iter(parts)).name}/ but no train/; expected both, or none")
    if parts:
        others = [path.name for path in entries(root) if path.is_dir() and path not in parts]
        notes += [f"not read, for it lies beside train/: {', '.join(others)}"] if others else []
    kept = parts if set(parts.values()) == {"train", "val"} else dict.fromkeys(parts, "")
    for folder, part in (kept or {root: ""}).items():
        for path in entries(folder):
            if path.is_dir():
                inside = entries(path)
                clips += [Clip(file, words_of(path.name), part) for file in inside if is_video(file)]
                deeper = sum(file.is_dir() for file in inside)
                notes += [f"{path}: {deeper} folder(s) inside a class are not read"] if deeper else []
        loose = sum(is_video(path) for path in entries(folder))
        notes += [f"{folder}: {loose} video(s) in no class's folder are not read"] if loose else []
    if len({clip.label for clip in clips}) < 2:
        found = ", ".join(sorted({clip.label for clip in clips})) or "none"
        raise UserError(f"--from_folder {root}: classes with videos: {found}; expected two or more, DIR/class/clip.mp4")
    return clips, notes


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def is_part(path: Path) -> bool:
    """Whether it is train/ or val/ with classes in it; with videos in it, it is a class of that name."""
    if path.name.lower() not in PARTS or not path.is_dir():
        return False
    inside = entries(path)
    return any(entry.is_dir() for entry in inside) and not any(map(is_video, inside))


def check_labels(clips: list[Clip]) -> None:
    """UserError for two classes that read alike: no answer could be judged."""
    folders = {}
    for clip in clips:
        folders.setdefault(clip.label.casefold(), set()).add(clip.path.parent.name)
    alike = next((sorted(names) for names in folders.values() if len(names) > 1), None)
    if alike:
        raise UserError(f"the classes {' and '.join(alike)} read alike; rename one of the folders")


def fault_of(clip: Clip) -> str | None:
    """Why training could not read it; None if it can."""
    try:
        str(clip.path).encode()
        plan_clip("video", (str(clip.path),), Options.from_args("video", VideoArgs(), {}, clip.path.name))
    except UnicodeEncodeError:
        return f"{os.fsencode(clip.path)!r}: its name is not UTF-8; rename it"
    except UserError as error:
        return str(error)


def readable(clips: list[Clip], workers: int) -> tuple[list[Clip], dict[str, str]]:
    """(those that can be read, {path: why not} of the others)"""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        faults = list(tqdm(pool.map(fault_of, clips), "reading", len(clips), disable=None, unit="clip"))
    broken = {ascii_path(clip.path): why for clip, why in zip(clips, faults, strict=True) if why}
    return [clip for clip, why in zip(clips, faults, strict=True) if not why], broken


def ascii_path(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# -- What is asked


def split(clips: list[Clip], share: float, rng: np.random.Generator) -> list[Clip]:
    """Each class on its own: `share` of its clips to train, at least one to each part where it has two."""
    parts, place = list(clips), {}
    for i, clip in enumerate(clips):
        place.setdefault(clip.label, []).append(i)
    for mine in place.values():
        train = min(max(round(len(mine) * share), 1), max(len(mine) - 1, 1))
        for k, i in enumerate(rng.permutation(mine).tolist()):
            parts[i] = replace(clips[i], part="train" if k < train else "val")
    return parts


def likeness(a: str, b: str) -> tuple[float, float]:
    """Share of the words that two names have in common, and of their letter triples: Jaccard's index of each."""

    def share(x: set, y: set) -> float:
        return len(x & y) / len(x | y)

    a, b = a.casefold(), b.casefold()
    triples = [{f"  {name} "[i : i + 3] for i in range(len(name) + 1)} for name in (a, b)]
    return share(set(a.split()), set(b.split())), share(*triples)


def nearest(label: str, labels: list[str]) -> list[str]:
    """The other names, the most alike first."""
    others = sorted(name for name in labels if name != label)
    return sorted(others, key=partial(likeness, label), reverse=True)


def choose(label: str, pool: list[str], wrong: int, rng: np.random.Generator) -> list[str]:
    """The right name and `wrong` others out of the pool, shuffled."""
    picks = rng.choice(len(pool), min(wrong, len(pool)), replace=False)
    options = [label, *(pool[i] for i in picks)]
    return [options[i] for i in rng.permutation(len(options))]


class Question(NamedTuple):
    text: str  # with its options
    options: list[str]  # as they stand in it, "(A) playing guitar"
    right: str  # one of them


def ask(cfg: Generate, clips: list[Clip]) -> list[Question]:
    """What is asked of each clip."""
    labels, pools, asked = sorted({clip.label for clip in clips}), {}, []
    wrong = cfg.num_options - 1
    for label in labels:
        near = nearest(label, labels) if cfg.hard_negatives else [name for name in labels if name != label]
        pools[label] = near[: 2 * wrong] if cfg.hard_negatives else near
    for i, clip in enumerate(clips):
        options = choose(clip.label, pools[clip.label], wrong, np.random.default_rng([cfg.seed, 6, i]))
        lines = [f"({letter}) {words}" for letter, words in zip("ABCDEFGH", options)]
        asked.append(Question("\n".join([cfg.question, "Options:", *lines]), lines, lines[options.index(clip.label)]))
    return asked


# -- Answers and records


def read_strip(clip: Clip) -> bytes:
    """The picture of a clip that the server is shown."""
    index = index_frames(str(clip.path))
    picks = np.linspace(0, len(index.pts) - 1, cot.STRIP_FRAMES).round().astype(int).tolist()
    h, w = index.size
    size = STRIP_HEIGHT, max(1, round(w * STRIP_HEIGHT / h))
    frames = torch.stack(read_frames(str(clip.path), picks, [index.seek(i) for i in picks], size))
    return preview.strip(frames.permute(0, 2, 3, 1).numpy(), [index.seconds(i) for i in picks])


def answers(cfg: Generate, clips: list[Clip], asked: list[Question], cache: Path) -> tuple[list, dict]:
    """The answers, None where a clip is dropped, and what there is to report about them."""
    if not cfg.cot:
        return [f"Answer: {question.right}" for question in asked], {}
    client = cot.OpenAI.from_env(cfg.cot_model)
    print(f"chains of thought: openai, {cfg.cot_model}")
    orders = []
    for clip, question in zip(clips, asked, strict=True):
        with open(clip.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        orders.append(cot.Asked(question.right, digest, partial(read_strip, clip), question.text, cot.ANYTHING))
    texts = cot.ask_all(client, cache, orders, cfg.cot_workers)
    print("chains of thought: " + ", ".join(f"{name} {n}" for name, n in client.counts.items()))
    return texts, {"source": "openai", "model": cfg.cot_model, "counts": dict(client.counts)}


def record(name: str, path: str, question: Question, answer: str, label: str) -> dict:
    """One entry of train.json or val.json in LLaVA's form. UserError if the rewards would judge it otherwise."""
    talk = [{"from": "human", "value": f"<video>\n{question.text}"}, {"from": "gpt", "value": answer}]
    made = {"id": name, "video": path, "conversations": talk, "meta": {"label": label}}
    read_turns(made, name)
    sample = sample_from_record(made)
    if [is_correct(line, sample) for line in question.options] != [line == question.right for line in question.options]:
        told = f"{name}: its options cannot be told apart: {', '.join(question.options)}"
        raise UserError(f"{told}; rename the classes, or put --question otherwise")
    return made


def check_options(cfg: Generate) -> None:
    """Raises UserError for what config.py cannot judge: where the files lie, how chains of thought are made."""
    root, out = Path(cfg.from_folder).resolve(), Path(cfg.output_dir).resolve()
    if root == out or root in out.parents or out in root.parents:
        raise UserError(f"--output_dir {out}: lies in --from_folder {root}, or that in it; give a folder of its own")
    if cfg.cot and (cfg.cot_source == "trajectory" or not os.environ.get("OPENAI_API_KEY", "").strip()):
        raise UserError(
            "--cot with --from_folder: the path of what moves is known only for drawn clips; set OPENAI_API_KEY "
            "(and leave --cot_source at auto or openai), or leave --cot out"
        )


def gather(cfg: Generate) -> tuple[list[Clip], dict[str, str], list[str]]:
    """(the clips that can be read, each with its part; {path: why not} of the others; lines to tell)"""
    root = Path(cfg.from_folder)
    try:
        clips, notes = find_clips(root)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None
    check_labels(clips)
    clips, broken = readable(clips, cfg.workers)
    missing = {path.parent.name for path in map(Path, broken)} - {clip.path.parent.name for clip in clips}
    notes += [f"no clip can be read of: {', '.join(sorted(missing))}"] if missing else []
    if len({clip.label for clip in clips}) < 2:
        first = next(iter(broken.values()))
        raise UserError(f"--from_folder {root}: {len(broken)} clips unreadable, fewer than two classes left; {first}")
    if not clips[0].part:
        clips = split(clips, cfg.split, np.random.default_rng([cfg.seed, 7]))
    elif "split" in getattr(cfg, "given", ()):
        notes.append("--split has no effect: train/ and val/ are there")
    return clips, broken, notes


def make(cfg: Generate, out: Path, cache: Path) -> tuple[dict[str, list[dict]], dict, list[str]]:
    """({part: records}, what metadata.json holds of it, lines to tell) of cfg.from_folder, for a dataset in `out`."""
    root = Path(cfg.from_folder)
    clips, broken, notes = gather(cfg)
    asked = ask(cfg, clips)
    texts, report = answers(cfg, clips, asked, cache)
    # by way of the real folders, for ".." behind a link leads elsewhere; the link of a clip itself is left alone
    base = os.path.relpath(os.path.realpath(root), os.path.realpath(out))
    parts, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    for clip, question, text in zip(clips, asked, texts, strict=True):
        if text is not None:
            name = clip.path.relative_to(root).as_posix()
            parts[clip.part].append(record(name, f"{base}/{name}", question, text, clip.label))
            counts[clip.part][clip.label] += 1
    for part, other in (("train", "val"), ("val", "train")):
        absent = sorted(counts[other].keys() - counts[part].keys())
        notes += [f"{len(absent)} class(es) have no clip in {part}: {', '.join(absent[:5])}"] if absent else []
    if not parts["train"]:
        raise UserError(f"--from_folder {root}: no clip is left for train; see --cot_model, or leave --cot out")
    counts = {part: dict(sorted(found.items())) for part, found in counts.items()}
    return parts, {"counts": counts, "unreadable": broken, "cot": report}, notes

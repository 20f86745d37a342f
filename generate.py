"""Draws a dataset of short clips of a moving ball: videos/*.mp4, train.json, val.json, metadata.json.

    python generate.py --output_dir data/synthetic_videos --num_samples 1000 --cot
    python generate.py --from_folder DIR        class-named folders of your own videos become a dataset

Only motion tells the class. A ball that simply crosses the picture must start at its entry edge, and one still gives
the class away. Here the picture is a torus: what leaves at one edge comes back at the opposite one, and the ball starts
anywhere with equal probability. So at any time its position is uniform over the whole picture, whatever the class: a
still tells nothing; the unordered set of stills tells the axis but not the sense; and a clip played backwards is a clip
of the opposite class with another, equally probable, start.

All files are made in a hidden folder and moved into place at the end. What is drawn and worded: clips.py.
"""

# ruff: noqa: E402, I001
# first, for it handles Ctrl-C
from config import Generate, QUESTION, as_dict, changed, cli, ignored_options, parse, split_list

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import clips
from cli import require
from clips import DIRECTIONS, OPTIONS, SIGNS, Clip
from model import UserError, nearest_path
from openai_client import Client, Question, ask_all
from script import command, in_threads

OURS = ("videos", "train.json", "val.json", "metadata.json")  # what a dataset consists of
LOCK = ".unfinished.lock"
CACHE = "cot_cache.jsonl"  # outlives killed runs and --overwrite: answers cost money


# -- Drawn clips


class Job(NamedTuple):
    """One clip to draw."""

    name: str  # 000007
    split: str  # train or val
    clip: Clip


def plan(cfg: Generate, labels=tuple(DIRECTIONS), stream: int = 1) -> list[Job]:
    """All clips, by the seed alone: labels as evenly as the count allows, shuffled. stream: of random numbers."""
    order = np.random.default_rng([cfg.seed, 0]).permutation(cfg.num_samples).tolist()
    shuffled = [labels[i % len(labels)] for i in order]
    augmentations, jobs = split_list(cfg.augment), []
    for i, split in enumerate(split_by_class(shuffled, cfg.split)):
        rng = np.random.default_rng([cfg.seed, stream, i])
        clip = clips.draw_clip(rng, shuffled[i], cfg.frame_size, cfg.video_length)
        if cfg.task != "direction":
            clip = clips.resting(clip, rng)
        if augmentations and split == "train" and rng.random() < cfg.augment_prob:  # val stays clean
            clip = clips.augmented(clip, augmentations, rng)
        jobs.append(Job(f"{i:06d}", split, clip))
    return jobs


def split_by_class(labels: list[str], share: float, rng=None) -> list[str]:
    """train or val for each clip: of each class its first ones, or some drawn by `rng`, go to train; at least one to
    each split where it has two."""
    labels, splits = np.array(labels), np.full(len(labels), "train")
    for label in dict.fromkeys(labels.tolist()):
        mine = np.flatnonzero(labels == label)
        mine = mine if rng is None else rng.permutation(mine)
        splits[mine[min(max(round(len(mine) * share), 1), max(len(mine) - 1, 1)) :]] = "val"
    return splits.tolist()


def write_clips(cfg: Generate, jobs: list[Job], folder: Path) -> list[str]:
    """Draws the clips into the folder; a hash of the pixels of each."""

    def write(job):
        frames = clips.render(job.clip)
        clips.write_mp4(folder / f"{job.name}.mp4", frames)
        return hashlib.blake2b(frames.tobytes(), digest_size=16).hexdigest()

    folder.mkdir()
    # threads suffice: numpy and FFmpeg release Python's lock while they work
    return in_threads(write, jobs, cfg.workers or os.cpu_count(), "drawing")


def drawn_dataset(cfg: Generate, out: Path, work: Path) -> tuple[list, dict]:
    """Draws and words everything in `work`; ([(split, record)], what metadata.json holds of it)."""
    jobs, records, report = plan(cfg), [], {}
    hashes = write_clips(cfg, jobs, work / "videos")
    if cfg.task != "direction":
        kind, question, answer = clips.TASKS[cfg.task]
        texts = [f"<answer>{answer(job.clip)}</answer>" for job in jobs]
    elif not cfg.cot:
        texts = [f"Answer: {OPTIONS[job.clip.label]}" for job in jobs]
    elif uses_server(cfg):
        strip = lambda clip: clips.png(clips.strip(clips.render(clip, clips.sampled_frames(clip.length))))
        choices = [(QUESTION, OPTIONS[job.clip.label]) for job in jobs]
        strips = [partial(strip, job.clip) for job in jobs]
        texts, report = ask_server(cfg, choices, hashes, strips, out / CACHE, TORUS)
    else:  # from the known trajectory: free, offline, the same for the same seed
        print("chains of thought: trajectory")
        rngs, report = [np.random.default_rng([cfg.seed, 4, i]) for i in range(len(jobs))], {"source": "trajectory"}
        texts = [clips.explain(job.clip, rng, cfg.cot_coordinates) for job, rng in zip(jobs, rngs, strict=True)]
    for job, text in zip(jobs, texts, strict=True):
        video, meta = f"{job.name}.mp4", facts_of(job.clip)
        if text is None:  # dropped, not replaced: a clip without its chain of thought is no clip of this dataset
            (work / "videos" / video).unlink()
        elif cfg.task == "direction":
            records.append((job.split, record(job.name, video, [(QUESTION, text)], meta)))
        else:  # Video-R1's form: `problem_type` says how an answer is scored
            entry = {"problem_id": job.name, "problem": question, "problem_type": kind, "data_type": "video"}
            records.append((job.split, entry | {"path": video, "options": [], "solution": text, "meta": meta}))
    return records, {"fps": clips.FPS, "cot": report}


def record(name: str, video: str, pairs: list[tuple[str, str]], meta: dict) -> dict:
    """One entry of train.json or val.json in LLaVA's form; `meta` is for people and tests, training ignores it."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "<video>\n" + turns[0]["value"]
    return {"id": name, "video": video, "conversations": turns, "meta": meta}


def facts_of(clip: Clip) -> dict:
    """`meta` of a drawn clip: what fixes its pixels, and the axis that it moves along."""
    numbers = lambda value: value if value is None or isinstance(value, str) else np.round(value, 3).tolist()
    axis = {(1, 0): "horizontal", (0, 1): "vertical"}.get(tuple(map(abs, SIGNS[clip.label])), "diagonal")
    return {key: numbers(value) for key, value in asdict(clip).items()} | {"axis": axis}


# -- Chains of thought from a server that is shown a strip of frames. It does not get the right answer: its text is kept
#    only if form and option are right.

PROMPT = """The picture is one strip: {frames} frames of one video in time order, evenly spaced, the earliest at the \
left.{about}
{question}
Compare the frames before you decide. Reply in exactly this form:
<think>two or three sentences on what changes from frame to frame</think><answer>(letter) text of the option</answer>
Between the think tags, do not name any option or its letter."""
TORUS = " A ball that leaves a frame at one edge comes back at the opposite edge."
STRIP_FRAMES = 8


def check_answer(text, right: str) -> tuple[str | None, str]:
    """(the answer in our form, "") if it may be used, else (None, why not)."""
    match = re.fullmatch(r"\s*<think>([^<]{1,1500})</think>\s*<answer>([^<]+)</answer>\s*", text or "")
    if match is None or not match[1].strip():
        return None, "wrong form"  # or far more than the two or three sentences
    think, answer = match[1].strip(), match[2].strip()
    if answer != right:
        return None, "wrong option"
    # (b), a lone capital from B on, or "option A": a lone A may be the article
    if re.search(r"\([A-Ha-h]\)|\b[B-H]\b|(?i:option|choice|letter|answer is) A\b", think):
        return None, "option letter in the reasoning"
    return f"<think>{think}</think><answer>{answer}</answer>", ""


def uses_server(cfg: Generate) -> bool:
    from_key = cfg.cot_source == "auto" and bool(os.environ.get("OPENAI_API_KEY"))
    return cfg.cot and (cfg.cot_source == "openai" or from_key)


def ask_server(cfg: Generate, choices, hashes, strips, cache: Path, about: str = "") -> tuple[list, dict]:
    """Of each clip (question, right option), a hash, a function that makes its strip as PNG -> the answers, None where
    a clip is dropped, and what metadata.json holds about them."""
    print(f"chains of thought: openai, {cfg.cot_model}")
    client, questions = Client.from_env(cfg.cot_model), []
    for (question, right), video_hash, strip in zip(choices, hashes, strips, strict=True):
        prompt = PROMPT.format(frames=STRIP_FRAMES, question=question, about=about)
        questions.append(Question(prompt, video_hash, strip, partial(check_answer, right=right)))
    texts = ask_all(client, cache, questions, cfg.cot_workers)
    print("chains of thought: " + ", ".join(f"{name} {n}" for name, n in client.counts.items()))
    return texts, {"source": "openai", "model": cfg.cot_model, "counts": dict(client.counts)}


# -- Clips of one's own: multiple-choice questions about the clips where they lie
#
#    DIR/class_name/clip.mp4                     as UCF101 and HMDB51 come; the split is made here, class by class
#    DIR/train/class_name/, DIR/val/class_name/  as Kinetics comes: the split is kept

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".gif", ".ts")
# folders of published Kinetics copies
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val"}


class Video(NamedTuple):
    path: Path  # DIR/…
    label: str  # its class in words: "playing guitar" of the folder playing_guitar, "Playing Guitar" of PlayingGuitar
    split: str  # train or val; "" = not yet known


def find_videos(cfg: Generate) -> tuple[list[Video], dict[str, str]]:
    """(the clips that training can read, each with its split; {path: why not} of the others)"""
    from reader import index_frames  # imports torch: neither --help nor drawn clips must wait for that

    inside = lambda folder: sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = lambda parent: [path for path in inside(parent) if path.is_dir()]
    root, listed, videos, unreadable = Path(cfg.from_folder), [], [], {}
    splits = {path: SPLITS[path.name.lower()] for path in folders(root) if path.name.lower() in SPLITS}
    if len(set(splits.values())) < 2:
        splits = {root: ""}
    for folder in (folder for parent in splits for folder in folders(parent)):
        label = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder.name.replace("_", " "))
        files = [path for path in inside(folder) if path.suffix.lower() in VIDEO_SUFFIXES]
        if not files:
            print(f"no clip in {folder}: expected {', '.join(VIDEO_SUFFIXES)} directly in it")
        listed += [Video(path, " ".join(label.split()), splits[folder.parent]) for path in files]

    def why_unreadable(video):
        try:
            str(video.path).encode()
            index_frames(str(video.path))
        except (UserError, UnicodeEncodeError) as error:
            return str(error)

    reasons = in_threads(why_unreadable, listed, cfg.workers or os.cpu_count(), "reading")
    for video, why in zip(listed, reasons, strict=True):
        if why:
            unreadable[os.fsencode(video.path).decode("utf-8", "backslashreplace")] = why
            print(f"unreadable: {why}")
        else:
            videos.append(video)
    if unreadable:
        print(f"{len(unreadable)} clips are unreadable; metadata.json lists them")
    labels = [video.label for video in videos]
    if len(set(labels)) < 2:
        classes = f"classes with readable videos: {', '.join(set(labels)) or 'none'}"
        raise UserError(f"--from_folder {root}: {classes}; expected two or more, DIR/class/clip.mp4")
    if not videos[0].split:
        splits = split_by_class(labels, cfg.split, np.random.default_rng([cfg.seed, 7]))
        videos = [video._replace(split=split) for video, split in zip(videos, splits, strict=True)]
    return videos, unreadable


def multiple_choice(cfg: Generate, videos: list[Video]) -> list[tuple[str, str]]:
    """For each clip (question with its options, the right one of them, "(A) playing guitar")."""
    labels, wrong, result = sorted({video.label for video in videos}), cfg.num_options - 1, []
    pools = {label: [name for name in labels if name != label] for label in labels}
    if cfg.hard_negatives:  # names spelt alike, out of twice as many: the nearest alone would tell the class
        pools = {label: get_close_matches(label, pool, 2 * wrong, cutoff=0) for label, pool in pools.items()}
    for i, video in enumerate(videos):
        rng, pool = np.random.default_rng([cfg.seed, 6, i]), pools[video.label]
        picks = rng.choice(len(pool), min(wrong, len(pool)), replace=False)
        options = [video.label, *(pool[i] for i in picks)]
        options = [options[i] for i in rng.permutation(len(options))]
        lines = [f"({letter}) {words}" for letter, words in zip("ABCDEFGH", options)]
        result.append(("\n".join([cfg.question, "Options:", *lines]), lines[options.index(video.label)]))
    return result


def strip_of(path: Path) -> bytes:
    """Frames of the file, evenly spaced and 160 pixels high, as one PNG."""
    from reader import index_frames, read_frames

    index = index_frames(str(path))
    picks = np.linspace(0, len(index.times) - 1, STRIP_FRAMES).round().astype(int).tolist()
    size = 160, max(1, round(index.size[1] * 160 / index.size[0]))
    frames = read_frames(str(path), [index.seeks[i] for i in picks], size)  # STRIP_FRAMES times (3, H, W)
    return clips.png(clips.strip(np.stack([frame.permute(1, 2, 0).numpy() for frame in frames])))


def folder_dataset(cfg: Generate, out: Path, work: Path) -> tuple[list, dict]:
    """As drawn_dataset. The clips stay where they are, records name them from `out`."""
    videos, unreadable = find_videos(cfg)
    choices, report = multiple_choice(cfg, videos), {}
    texts = [f"Answer: {right}" for _, right in choices]
    if cfg.cot:
        hashes = [hashlib.sha256(video.path.read_bytes()).hexdigest() for video in videos]
        strips = [partial(strip_of, video.path) for video in videos]
        texts, report = ask_server(cfg, choices, hashes, strips, out / CACHE)
    # by way of the real folders, for ".." behind a link leads elsewhere; the link of a clip itself is left alone
    base, records = os.path.relpath(os.path.realpath(cfg.from_folder), os.path.realpath(out)), []
    for video, (question, _), text in zip(videos, choices, texts, strict=True):
        if text is not None:
            name = video.path.relative_to(cfg.from_folder).as_posix()
            entry = record(name, f"{base}/{name}", [(question, text)], {"label": video.label})
            records.append((video.split, entry))
    return records, {"unreadable": unreadable, "cot": report}


# -- Files


def check_options(cfg: Generate) -> None:
    """UserError for options that contradict each other, before anything is drawn or written."""
    require(0 < cfg.split < 1, "split", cfg.split, "0 < split < 1: clips for train.json and for val.json")
    if cfg.cot and cfg.task != "direction":
        raise UserError(f"--cot with --task {cfg.task}: chains of thought are of the direction; leave --cot out")
    if cfg.from_folder is not None:
        root, out = Path(cfg.from_folder).resolve(), Path(cfg.output_dir).resolve()
        expected = f"a folder with one for each class in it{nearest_path(cfg.from_folder)}"
        require(root.is_dir(), "from_folder", cfg.from_folder, expected)
        apart = root != out and root not in out.parents and out not in root.parents
        require(apart, "output_dir", cfg.output_dir, f"a folder of its own, apart from --from_folder {root}")
        if cfg.cot and not uses_server(cfg):
            known = "the path of what moves is known only for drawn clips"
            raise UserError(f"--cot with --from_folder: {known}; set OPENAI_API_KEY, or leave --cot out")
    if uses_server(cfg):
        Client.from_env(cfg.cot_model)


@contextmanager
def claimed(out: Path):
    """Inside, the folder is there and locked for this process. The lock ends with the process, however it ends."""
    path = out / LOCK
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            raise BlockingIOError  # its owner removed it in between
    except OSError as error:
        is_taken = isinstance(error, (BlockingIOError, FileNotFoundError))
        why = "another process makes a dataset there" if is_taken else error.strerror
        raise UserError(f"--output_dir: {out}: {why}; choose another folder") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
        with suppress(OSError):  # it holds something
            out.rmdir()


def generate(cfg: Generate, make_dataset=None) -> dict:
    """Makes the whole dataset; returns what metadata.json holds. UserError before anything is overwritten."""
    check_options(cfg)
    with claimed(Path(cfg.output_dir)):
        return make(cfg, make_dataset or (drawn_dataset if cfg.from_folder is None else folder_dataset))


def make(cfg: Generate, make_dataset) -> dict:
    """What generate does while the folder is its own."""
    out, began = Path(cfg.output_dir), time.monotonic()
    existing = [name for name in OURS if (out / name).exists()]
    if existing and not cfg.overwrite:
        holds = f"already holds {', '.join(existing)}"
        raise UserError(f"--output_dir {out}: {holds}, expected a new folder; or give --overwrite")
    work = out / ".unfinished"
    if existing == ["videos"] and not work.exists():  # a killed run leaves .unfinished beside it
        raise UserError(f"--output_dir {out}: its videos/ is of no dataset made here; choose another folder")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        entries, facts = make_dataset(cfg, out, work)
        records = {split: [entry for its, entry in entries if its == split] for split in ("train", "val")}
        if not records["train"]:
            raise UserError("chains of thought: no clip has one; take another --cot_model, or leave --cot out")
        # val.json in random order, so that whoever reads its first N has all classes (training shuffles train.json)
        np.random.default_rng([cfg.seed, 6]).shuffle(records["val"])
        labels = {split: Counter(entry["meta"]["label"] for entry in records[split]) for split in records}
        counts = {split: dict(sorted(counter.items())) for split, counter in labels.items()}
        metadata = {"options": as_dict(cfg), "counts": counts} | facts
        for name, value in {**records, "metadata": metadata}.items():
            if value:
                text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
                (work / f"{name}.json").write_text(text, encoding="utf-8")
        for name in existing[::-1]:  # metadata.json, the mark of a whole dataset, goes first and comes last
            shutil.rmtree(out / name) if name == "videos" else (out / name).unlink()
        for name in OURS:
            if (work / name).exists():
                (work / name).rename(out / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {len(records['train'])} train, {len(records['val'])} val, {time.monotonic() - began:.1f} s")
    here = out.resolve().parent == Path("data").resolve()  # there, train_sft.py takes the dataset made last
    print("next: " + command("train_sft.py", *([] if here else ["--data_path", str(out / "train.json")])))
    return metadata


def main():
    cfg = parse(Generate)
    print("options:", ", ".join(f"{name}={value!r}" for name, value in changed(cfg).items()) or "defaults")
    for line in ignored_options(cfg):
        print(f"note: {line}")
    generate(cfg)


if __name__ == "__main__":
    cli(main)

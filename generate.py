"""Draws a dataset of short clips of a moving ball: videos/*.mp4, train.json, val.json, metadata.json, preview.png/.gif.

    python generate.py --output_dir data/synthetic_videos --num_samples 1000 --cot

Only motion tells the class. A ball that simply crosses the picture must start at its entry edge, and one still gives
the class away. Here the picture is a torus: what leaves at one edge comes back at the opposite one, and the ball starts
anywhere with equal probability. So at any time its position is uniform over the whole picture, whatever the class: a
still tells nothing; the unordered set of stills tells the axis but not the sense; and a clip played backwards is a clip
of the opposite class with another, equally probable, start. (A cropped training clip must keep its ball in sight, which
hints at the axis, never at the sense.)

With --from_folder DIR nothing is drawn: class-named folders of videos become a multiple-choice dataset, see
drawing/folders.py.

The way: plan (labels and parts) -> worker processes draw, augment, encode -> texts -> everything moved into place at
the end, so a killed run leaves nothing half-done and is simply started again.
"""

# ruff: noqa: E402, I001
# first, for it handles Ctrl-C
from config import QUESTION, Generate, as_dict, changed, cli, ignored_options, parse, split_list

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from drawing import cot, preview
from drawing.clips import (
    CORNERS,
    DIRECTIONS,
    FPS,
    LARGE,
    MIN_FRAME_SIZE,
    SIGHTS,
    SIGNS,
    SMALL,
    Clip,
    augmented,
    draw_clip,
    plain_clip,
    render,
    sight_frames,
    write_mp4,
)
from model import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The plan, and the workers that carry it out


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    index: int
    label: str
    part: str  # train or val
    cell: int  # start of a plain ball


def labels_of(task: str) -> list[str]:
    """The labels of a task, as often as their share: base has two clips towards corners for each along an axis."""
    return list(DIRECTIONS) if task == "direction" else [*DIRECTIONS, *CORNERS, *CORNERS]


def plan(cfg: Generate) -> list[Job]:
    """What clip i is, for all i: labels balanced as evenly as the count allows and shuffled, each split on its own.

    Raises UserError where a label would be missing in a part, or a plain ball has too few places to start from.
    """
    names = labels_of(cfg.task)
    if cfg.num_samples < 2 * len(names):
        raise UserError(
            f"--num_samples: found {cfg.num_samples}, expected at least {2 * len(names)}, "
            "so that every class is in train and in val"
        )
    rng = np.random.default_rng([cfg.seed, 0])
    label = np.array([names[i % len(names)] for i in range(cfg.num_samples)])[rng.permutation(cfg.num_samples)]
    jobs = {}
    for name in dict.fromkeys(names):
        mine = np.flatnonzero(label == name)
        places = cfg.frame_size**2
        if cfg.style == "plain" and len(mine) > places:
            raise UserError(
                f"--num_samples: found {cfg.num_samples}, but the plain ball has only {places} "
                f"different clips a class at --frame_size {cfg.frame_size}; ask for fewer, or --style varied"
            )
        cells = rng.permutation(places) if cfg.style == "plain" else np.zeros(len(mine), int)
        train = min(max(round(len(mine) * cfg.split), 1), len(mine) - 1)
        for k, index in enumerate(mine.tolist()):
            jobs[index] = Job(index, name, "train" if k < train else "val", int(cells[k]))
    return [jobs[index] for index in range(cfg.num_samples)]


def clip_of(cfg: Generate, job: Job) -> Clip:
    """The job's clip: a function of the seed and the index alone, whichever process asks."""
    rng = np.random.default_rng([cfg.seed, 1 + (cfg.task == "base"), job.index])
    if cfg.style == "plain":
        clip = plain_clip(job.label, cfg.frame_size, cfg.video_length, job.cell)
    else:
        clip = draw_clip(rng, job.label, cfg.frame_size, cfg.video_length)
    names = split_list(cfg.augment)
    if names and job.part == "train" and rng.random() < cfg.augment_prob:  # val stays clean
        clip = augmented(clip, names, rng)
    return clip


def make(order: tuple[Generate, Job, Path]) -> tuple[Clip, str]:
    """Draws one clip and writes its file; (the clip, a hash of its pixels)."""
    cfg, job, folder = order
    clip = clip_of(cfg, job)
    frames = render(clip)
    write_mp4(folder / f"{job.index:06d}.mp4", frames)
    return clip, blake2b(frames.tobytes(), digest_size=16).hexdigest()


def make_all(cfg: Generate, jobs: list[Job], folder: Path) -> list[tuple[Clip, str]]:
    """`make` for all jobs, in order, in cfg.workers processes. Raises UserError if two clips are the same."""
    orders = [(cfg, job, folder) for job in jobs]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cfg.workers or cores, -(-len(jobs) // 64))  # starting one costs some 64 clips
    bar = {"desc": "drawing", "total": len(jobs), "unit": "clip", "disable": None}  # None: only on a terminal
    if workers == 1:
        made = list(tqdm(map(make, orders), **bar))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            made = list(tqdm(pool.map(make, orders, chunksize=16), **bar))
    first = {}
    for job, (_, digest) in zip(jobs, made, strict=True):
        if first.setdefault(digest, job.index) != job.index:
            raise UserError(f"clips {first[digest]} and {job.index} are the same; take another --seed")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What is said about a clip


def direction_turns(answer: str) -> list[tuple[str, str]]:
    return [(QUESTION, answer)]


def some_answer(rng: np.random.Generator) -> str:
    """An answer to the direction question about no clip in particular, in any of its forms."""
    label = str(rng.choice(list(DIRECTIONS)))
    if rng.random() < 0.5:
        return f"Answer: {cot.OPTIONS[label]}"
    return cot.explain(draw_clip(rng, label, 64, 30).track(), label, rng, int(rng.integers(0, 4)))


def base_turns(clip: Clip, rng: np.random.Generator, coordinates: bool) -> list[tuple[str, str]]:
    """Questions that need the same sight as direction does, but never direction itself: where to on a diagonal, along
    which axis, what it looks like. The echo turn shows the words of the direction answers, for LoRA leaves their
    embeddings frozen."""
    if clip.label in CORNERS:
        turns = [("Towards which corner does the ball move?", clip.label)]
    else:
        axis = "horizontally" if SIGNS[clip.label][0] else "vertically"
        turns = [("Does the ball move horizontally or vertically?", axis)]
    looks = [("What colour is the ball?", clip.ball), ("What colour is the background?", clip.background)]
    radius = clip.radius / max(1.0, clip.size / 64)
    if not SMALL <= radius <= LARGE:
        looks.append(("Is the ball small or large?", "small" if radius < SMALL else "large"))
    turns.append(looks[rng.integers(len(looks))])
    if coordinates:
        track = clip.track()
        k = rng.choice(np.flatnonzero(track.inside))
        turns.append((f"Where is the ball at {track.times[k]:.1f} s?", f"({track.xy[k, 0]:.0f}, {track.xy[k, 1]:.0f})"))
    echo = some_answer(rng)
    return [*turns, (f"Repeat: {echo}", echo)]


def task_texts(count: int = 2000, seed: int = 0) -> list[str]:
    """Texts as the tasks of this file have them, `count` draws of each, for training a small tokenizer."""
    rng = np.random.default_rng([seed, 3])
    texts = [QUESTION, *(f"Answer: {option}" for option in cot.OPTIONS.values())]
    for k in range(count):
        clip = draw_clip(rng, labels_of("base")[k % 12], 64, 30)
        texts += [text for turn in base_turns(clip, rng, coordinates=True) for text in turn]
        texts.append(some_answer(rng))
    return texts


def answers(cfg: Generate, jobs: list[Job], made, cache: Path) -> tuple[list[str | None], dict]:
    """The direction answers, None where a clip is dropped, and what there is to report about them."""
    if not cfg.cot:
        return [f"Answer: {cot.OPTIONS[job.label]}" for job in jobs], {}
    source = cfg.cot_source
    if source == "auto":
        source = "openai" if os.environ.get("OPENAI_API_KEY") else "trajectory"
    print(f"chains of thought: {source}" + (f", {cfg.cot_model}" if source == "openai" else ""))
    if source == "trajectory":
        rngs = [np.random.default_rng([cfg.seed, 4, job.index]) for job in jobs]
        return [
            cot.explain(clip.track(), clip.label, rng, cfg.cot_coordinates)
            for rng, (clip, _) in zip(rngs, made, strict=True)
        ], {"source": source}
    client = cot.OpenAI.from_env(cfg.cot_model)
    frames = sight_frames(cfg.video_length)
    asked = [
        cot.Asked(cot.OPTIONS[clip.label], digest, lambda clip=clip: preview.strip(render(clip, frames), frames / FPS))
        for clip, digest in made
    ]
    texts = cot.ask_all(client, cache, asked, cfg.cot_workers)
    print("chains of thought: " + ", ".join(f"{name} {n}" for name, n in client.counts.items()))
    return texts, {"source": source, "model": cfg.cot_model, "counts": dict(client.counts)}


def record(job: Job, clip: Clip, turns: list[tuple[str, str]]) -> dict:
    """One entry of train.json or val.json in LLaVA's form; `meta` is for people and tests, training ignores it."""
    talk = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    talk[0]["value"] = "<video>\n" + talk[0]["value"]
    track = clip.track()
    xy = [
        [round(x, 1), round(y, 1)] if seen else None
        for (x, y), seen in zip(track.xy.tolist(), track.inside, strict=True)
    ]
    meta = {key: round_all(value) for key, value in asdict(clip).items()}
    meta["axis"] = {(1, 0): "horizontal", (0, 1): "vertical"}.get(tuple(map(abs, SIGNS[clip.label])), "diagonal")
    meta["speed"] = round(float(np.hypot(*clip.velocity)), 3)
    meta["trajectory"] = {"frames": sight_frames(clip.length).tolist(), "xy": xy}
    return {"id": f"{job.index:06d}", "video": f"{job.index:06d}.mp4", "conversations": talk, "meta": meta}


def round_all(value):
    if isinstance(value, tuple):
        return [round_all(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


# ---------------------------------------------------------------------------------------------------------------------
# Files

OURS = ("videos", "train.json", "val.json", "preview.png", "preview.gif", "metadata.json")
UNFINISHED = ".unfinished"
CACHE = "cot_cache.jsonl"  # outlives killed runs and --overwrite: answers cost money


def check_options(cfg: Generate) -> None:
    """Raises UserError for what config.py cannot judge: what fits in the picture, what the files can hold."""
    cfg.check()
    if cfg.frame_size < MIN_FRAME_SIZE:
        raise UserError(
            f"--frame_size: found {cfg.frame_size}, smaller than the ball "
            f"(up to {MIN_FRAME_SIZE} pixels wide), expected an even number from {MIN_FRAME_SIZE} on"
        )
    if cfg.frame_size % 2:
        raise UserError(
            f"--frame_size: found {cfg.frame_size}, expected an even number (the files are yuv420p); "
            f"take {cfg.frame_size + 1}"
        )
    if cfg.video_length < SIGHTS:
        raise UserError(
            f"--video_length: found {cfg.video_length} frames, expected at least {SIGHTS}: "
            "in fewer the motion cannot be judged"
        )
    if cfg.task == "base" and (cfg.cot or cfg.style == "plain"):
        raise UserError(
            "--task base: found with --cot or --style plain, expected without; it has its own answers and colours"
        )


def open_folder(cfg: Generate) -> tuple[Path, Path]:
    """(the output folder, an empty folder in it to build in). UserError if it holds more than a killed run leaves."""
    out = Path(cfg.output_dir)
    work = out / UNFINISHED
    try:
        out.mkdir(parents=True, exist_ok=True)
        killed_at_the_end = work.exists() and not (out / "metadata.json").exists()
        known = {UNFINISHED, CACHE, *(OURS if killed_at_the_end else ())}
        found = sorted(entry.name for entry in out.iterdir() if entry.name not in known)
        if found and not cfg.overwrite:
            raise UserError(
                f"--output_dir {out}: already holds {', '.join(found[:3])}, "
                "expected a new or empty folder; give another one, or --overwrite"
            )
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise UserError(f"--output_dir {out}: cannot be written ({error.strerror}); give another folder") from None
    return out, work


def move_into_place(work: Path, out: Path) -> None:
    """Replaces the dataset in `out` by the one in `work`; metadata.json, its mark, goes first, comes last."""
    (out / "metadata.json").unlink(missing_ok=True)
    for name in OURS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)
        if (work / name).exists():  # clips of --from_folder stay where they are
            os.replace(work / name, out / name)
    work.rmdir()


def write_previews(work: Path, made: list[tuple[Clip, str]]) -> None:
    """One clip of every label: stills in time order in preview.png, running in preview.gif."""
    examples = {}
    for clip, _ in made:
        examples.setdefault(clip.label, clip)
    rows = [(label, render(examples[label])) for label in SIGNS if label in examples]
    frames = sight_frames(len(rows[0][1]))
    page = preview.sheet([(label, pictures[frames]) for label, pictures in rows], frames / FPS)
    (work / "preview.png").write_bytes(preview.png(page))
    preview.write_gif(work / "preview.gif", preview.animation(rows))


def shuffle_held_out(parts: dict[str, list[dict]], seed: int) -> None:
    """val.json in random order, so that whoever reads its first N has all classes. (Training shuffles train.json.)"""
    np.random.default_rng([seed, 6]).shuffle(parts["val"])


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def told_of_disks(out: Path, work: Path):
    """A disk that cannot be written ends in one line, and leaves nothing."""
    try:
        yield
    except OSError as error:  # PyAV's errors of that kind too
        if error.errno is None:  # those of requests are no disk's
            raise
        shutil.rmtree(work, ignore_errors=True)
        told = f"--output_dir {out}: cannot be written ({error.strerror}); nothing is left there but {CACHE}, if any"
        raise UserError(f"{told}; make room or choose another folder, then run the same command again") from None


def generate_from_folder(cfg: Generate) -> dict:
    """Makes a dataset of the clips in cfg.from_folder; as `generate`."""
    from drawing import folders  # imports torch, to read videos; --help must not wait for that

    cfg.check()
    folders.check_options(cfg)
    out, work = open_folder(cfg)
    began = time.monotonic()
    with told_of_disks(out, work):
        parts, facts, notes = folders.make(cfg, out, out / CACHE)
        shuffle_held_out(parts, cfg.seed)
        for part, records in parts.items():
            if records:
                write_json(work / f"{part}.json", records)
        metadata = {"options": as_dict(cfg), **facts}
        write_json(work / "metadata.json", metadata)
    move_into_place(work, out)
    broken = facts["unreadable"]
    for line in notes:
        print(f"note: {line}")
    for why in [*broken.values()][:20]:
        print(f"unreadable: {why}")
    more = f", of which 20 are named here and all in {out / 'metadata.json'}" if len(broken) > 20 else ""
    classes = len(set().union(*facts["counts"].values()))
    print(
        f"{out}: {len(parts['train'])} train, {len(parts['val'])} val of {classes} classes, "
        f"{len(broken)} unreadable{more}; {time.monotonic() - began:.1f} s"
    )
    if not Path(cfg.from_folder).resolve().is_relative_to(Path.cwd()):
        print("note: the clips lie outside the current folder: to read them, trainers need --allow_outside_files True")
    return metadata


def generate(cfg: Generate) -> dict:
    """Makes the whole dataset; returns what metadata.json holds. Raises UserError before anything is overwritten."""
    if cfg.from_folder is not None:
        return generate_from_folder(cfg)
    check_options(cfg)
    jobs = plan(cfg)
    out, work = open_folder(cfg)
    with told_of_disks(out, work):
        metadata, told = fill_folder(cfg, jobs, out, work)
    move_into_place(work, out)
    print(f"{out}: {told}; see {out / 'preview.png'}")
    return metadata


def fill_folder(cfg: Generate, jobs: list[Job], out: Path, work: Path) -> tuple[dict, str]:
    """Draws, words and writes everything in `work`; returns what metadata.json holds, and what there is to tell."""
    (work / "videos").mkdir()
    began = time.monotonic()
    made = make_all(cfg, jobs, work / "videos")
    seconds = time.monotonic() - began
    if cfg.task == "direction":
        texts, report = answers(cfg, jobs, made, out / CACHE)
        turns = [text and direction_turns(text) for text in texts]
    else:
        turns, report = (
            [
                base_turns(clip, np.random.default_rng([cfg.seed, 5, job.index]), cfg.base_coordinates)
                for job, (clip, _) in zip(jobs, made, strict=True)
            ],
            {},
        )
    parts, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    for job, (clip, _), said in zip(jobs, made, turns, strict=True):
        if said is None:  # dropped, not replaced: a clip without its chain of thought is no clip of this dataset
            (work / "videos" / f"{job.index:06d}.mp4").unlink()
            continue
        parts[job.part].append(record(job, clip, said))
        counts[job.part][job.label] += 1
    missing = [f"{label} in {part}" for part in parts for label in set(labels_of(cfg.task)) if not counts[part][label]]
    if missing:
        raise UserError(
            f"chains of thought: too many clips were dropped, none is left of {', '.join(sorted(missing)[:3])}; "
            "take another --cot_model, more --num_samples, or --cot_source trajectory"
        )
    shuffle_held_out(parts, cfg.seed)
    for part, records in parts.items():
        write_json(work / f"{part}.json", records)
    write_previews(work, made)
    counts = {part: dict(sorted(found.items())) for part, found in counts.items()}
    metadata = {"options": as_dict(cfg), "fps": FPS, "counts": counts, "cot": report}
    write_json(work / "metadata.json", metadata)
    told = f"{len(parts['train'])} train, {len(parts['val'])} val"
    return metadata, f"{told}; drawn in {seconds:.1f} s, {60 * len(jobs) / seconds:.0f} clips a minute"


def main():
    cfg = parse(Generate)
    print("options:", ", ".join(f"{name}={value!r}" for name, value in changed(cfg).items()) or "defaults")
    for line in ignored_options(cfg):
        print(f"note: {line}")
    generate(cfg)


if __name__ == "__main__":
    cli(main)

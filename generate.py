"""Draws a dataset of short clips of a moving ball: videos/*.mp4, train.json, val.json, metadata.json.

    python generate.py --output_dir data/synthetic_videos --num_samples 1000 --cot
    python generate.py --from_folder DIR        class-named folders of your own videos become a dataset

Only motion tells the class. A ball that simply crosses the picture must start at its entry edge, and one still gives
the class away. Here the picture is a torus: what leaves at one edge comes back at the opposite one, and the ball starts
anywhere with equal probability. So at any time its position is uniform over the whole picture, whatever the class: a
still tells nothing; the unordered set of stills tells the axis but not the sense; and a clip played backwards is a clip
of the opposite class with another, equally probable, start. (A cropped training clip must keep its ball in sight, which
hints at the axis, never at the sense.)

The steps: plan (labels and splits) -> worker processes draw, augment, encode -> texts -> everything moved into place at
the end, so a killed run leaves nothing half-done. What is drawn and worded: clips.py.
"""

# ruff: noqa: E402, I001
# first, for it handles Ctrl-C
from config import Generate, QUESTION, as_dict, changed, cli, ignored_options, parse, split_list

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import clips
from cli import require
from clips import DIRECTIONS, FPS, OPTIONS, SIGNS, Clip
from model import UserError
from openai_client import Client, Question, ask_all
from script import command

# -- Drawn clips


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    index: int
    label: str
    split: str  # train or val
    stream: int  # of random numbers

    @property
    def name(self):
        return f"{self.index:06d}"


def plan(cfg: Generate, labels=tuple(DIRECTIONS), stream: int = 1) -> list[Job]:
    """What clip i is, for all i: labels balanced as evenly as the count allows and shuffled, each split on its own.

    UserError where a label would be missing in a split.
    """
    count, least = cfg.num_samples, 2 * len(labels)
    require(count >= least, "num_samples", count, f"at least {least}, so that every class is in train and in val")
    rng = np.random.default_rng([cfg.seed, 0])
    label = np.array([labels[i % len(labels)] for i in range(count)])[rng.permutation(count)]
    jobs = {}
    for name in dict.fromkeys(labels):
        mine = np.flatnonzero(label == name)
        train = min(max(round(len(mine) * cfg.split), 1), len(mine) - 1)
        for k, index in enumerate(mine.tolist()):
            jobs[index] = Job(index, name, "train" if k < train else "val", stream)
    return [jobs[index] for index in range(count)]


def clip_of(cfg: Generate, job: Job) -> Clip:
    """The job's clip: a function of the seed and the index alone, whichever process asks."""
    rng = np.random.default_rng([cfg.seed, job.stream, job.index])
    clip = clips.draw_clip(rng, job.label, cfg.frame_size, cfg.video_length)
    clip = clip if cfg.task == "direction" else clips.resting(clip, rng)
    names = split_list(cfg.augment)
    if names and job.split == "train" and rng.random() < cfg.augment_prob:  # val stays clean
        clip = clips.augmented(clip, names, rng)
    return clip


def make_clip(order: tuple[Generate, Job, Path]) -> tuple[Clip, str]:
    """Draws one clip and writes its file; (the clip, a hash of its pixels)."""
    cfg, job, folder = order
    clip = clip_of(cfg, job)
    frames = clips.render(clip)
    clips.write_mp4(folder / f"{job.name}.mp4", frames)
    return clip, hashlib.blake2b(frames.tobytes(), digest_size=16).hexdigest()


def make_clips(cfg: Generate, jobs: list[Job], folder: Path) -> list[tuple[Clip, str]]:
    """`make_clip` for all jobs, in order, in cfg.workers processes."""
    folder.mkdir()
    orders = [(cfg, job, folder) for job in jobs]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cfg.workers or cores, -(-len(jobs) // 64))  # starting one costs some 64 clips
    bar = {"desc": "drawing", "total": len(jobs), "unit": "clip", "disable": None}  # None: only on a terminal
    if workers == 1:
        return list(tqdm(map(make_clip, orders), **bar))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        return list(tqdm(pool.map(make_clip, orders, chunksize=16), **bar))


def drawn_dataset(cfg: Generate, out: Path, work: Path) -> tuple[dict, dict]:
    """Draws and words everything in `work`; ({split: records}, what metadata.json holds of it)."""
    jobs = plan(cfg)
    made = make_clips(cfg, jobs, work / "videos")
    records = {"train": [], "val": []}
    texts, report = answers(cfg, jobs, made, out / CACHE)
    for job, (clip, _), text in zip(jobs, made, texts, strict=True):
        if text is None:  # dropped, not replaced: a clip without its chain of thought is no clip of this dataset
            (work / "videos" / f"{job.name}.mp4").unlink()
        elif cfg.task != "direction":
            records[job.split].append(typed_record(job.name, cfg.task, clip))
        else:
            records[job.split].append(record(job.name, f"{job.name}.mp4", [(QUESTION, text)], facts_of(clip)))
    counts = count_labels(records)
    missing = [f"{label} in {split}" for split in counts for label in set(DIRECTIONS) - set(counts[split])]
    if missing and cfg.cot:
        lost = f"too many clips were dropped, none is left of {', '.join(sorted(missing)[:3])}"
        advice = "take another --cot_model, more --num_samples, or --cot_source trajectory"
        raise UserError(f"chains of thought: {lost}; {advice}")
    return records, {"fps": FPS, "counts": counts, "cot": report}


def record(name: str, video: str, pairs: list[tuple[str, str]], meta: dict) -> dict:
    """One entry of train.json or val.json in LLaVA's form; `meta` is for people and tests, training ignores it."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "<video>\n" + turns[0]["value"]
    return {"id": name, "video": video, "conversations": turns, "meta": meta}


def typed_record(name: str, task: str, clip: Clip) -> dict:
    """One entry in Video-R1's form, whose `problem_type` says how an answer is scored."""
    kind, question = clips.TASKS[task]
    entry = {"problem_id": name, "problem": question, "problem_type": kind, "data_type": "video"}
    solution = f"<answer>{clips.measured(clip, task)}</answer>"
    return entry | {"path": f"{name}.mp4", "options": [], "solution": solution, "meta": facts_of(clip)}


def facts_of(clip: Clip) -> dict:
    """`meta` of a drawn clip: what fixes its pixels, and the axis that it moves along."""
    numbers = lambda value: value if value is None or isinstance(value, str) else np.round(value, 3).tolist()
    axis = {(1, 0): "horizontal", (0, 1): "vertical"}.get(tuple(map(abs, SIGNS[clip.label])), "diagonal")
    return {key: numbers(value) for key, value in asdict(clip).items()} | {"axis": axis}


def count_labels(records: dict[str, list]) -> dict:
    counts = {split: Counter(entry["meta"]["label"] for entry in entries) for split, entries in records.items()}
    return {split: dict(sorted(counter.items())) for split, counter in counts.items()}


# -- Chains of thought: from the known trajectory (free, offline, the same for the same seed), or from a server that is
#    shown a strip of frames. It does not get the right answer: its text is kept only if form and option are right.

PROMPT = """The picture is one strip: {frames} frames of one video in time order, evenly spaced, the earliest at the \
left.{about}
{question}
Compare the frames before you decide. Reply in exactly this form:
<think>two or three sentences on what changes from frame to frame</think><answer>(letter) text of the option</answer>
Between the think tags, do not name any option or its letter."""
TORUS = " A ball that leaves a frame at one edge comes back at the opposite edge."
STRIP_FRAMES = 8
MAX_THINK = 1500  # characters: some 250 words; we asked for two or three sentences


def check_answer(text, right: str, last: str = "D") -> tuple[str | None, str]:
    """(the answer in our form, "") if it may be used, else (None, why not). last: the letter of the last option."""
    if not isinstance(text, str):
        return None, "no text"
    match = re.fullmatch(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", text, re.DOTALL)
    if match is None or len(re.findall(r"</?(?:think|answer)>", text)) != 4:
        return None, "wrong form"
    think, answer = match[1].strip(), match[2].strip()
    if not think or len(think) > MAX_THINK:
        return None, "empty or too long reasoning"
    if answer != right:
        return None, "wrong option"
    # "(b)", a lone capital from B on, or "option A"; a lone A may be the article
    any_letter = rf"\([A-{last}a-{last.lower()}]\)|\b[B-{last}]\b"
    if re.search(any_letter + r"|\b(?i:option|answer|choice|letter)\W+(?i:is\W+)?A\b", think):
        return None, "option letter in the reasoning"
    return f"<think>{think}</think><answer>{answer}</answer>", ""


def server_question(right: str, image_hash: str, image, question: str = QUESTION, about: str = TORUS) -> Question:
    """What the server is asked about one clip. right: the right option; image: a function that makes the PNG."""
    last = re.findall(r"^\(([A-Z])\)", question, re.MULTILINE)[-1]
    prompt = PROMPT.format(frames=STRIP_FRAMES, question=question, about=about)
    return Question(prompt, image_hash, image, partial(check_answer, right=right, last=last))


def ask_server(cfg: Generate, questions: list[Question], cache: Path) -> tuple[list, dict]:
    """The answers, None where a clip is dropped, and what metadata.json holds about them."""
    print(f"chains of thought: openai, {cfg.cot_model}")
    client = Client.from_env(cfg.cot_model)
    texts = ask_all(client, cache, questions, cfg.cot_workers)
    print("chains of thought: " + ", ".join(f"{name} {n}" for name, n in client.counts.items()))
    return texts, {"source": "openai", "model": cfg.cot_model, "counts": dict(client.counts)}


def uses_server(cfg: Generate) -> bool:
    from_key = cfg.cot_source == "auto" and bool(os.environ.get("OPENAI_API_KEY"))
    return cfg.cot and (cfg.cot_source == "openai" or from_key)


def answers(cfg: Generate, jobs: list[Job], made, cache: Path) -> tuple[list[str | None], dict]:
    """The answers for drawn clips, None where a clip is dropped, and what metadata.json holds about them."""
    if not cfg.cot:
        return [f"Answer: {OPTIONS[job.label]}" for job in jobs], {}
    if uses_server(cfg):
        strip = lambda clip: clips.png(clips.strip(clips.render(clip, clips.sampled_frames(clip.length))))
        questions = [server_question(OPTIONS[clip.label], digest, partial(strip, clip)) for clip, digest in made]
        return ask_server(cfg, questions, cache)
    print("chains of thought: trajectory")
    texts = []
    for job, (clip, _) in zip(jobs, made, strict=True):
        rng = np.random.default_rng([cfg.seed, 4, job.index])
        texts.append(clips.explain(clip.track(), clip.label, rng, cfg.cot_coordinates))
    return texts, {"source": "trajectory"}


# -- Clips of one's own


def folder_dataset(cfg: Generate, out: Path, work: Path) -> tuple[dict, dict]:
    """The dataset of --from_folder; as drawn_dataset. Clips stay where they are, records name them from `out`."""
    import folders  # imports torch, to read videos: neither --help nor the processes that draw must wait for that

    videos, unreadable = folders.find_videos(cfg)
    choices, report = folders.multiple_choice(cfg, videos), {}
    texts = [f"Answer: {right}" for _, right in choices]
    if cfg.cot:
        strips = [partial(folders.strip_of, video, STRIP_FRAMES) for video in videos]
        questions = [
            server_question(right, folders.file_hash(video), strip, text, about="")
            for video, (text, right), strip in zip(videos, choices, strips, strict=True)
        ]
        texts, report = ask_server(cfg, questions, out / CACHE)
    # by way of the real folders, for ".." behind a link leads elsewhere; the link of a clip itself is left alone
    base = os.path.relpath(os.path.realpath(cfg.from_folder), os.path.realpath(out))
    records = {"train": [], "val": []}
    for video, (question, _), text in zip(videos, choices, texts, strict=True):
        if text is not None:
            name = video.path.relative_to(cfg.from_folder).as_posix()
            entry = record(name, f"{base}/{name}", [(question, text)], {"label": video.label})
            records[video.split].append(entry)
    return records, {"counts": count_labels(records), "unreadable": unreadable, "cot": report}


# -- Files

OURS = ("videos", "train.json", "val.json", "metadata.json")
UNFINISHED = ".unfinished"
CACHE = "cot_cache.jsonl"  # outlives killed runs and --overwrite: answers cost money


def check_options(cfg: Generate) -> None:
    """UserError for what config.py cannot judge: what fits in the picture, what the files can hold, where they lie."""
    if cfg.from_folder is None:
        size, least = cfg.frame_size, clips.MIN_FRAME_SIZE
        expected = f"an even number (yuv420p) from {least} on, so that the ball fits"
        require(size >= least and size % 2 == 0, "frame_size", size, expected)
        expected = f"at least {clips.SAMPLED} frames: in fewer the motion cannot be judged"
        require(cfg.video_length >= clips.SAMPLED, "video_length", cfg.video_length, expected)
        if cfg.cot and cfg.task != "direction":
            raise UserError(f"--cot with --task {cfg.task}: chains of thought are of the direction; leave --cot out")
    else:
        root, out = Path(cfg.from_folder).resolve(), Path(cfg.output_dir).resolve()
        apart = root != out and root not in out.parents and out not in root.parents
        require(apart, "output_dir", cfg.output_dir, f"a folder of its own, apart from --from_folder {root}")
        if cfg.cot and not uses_server(cfg):
            known = "the path of what moves is known only for drawn clips"
            raise UserError(f"--cot with --from_folder: {known}; set OPENAI_API_KEY, or leave --cot out")
    if uses_server(cfg):
        Client.from_env(cfg.cot_model)  # for its errors, before anything is drawn


def move_into_place(work: Path, out: Path) -> None:
    """Replaces the dataset in `out` by the one in `work`; metadata.json, the mark of a whole one, goes last."""
    (out / "metadata.json").unlink(missing_ok=True)
    for name in OURS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)
        if (work / name).exists():  # clips of --from_folder stay where they are
            os.replace(work / name, out / name)
    work.rmdir()


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def generate(cfg: Generate, make_dataset=None) -> dict:
    """Makes the whole dataset; returns what metadata.json holds. UserError before anything is overwritten.

    make_dataset: as drawn_dataset, which is the default without --from_folder.
    """
    cfg.check()
    check_options(cfg)
    make_dataset = make_dataset or (drawn_dataset if cfg.from_folder is None else folder_dataset)
    if make_dataset is drawn_dataset:
        plan(cfg)  # for its errors, before a folder is made
    out, began = Path(cfg.output_dir), time.monotonic()
    work = out / UNFINISHED
    existing = [name for name in OURS if (out / name).exists()]
    if existing and not cfg.overwrite:
        holds = f"already holds {', '.join(existing)}"
        raise UserError(f"--output_dir {out}: {holds}, expected a new folder; or give --overwrite")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        records, facts = make_dataset(cfg, out, work)
        if not records["train"]:
            raise UserError(
                "chains of thought: no clip is left for train; take another --cot_model, or leave --cot out"
            )
        # val.json in random order, so that whoever reads its first N has all classes (training shuffles train.json)
        np.random.default_rng([cfg.seed, 6]).shuffle(records["val"])
        for split, entries in records.items():
            if entries:
                write_json(work / f"{split}.json", entries)
        metadata = {"options": as_dict(cfg), **facts}
        write_json(work / "metadata.json", metadata)
        move_into_place(work, out)
    except OSError as error:  # PyAV's errors of that kind too
        shutil.rmtree(work, ignore_errors=True)
        advice = "make room or choose another folder, then run again"
        raise UserError(f"--output_dir {out}: cannot be written ({error.strerror}); {advice}") from None
    seconds = time.monotonic() - began
    print(f"{out}: {len(records['train'])} train, {len(records['val'])} val, {seconds:.1f} s")
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

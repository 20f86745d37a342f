"""Draws a dataset of short clips of a moving ball: videos/*.mp4, train.json, val.json, metadata.json.

    python generate.py --output_dir data/synthetic_videos --num_samples 1000 --cot
    python generate.py --from_folder DIR        class-named folders of your own videos become a dataset

Only motion tells the class. A ball that simply crosses the picture must start at its entry edge, and one still gives
the class away. Here the picture is a torus: what leaves at one edge comes back at the opposite one, and the ball starts
anywhere with equal probability. So at any time its position is uniform over the whole picture, whatever the class: a
still tells nothing; the unordered set of stills tells the axis but not the sense; and a clip played backwards is a clip
of the opposite class with another, equally probable, start. (A cropped training clip must keep its ball in sight, which
hints at the axis, never at the sense.)

The way: plan (labels and splits) -> worker processes draw, augment, encode -> texts -> everything moved into place at
the end, so a killed run leaves nothing half-done and is simply started again. What is drawn and worded: clips.py.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import clips
from clips import FPS, OPTIONS, SIGNS, Clip, labels_of
from model import UserError
from openai_client import Client, Question, ask_all

# -- The plan, and the workers that carry it out


@dataclass(frozen=True)
class Job:
    """One clip to make."""

    index: int
    label: str
    split: str  # train or val
    cell: int  # start of a plain ball

    @property
    def name(self):
        return f"{self.index:06d}"


def plan(cfg: Generate) -> list[Job]:
    """What clip i is, for all i: labels balanced as evenly as the count allows and shuffled, each split on its own.

    Raises UserError where a label would be missing in a split, or a plain ball has too few places to start from.
    """
    names = labels_of(cfg.task)
    if cfg.num_samples < 2 * len(names):
        expected = f"at least {2 * len(names)}, so that every class is in train and in val"
        raise UserError(f"--num_samples: found {cfg.num_samples}, expected {expected}")
    rng = np.random.default_rng([cfg.seed, 0])
    label = np.array([names[i % len(names)] for i in range(cfg.num_samples)])[rng.permutation(cfg.num_samples)]
    jobs = {}
    for name in dict.fromkeys(names):
        mine = np.flatnonzero(label == name)
        cells = cfg.frame_size**2
        if cfg.style == "plain" and len(mine) > cells:
            few = f"the plain ball has only {cells} different clips a class at --frame_size {cfg.frame_size}"
            raise UserError(f"--num_samples: found {cfg.num_samples}, but {few}; ask for fewer, or --style varied")
        starts = rng.permutation(cells) if cfg.style == "plain" else np.zeros(len(mine), int)
        train = min(max(round(len(mine) * cfg.split), 1), len(mine) - 1)
        for k, index in enumerate(mine.tolist()):
            jobs[index] = Job(index, name, "train" if k < train else "val", int(starts[k]))
    return [jobs[index] for index in range(cfg.num_samples)]


def clip_of(cfg: Generate, job: Job) -> Clip:
    """The job's clip: a function of the seed and the index alone, whichever process asks."""
    rng = np.random.default_rng([cfg.seed, 1 + (cfg.task == "base"), job.index])
    if cfg.style == "plain":
        clip = clips.plain_clip(job.label, cfg.frame_size, cfg.video_length, job.cell)
    else:
        clip = clips.draw_clip(rng, job.label, cfg.frame_size, cfg.video_length)
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
    """`make_clip` for all jobs, in order, in cfg.workers processes. Raises UserError if two clips are the same."""
    orders = [(cfg, job, folder) for job in jobs]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cfg.workers or cores, -(-len(jobs) // 64))  # starting one costs some 64 clips
    bar = {"desc": "drawing", "total": len(jobs), "unit": "clip", "disable": None}  # None: only on a terminal
    if workers == 1:
        made = list(tqdm(map(make_clip, orders), **bar))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            made = list(tqdm(pool.map(make_clip, orders, chunksize=16), **bar))
    first = {}
    for job, (_, digest) in zip(jobs, made, strict=True):
        if first.setdefault(digest, job.index) != job.index:
            raise UserError(f"clips {first[digest]} and {job.index} are the same; take another --seed")
    return made


def draw_dataset(cfg: Generate, out: Path, work: Path) -> tuple[dict, dict]:
    """Draws and words everything in `work`; ({split: records}, what metadata.json holds of it)."""
    jobs = plan(cfg)
    (work / "videos").mkdir()
    made = make_clips(cfg, jobs, work / "videos")
    report = {}
    if cfg.task == "direction":
        texts, report = direction_answers(cfg, jobs, made, out / CACHE)
        turns = [text and [(QUESTION, text)] for text in texts]
    else:
        rngs = [np.random.default_rng([cfg.seed, 5, job.index]) for job in jobs]
        turns = [clips.base_turns(clip, rng, cfg.base_coordinates) for (clip, _), rng in zip(made, rngs, strict=True)]
    records, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    for job, (clip, _), pairs in zip(jobs, made, turns, strict=True):
        if pairs is None:  # dropped, not replaced: a clip without its chain of thought is no clip of this dataset
            (work / "videos" / f"{job.name}.mp4").unlink()
            continue
        records[job.split].append(record(job.name, f"{job.name}.mp4", pairs, facts_of(clip)))
        counts[job.split][job.label] += 1
    missing = [f"{label} in {split}" for split in counts for label in set(labels_of(cfg.task)) - set(counts[split])]
    if missing:
        lost = f"too many clips were dropped, none is left of {', '.join(sorted(missing)[:3])}"
        advice = "take another --cot_model, more --num_samples, or --cot_source trajectory"
        raise UserError(f"chains of thought: {lost}; {advice}")
    return records, {"fps": FPS, "counts": in_order(counts), "cot": report}


def record(name: str, video: str, pairs: list[tuple[str, str]], meta: dict) -> dict:
    """One entry of train.json or val.json in LLaVA's form; `meta` is for people and tests, training ignores it."""
    turns = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = "<video>\n" + turns[0]["value"]
    return {"id": name, "video": video, "conversations": turns, "meta": meta}


def facts_of(clip: Clip) -> dict:
    """`meta` of a drawn clip: what fixes its pixels, and where the ball is at the sampled times."""
    track = clip.track()
    visible = zip(track.xy.tolist(), track.inside, strict=True)
    xy = [[round(x, 1), round(y, 1)] if seen else None for (x, y), seen in visible]
    meta = {key: rounded(value) for key, value in asdict(clip).items()}
    meta["axis"] = {(1, 0): "horizontal", (0, 1): "vertical"}.get(tuple(map(abs, SIGNS[clip.label])), "diagonal")
    meta["speed"] = round(float(np.hypot(*clip.velocity)), 3)
    meta["trajectory"] = {"frames": clips.sampled_frames(clip.length).tolist(), "xy": xy}
    return meta


def rounded(value):
    if isinstance(value, tuple):
        return [rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


# -- Chains of thought: from the known trajectory (free, offline, the same for the same seed), or from a server that is
#    shown a strip of frames. It is not told the right answer: what it says is kept only if form and option are right.

PROMPT = """The picture is one strip: {frames} frames of one video in time order, the earliest at the left, each \
with its time in seconds below it.{about}
{question}
Compare {what} from frame to frame before you decide. Reply in exactly this form:
<think>two or three sentences on how {changes}</think><answer>(letter) text of the option</answer>
Between the think tags, do not name any option or its letter."""
BALL = {
    "about": " A ball that leaves a frame at one edge comes back at the opposite edge.",
    "what": "the ball's position",
    "changes": "the position changes",
}
ANYTHING = {"about": "", "what": "what is seen", "changes": "what is seen changes"}
STRIP_FRAMES = 8
MAX_THINK = 1500  # characters: some 250 words; we asked for two or three sentences


def names_letter(text: str, last: str) -> bool:
    """Whether an option is named: "(b)", a lone capital from B on, or "option A"; a lone A may be the article."""
    any_letter = rf"\([A-{last}a-{last.lower()}]\)|\b[B-{last}]\b"
    return bool(re.search(any_letter + r"|\b(?i:option|answer|choice|letter)\W+(?i:is\W+)?A\b", text))


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
    if names_letter(think, last):
        return None, "option letter in the reasoning"
    return f"<think>{think}</think><answer>{answer}</answer>", ""


def server_question(right: str, image_hash: str, image, question: str = QUESTION, words: dict = BALL) -> Question:
    """What the server is asked about one clip. right: the right option; image: a function that makes the PNG."""
    last = re.findall(r"^\(([A-Z])\)", question, re.MULTILINE)[-1]
    prompt = PROMPT.format(frames=STRIP_FRAMES, question=question, **words)
    return Question(prompt, image_hash, image, partial(check_answer, right=right, last=last))


def answers_of_server(cfg: Generate, client: Client, questions: list[Question], cache: Path) -> tuple[list, dict]:
    """The answers, None where a clip is dropped, and what metadata.json holds about them."""
    print(f"chains of thought: openai, {cfg.cot_model}")
    texts = ask_all(client, cache, questions, cfg.cot_workers)
    print("chains of thought: " + ", ".join(f"{name} {n}" for name, n in client.counts.items()))
    return texts, {"source": "openai", "model": cfg.cot_model, "counts": dict(client.counts)}


def asks_server(cfg: Generate) -> bool:
    return cfg.cot_source == "openai" or (cfg.cot_source == "auto" and bool(os.environ.get("OPENAI_API_KEY")))


def direction_answers(cfg: Generate, jobs: list[Job], made, cache: Path) -> tuple[list[str | None], dict]:
    """The direction answers of drawn clips, None where a clip is dropped, and what metadata.json holds about them."""
    if not cfg.cot:
        return [f"Answer: {OPTIONS[job.label]}" for job in jobs], {}
    if not asks_server(cfg):
        print("chains of thought: trajectory")
        texts = []
        for job, (clip, _) in zip(jobs, made, strict=True):
            rng = np.random.default_rng([cfg.seed, 4, job.index])
            texts.append(clips.explain(clip.track(), clip.label, rng, cfg.cot_coordinates))
        return texts, {"source": "trajectory"}
    client, frames = Client.from_env(cfg.cot_model), clips.sampled_frames(cfg.video_length)

    def strip(clip):
        return clips.strip(clips.render(clip, frames), frames / FPS)

    questions = [server_question(OPTIONS[clip.label], digest, partial(strip, clip)) for clip, digest in made]
    return answers_of_server(cfg, client, questions, cache)


def dataset_of_folder(cfg: Generate, out: Path, work: Path) -> tuple[dict, dict]:
    """The dataset of --from_folder; as draw_dataset. Clips stay where they are, records name them from `out`."""
    import folders

    root = Path(cfg.from_folder)
    videos, broken, notes = folders.gather(cfg)
    choices, report = folders.choices(cfg, videos), {}
    texts = [f"Answer: {choice.right}" for choice in choices]
    if cfg.cot:
        strips = [partial(folders.strip_of, video, STRIP_FRAMES) for video in videos]
        questions = [
            server_question(choice.right, folders.file_hash(video), strip, choice.text, ANYTHING)
            for video, choice, strip in zip(videos, choices, strips, strict=True)
        ]
        texts, report = answers_of_server(cfg, Client.from_env(cfg.cot_model), questions, out / CACHE)
    # by way of the real folders, for ".." behind a link leads elsewhere; the link of a clip itself is left alone
    base = os.path.relpath(os.path.realpath(root), os.path.realpath(out))
    records, counts = {"train": [], "val": []}, {"train": Counter(), "val": Counter()}
    for video, choice, text in zip(videos, choices, texts, strict=True):
        if text is not None:
            name = video.path.relative_to(root).as_posix()
            entry = record(name, f"{base}/{name}", [(choice.text, text)], {"label": video.label})
            folders.check_judged(entry, choice)
            records[video.split].append(entry)
            counts[video.split][video.label] += 1
    if not records["train"]:
        raise UserError(f"--from_folder {root}: no clip is left for train; see --cot_model, or leave --cot out")
    for line in [f"note: {line}" for line in notes] + [f"unreadable: {why}" for why in [*broken.values()][:20]]:
        print(line)
    if broken:
        print(f"{len(broken)} clips are unreadable; all are in {out / 'metadata.json'}")
    return records, {"counts": in_order(counts), "unreadable": broken, "cot": report}


def in_order(counts: dict[str, Counter]) -> dict:
    return {split: dict(sorted(counter.items())) for split, counter in counts.items()}


# -- Files

OURS = ("videos", "train.json", "val.json", "metadata.json")
UNFINISHED = ".unfinished"
CACHE = "cot_cache.jsonl"  # outlives killed runs and --overwrite: answers cost money


def check_drawing(cfg: Generate) -> None:
    """Raises UserError for what config.py cannot judge: what fits in the picture, what the files can hold."""
    size, least = cfg.frame_size, clips.MIN_FRAME_SIZE
    if size < least:
        ball = f"smaller than the ball (up to {least} pixels wide)"
        raise UserError(f"--frame_size: found {size}, {ball}, expected an even number from {least} on")
    if size % 2:
        raise UserError(f"--frame_size: found {size}, expected an even number (yuv420p); take {size + 1}")
    if cfg.video_length < clips.SAMPLED:
        expected = f"at least {clips.SAMPLED} frames: in fewer the motion cannot be judged"
        raise UserError(f"--video_length: found {cfg.video_length}, expected {expected}")
    if cfg.task == "base" and (cfg.cot or cfg.style == "plain"):
        raise UserError("--task base: has its own answers and colours, expected without --cot and --style plain")
    if cfg.cot and asks_server(cfg):
        Client.from_env(cfg.cot_model)  # for its errors, before anything is drawn


def open_folder(cfg: Generate) -> tuple[Path, Path]:
    """(the output folder, an empty folder in it to build in). UserError if it holds more than a killed run leaves."""
    out = Path(cfg.output_dir)
    work = out / UNFINISHED
    try:
        out.mkdir(parents=True, exist_ok=True)
        killed_at_the_end = work.exists() and not (out / "metadata.json").exists()
        known = {UNFINISHED, CACHE, *(OURS if killed_at_the_end else ())}
        foreign = sorted(entry.name for entry in out.iterdir() if entry.name not in known)
        if foreign and not cfg.overwrite:
            holds = f"already holds {', '.join(foreign[:3])}"
            raise UserError(f"--output_dir {out}: {holds}, expected a new or empty folder; or give --overwrite")
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


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def disk_errors(out: Path, work: Path):
    """A disk that cannot be written ends in one line, and leaves nothing."""
    try:
        yield
    except OSError as error:  # PyAV's errors of that kind too
        if error.errno is None:  # those of requests are no disk's
            raise
        shutil.rmtree(work, ignore_errors=True)
        left = f"cannot be written ({error.strerror}); nothing is left there but {CACHE}, if any"
        raise UserError(f"--output_dir {out}: {left}; make room or choose another folder, then run again") from None


def generate(cfg: Generate) -> dict:
    """Makes the whole dataset; returns what metadata.json holds. Raises UserError before anything is overwritten."""
    cfg.check()
    if cfg.from_folder is None:
        check_drawing(cfg)
        plan(cfg)  # for its errors, before a folder is opened
        make_dataset = draw_dataset
    else:
        import folders  # imports torch, to read videos: neither --help nor the processes that draw must wait for that

        folders.check_options(cfg)
        make_dataset = dataset_of_folder
    out, work = open_folder(cfg)
    began = time.monotonic()
    with disk_errors(out, work):
        records, facts = make_dataset(cfg, out, work)
        # val.json in random order, so that whoever reads its first N has all classes (training shuffles train.json)
        np.random.default_rng([cfg.seed, 6]).shuffle(records["val"])
        for split, entries in records.items():
            if entries:
                write_json(work / f"{split}.json", entries)
        metadata = {"options": as_dict(cfg), **facts}
        write_json(work / "metadata.json", metadata)
    move_into_place(work, out)
    seconds = time.monotonic() - began
    print(f"{out}: {len(records['train'])} train, {len(records['val'])} val, {seconds:.1f} s")
    return metadata


def main():
    cfg = parse(Generate)
    print("options:", ", ".join(f"{name}={value!r}" for name, value in changed(cfg).items()) or "defaults")
    for line in ignored_options(cfg):
        print(f"note: {line}")
    generate(cfg)


if __name__ == "__main__":
    cli(main)

"""Broken input at scale: mutated clips, pictures and datasets through the loader that training uses.

    python tests/mutations.py --cases 2000 --seed 0        2,000 mp4, gif and png files; 2,000 json and jsonl datasets

Case i of a seed is always the same file. The cases run in a process that is watched from outside: none may end it,
take longer than --seconds, or more than --mib of memory. What cannot be used must be refused in one line that names the
file, or skipped, counted and named; everything else must come out as a batch. Exit code 1 if any case did otherwise;
--keep FOLDER keeps those files. The last line is one JSON object.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np

from config import GRPO, SFT
from data import Loader, Processor, load_tokenizer, read_records
from evaluate import answerable
from model import UserError
from model.loading import ModelConfig

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
GOOD = "good.mp4"
MIB = 2**20

# -- Whole files to begin with


def write(path, frames, codec="libx264", pix_fmt="yuv420p", container=None, **options):
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pix_fmt
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write_originals(folder):
    """{name: bytes} of small files of every kind, GOOD among them; written to folder."""
    rng = np.random.default_rng(0)
    moving = [np.roll(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), 3 * i, 1) // 2 + 5 * i for i in range(16)]
    noise = [rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)]
    write(folder / GOOD, moving)
    write(folder / "ahead.mp4", moving, container={"movflags": "faststart"}, g="4")
    write(folder / "pieces.mp4", moving, container={"movflags": "frag_keyframe+empty_moov"}, g="5")
    write(folder / "mpeg4.mp4", moving, "mpeg4", g="6")
    write(folder / "a.gif", moving[:12], "gif", "rgb8")
    write(folder / "still.gif", noise, "gif", "rgb8")
    for name, pix_fmt in (("a.png", "rgb24"), ("grey.png", "gray"), ("deep.png", "rgb48be"), ("see.png", "rgba")):
        write(folder / name, noise, "png", pix_fmt, {"update": "1"})
    write(folder / "moving.apng", moving[:4], "apng", "rgb24")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- Mutations of bytes

EXTREMES = (0, 1, 2, 255, 60_000, 65_535, 10**9, 2**31 - 1, 2**31, 2**32 - 1)
TAGS = [b"stsz", b"stsc", b"stts", b"ctts", b"stco", b"stss", b"tkhd", b"mvhd", b"mdhd", b"elst", b"avcC", b"trun"]
TAGS += [b"tfhd", b"avc1", b"mp4v", b"esds", b"IHDR", b"PLTE", b"acTL", b"fcTL", b"IDAT", b"GIF89a", b"\x21\xf9\x04"]


def place(rng, data):
    return rng.randrange(len(data) + 1)


def flip_bits(rng, data, others):
    for _ in range(rng.choice((1, 3, 30))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(rng, data, others):
    del data[place(rng, data) :]


def remove_part(rng, data, others):
    at = place(rng, data)
    del data[at : at + rng.choice((1, 4, 100))]


def repeat_part(rng, data, others):
    at = place(rng, data)
    data[at:at] = data[at : at + rng.choice((1, 8, 500))] * rng.choice((1, 2, 20))


def add_noise(rng, data, others):
    at = place(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 300)))


def zero_part(rng, data, others):
    at, n = place(rng, data), rng.choice((4, 50, 1000))
    data[at : at + n] = bytes(len(data[at : at + n]))


def splice(rng, data, others):
    other = rng.choice(others)
    at = place(rng, data)
    data[at:] = other[min(at, len(other)) :]


def claim(rng, data, others):
    """A number of a header becomes an extreme one: sizes, counts, lengths, times."""
    found = [at for tag in TAGS for at in [data.find(tag)] if at >= 0]
    if found:
        at = rng.choice(found) + 4 + 4 * rng.randrange(5) + rng.choice((0, 0, 2))
        order = rng.choice("><")
        data[at : at + 4] = struct.pack(order + "I", rng.choice(EXTREMES))


MUTATIONS = (flip_bits, cut, remove_part, repeat_part, add_noise, zero_part, splice, claim, claim, claim)


def mend_checksums(data):
    """A PNG with the right checksum on every chunk: without it, a decoder would look no further."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + size > len(data):
            break
        data[at + 8 + size : at + 12 + size] = struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + size]))
        at += 12 + size


def mutate_bytes(rng, data, others, most=4):
    data = bytearray(data)
    for mutation in rng.choices(MUTATIONS, k=rng.choice([k for k in (1, 1, 1, 2, 4) if k <= most])):
        mutation(rng, data, others)
    if rng.random() < 0.8:
        mend_checksums(data)
    return bytes(data)


def mutated_file(seed, case, originals):
    """(name, bytes) of a broken clip or picture."""
    rng = random.Random(f"{seed} file {case}")
    name = rng.choice(list(originals))
    return f"{case:06d}_{name}", mutate_bytes(rng, originals[name], list(originals.values()))


# -- Mutations of datasets

QUESTION = "<video>\nWhere to?\nOptions:\n(A) up\n(B) down"


def whole_records(rng):
    """Records of every form, some with several clips, frames, options, turns."""
    part = {"type": "video", "video": GOOD, "fps": 2, "min_pixels": 784, "max_pixels": 3136}
    parts = [part, {"type": "text", "text": QUESTION[8:]}, {"type": "image", "image": "a.png"}]
    forms = [
        {"video": GOOD, "conversations": turns(QUESTION, "(A) up"), "id": 7},
        {"image": "a.png", "conversations": turns("<image>\nWhat?", "Noise")},
        {"videos": [GOOD, GOOD], "conversations": turns("<video><video>Same?", "Yes", "Sure?", "Yes")},
        {"video": ["a.png", "a.png", "a.png"], "conversations": turns(QUESTION, "(B) down")},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "(A) up"}]},
        {"conversations": turns("ä\u00e9\U0001f600 no clip", "Right")},
    ]
    return [json.loads(json.dumps(rng.choice(forms))) for _ in range(rng.randint(1, 6))]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


WEIRD = [None, True, False, 0, -1, 1e300, 1e-300, -0.0, float("nan"), float("inf"), 10**30, 2**63, "", " ", "\0"]
WEIRD += ["\ud83d", "é" * 300, "<video>", "<image>", "<video><video>", "<|im_end|>", "<|video_pad|>", "/etc/passwd"]
WEIRD += ["../../etc/passwd", "/dev/zero", "http://localhost/a.mp4", "file:///etc/passwd", "concat:a|b", "videos", "."]
WEIRD += ["x" * 5000, [], {}, [[]], [None], [1, "a"], {"type": "video"}, {"": {}}, nested(50)]
WEIRD += ["system", "video", "text", ["a.png", 1], GOOD, [GOOD, GOOD], "a.png", "none.mp4"]
KEYS = "video videos image images conversations messages from value role content type text path id unknown fps".split()
KEYS += "sample_fps nframes min_frames max_frames min_pixels max_pixels total_pixels resized_height".split()
KEYS += "resized_width problem solution options problem_type".split()


def nodes(value):
    """(container, key) of everything in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from nodes(item)


def mutate_value(rng, records):
    """Change one thing in a list of records."""
    container, key = rng.choice(list(nodes(records)))
    what = rng.randrange(5)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[rng.choice(KEYS)] = container.pop(key)
    elif what == 2 and isinstance(container, dict):
        container[rng.choice(KEYS)] = deepcopy(rng.choice(WEIRD))
    elif what == 3 and isinstance(container, list):
        container.insert(key, deepcopy(rng.choice([*WEIRD, *container])))
    else:
        container[key] = deepcopy(rng.choice(WEIRD))


def mutated_dataset(seed, case):
    """(name, bytes): a json or jsonl file, wrong in what it says, in its text, or both."""
    rng = random.Random(f"{seed} dataset {case}")
    records, lines = whole_records(rng), rng.random() < 0.5
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        if records:
            mutate_value(rng, records)
    texts = [json.dumps(record, ensure_ascii=rng.random() < 0.5) for record in records]
    text = "\n".join(texts) + "\n" if lines else "[" + ",\n".join(texts) + "]"
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        others = [data, b"[" * 3000, b'{"a":' * 2000, b"\xff\xfe[\0]\0", b'"' + b"9" * 5000]
        data = mutate_bytes(rng, data, others, most=2)
    return f"{case:06d}.{'jsonl' if lines else 'json'}", data


# -- What a case must do


def options(cls, folder, **changes):
    args = cls(image_folder=str(folder), max_seq_length=2048, max_skip_share=1.0, dataloader_num_workers=0, cache_mb=1)
    args.per_device_train_batch_size = 8
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def one_line(text, name):
    """The text; an assertion where it is not what a user can read."""
    text.encode("utf-8")
    assert text.strip() and "\n" not in text and name in text, f"not one line about {name}: {text!a}"
    return text


def load(records, processor, args):
    """({sample: reason} of those skipped, number that came out) of one pass over the records."""
    loader = Loader(records, processor, args, shuffle=False, collate=list)
    taken = 0
    try:
        for micro_batches in loader.iterate(0, loader.steps_per_epoch):
            taken += sum(map(len, micro_batches))
    except UserError as error:  # the one that it raises on purpose: nothing is left
        assert f"all {len(records)} samples are left out" in str(error), error
    found = taken + len(loader.skipped)
    assert found == len(records), f"{taken} taken and {len(loader.skipped)} skipped of {len(records)}"
    return loader.skipped, taken


def run_file(path, processors, folder):
    """A mutated clip between two whole ones: "taken", or "skipped" and why."""
    clip = {"video": GOOD, "conversations": turns(QUESTION, "(A) up")}
    kind = "image" if path.suffix == ".png" or "still" in path.name else "video"
    broken = {kind: path.name, "conversations": turns(f"<{kind}>\nWhere?", "(A) up")}
    outcomes = []
    for processor in processors:
        skipped, _ = load([clip, broken, clip], processor, processor.args)
        assert set(skipped) <= {"sample 1"}, f"a whole clip was skipped: {skipped}"
        outcomes += [one_line(text, path.name) for text in skipped.values()]
    return ("skipped", outcomes[0]) if outcomes else ("taken", "")


def run_dataset(path, processors, folder):
    """A mutated dataset, as SFT and as GRPO read it: "refused", "skipped" in part, or "taken" whole."""
    try:
        records = read_records(path)
    except UserError as error:
        return "refused", one_line(str(error), path.name)
    skipped, _ = load(records, processors[0], processors[0].args)
    try:
        good, notes = answerable(options(GRPO, folder), "training", records)
        if len(good):
            load(good, processors[1], processors[1].args)
        skipped |= dict.fromkeys(notes, "its answer cannot be read")
    except UserError as error:
        assert "cannot be read" in str(error), error
    for text in skipped.values():
        one_line(text, "")
    return ("skipped", next(iter(skipped.values()))) if skipped else ("taken", "")


def memory_peak():
    """MiB that this process held at most since the last call."""
    text = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # begin anew: proc(5)
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def work(pipe, folder):
    """A process that takes (kind, path) after path, and answers (outcome, why, seconds, MiB more than before)."""
    logging.disable()
    folder = Path(folder)
    tokenizer, config = load_tokenizer(TINY), ModelConfig.from_folder(TINY)
    plain = options(SFT, folder)
    by_rate = options(SFT, folder, nframes=None, fps=3.0, pack_tokens=None)
    by_rate.video_min_pixels, by_rate.video_max_pixels = None, 50_176
    processors = [Processor(tokenizer, config, args) for args in (plain, by_rate)]
    load([{"video": GOOD, "conversations": turns(QUESTION, "(A) up")}], processors[0], plain)  # what is loaded but once
    while (found := pipe.recv()) is not None:
        kind, path = found
        memory_peak()
        before, began = memory_peak(), time.monotonic()
        try:
            outcome, why = (run_file if kind == "file" else run_dataset)(path, processors, folder)
        except Exception as error:  # noqa: BLE001 (to be told, whatever it is: that is what this is for)
            at = error.__traceback__
            while at.tb_next:
                at = at.tb_next
            where = f"{at.tb_frame.f_code.co_name}:{at.tb_lineno}"
            outcome, why = "raised", f"{type(error).__name__} at {where}: {error!a}"[:600]
        pipe.send((outcome, why, time.monotonic() - began, memory_peak() - before))


class Worker:
    """A process that is watched, and replaced when it ends or hangs."""

    def __init__(self, folder):
        self.folder, self.process, self.pipe, self.warm = folder, None, None, False

    def ask(self, kind, path, seconds):
        if self.process is None:
            self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
            self.process = multiprocessing.get_context("spawn").Process(target=work, args=(theirs, str(self.folder)))
            self.process.start()
            theirs.close()
        self.pipe.send((kind, path))
        try:
            if self.pipe.poll(seconds + (0 if self.warm else 60)):  # it imports torch first
                self.warm = True
                return self.pipe.recv()
            found = "hung", f"no answer within {seconds} seconds", float(seconds), 0.0
        except EOFError:
            self.process.join()
            found = "died", f"the process ended with code {self.process.exitcode}", 0.0, 0.0
        self.process.kill()
        self.process.join()
        self.process, self.warm = None, False
        return found

    def close(self):
        if self.process is not None:
            self.pipe.send(None)
            self.process.join(10)


BAD = ("raised", "died", "hung", "too much memory")


def run_all(kind, cases, args, folder, originals):
    """Counter of outcomes, and [(name, outcome, why)] of the bad ones."""
    worker, counts, bad, slowest, most = Worker(folder), Counter(), [], 0.0, 0.0
    for case in cases:
        made = mutated_file(args.seed, case, originals) if kind == "file" else mutated_dataset(args.seed, case)
        path = folder / made[0]
        path.write_bytes(made[1])
        outcome, why, seconds, mib = worker.ask(kind, path, args.seconds)
        if outcome not in BAD and mib > args.mib:
            outcome, why = "too much memory", f"{mib:.0f} MiB"
        counts[outcome] += 1
        slowest, most = max(slowest, seconds), max(most, mib)
        if outcome in BAD:
            bad.append((made[0], outcome, why))
            print(f"{made[0]}: {outcome}: {why}", flush=True)
            if args.keep:
                Path(args.keep).mkdir(parents=True, exist_ok=True)
                (Path(args.keep) / made[0]).write_bytes(made[1])
        if args.show:
            print(f"{made[0]}: {outcome}: {why}", flush=True)
        path.unlink()
    worker.close()
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    print(f"{sum(counts.values()):>6} {kind}s: {told}; slowest {slowest:.2f} s, most memory {most:.0f} MiB", flush=True)
    return {"counts": dict(counts), "bad": bad, "slowest_s": round(slowest, 3), "most_mib": round(most)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="files, and as many datasets")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="a case may take")
    parser.add_argument("--mib", type=float, default=1024, help="MiB of memory that a case may take")
    parser.add_argument("--kinds", default="file,dataset")
    parser.add_argument("--keep", help="folder for the files of cases that went wrong")
    parser.add_argument("--show", action="store_true", help="a line for every case")
    args = parser.parse_args()
    began, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        originals = write_originals(Path(folder))
        for kind in args.kinds.split(","):
            cases = range(args.first, args.first + args.cases)
            results[kind] = run_all(kind, cases, args, Path(folder), originals)
    bad = sum(len(found["bad"]) for found in results.values())
    print(json.dumps({"seed": args.seed, "cases": args.cases, "seconds": round(time.monotonic() - began), **results}))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

"""Conversations and clips -> ids, already shifted targets, positions, patches -> packed batches.

    read_records(path)                 a dataset, json or jsonl (dataset/index.py)
    Processor.encode(record)           one record -> an Example; decoded clips are kept (cache_mb)
    pack, pack_groups, Loader          Examples -> packed batches, and in which order (dataset/batch.py)
    python data.py FILE... [--fps 4]   what the model will see of each video, image or dataset

SFT, rollouts, evaluation and inference all come through here. Frames and sizes are video.py's duty.
L tokens of a sample, T of a batch, F frames, P patches, N clips.
"""

# ruff: noqa: E402
import sys

from config import Look, cli, ignored_options, parse

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # before torch is imported
    cli(lambda: parse(Look))

import logging
import math
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dataset.batch import Example, Loader, TooLong, pack, pack_groups
from dataset.index import read_records
from dataset.places import Places
from dataset.records import IMAGE_SUFFIXES, Media, Turn, read_turns, record_name
from model import UserError, nearest_path
from model.loading import ModelConfig, resolve_folder
from model.qwen import IGNORE
from model.rope import mrope_position_ids
from video import MERGE, PATCH, TEMPORAL, ClipPlan, Options, apply_control, file_stamp, plan_clip, read_clip

__all__ = ["Example", "Loader", "Processor", "TooLong", "load_tokenizer", "pack", "pack_groups", "read_records"]

# The system turn that Qwen2.5-VL's chat template adds when a conversation brings none
DEFAULT_SYSTEM = Turn("system", ("You are a helpful assistant.",))
CONTROLS = ("none", "reversed", "shuffled", "blank")

log = logging.getLogger("data")


def load_tokenizer(folder: str | Path):
    """A checkpoint's tokenizer: its tokenizer.json, which is all that transformers would read, else what Qwen2's own
    class makes of vocab.json and merges.txt. No class that the folder names is imported, no template of it rendered."""
    path = Path(folder) / "tokenizer.json"
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; expected a checkpoint's tokenizer.json")
    if not path.exists():
        from transformers import Qwen2Tokenizer  # takes seconds to import
    try:
        if path.exists():
            return Tokenizer.from_file(str(path))
        return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing more special)
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(f"{folder}: no tokenizer could be loaded from it ({reason}); expected tokenizer.json") from None


class ClipCache:
    """Plans and patches most recently used, up to a number of bytes. Threads may share it."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.entries: OrderedDict = OrderedDict()  # key -> (value, bytes)
        self.lock = threading.Lock()

    def get(self, key):
        with self.lock:
            if key not in self.entries:
                return None
            self.entries.move_to_end(key)
            return self.entries[key][0]

    def put(self, key, value, size: int) -> None:
        with self.lock:
            if size > self.limit or key in self.entries:  # another thread may have been as quick
                return
            self.entries[key] = value, size
            self.size += size
            while self.size > self.limit:
                self.size -= self.entries.popitem(last=False)[1][1]


class Processor:
    """Turns records into Examples. One for a process; its threads share the cache.

    tokenizer: transformers' or a bare `tokenizers.Tokenizer`. args: a config.VideoArgs, or anything with its fields.
    """

    def __init__(self, tokenizer, config: ModelConfig, args):
        self.backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.tokenizer, self.config, self.args = tokenizer, config, args
        self.im_start, self.im_end = self.token_id("<|im_start|>"), self.token_id("<|im_end|>")
        for token, expected in (("<|video_pad|>", config.video_token_id), ("<|image_pad|>", config.image_token_id)):
            found = self.token_id(token)
            if found != expected:
                told = f"{token} is {found} in the tokenizer, {expected} in config.json"
                raise UserError(f"{told}; use the files of one checkpoint")
        v = config.vision
        found, made = (v.patch_size, v.temporal_patch_size, v.spatial_merge_size), (PATCH, TEMPORAL, MERGE)
        assert found == made, f"config.json is for patches of {found}, video.py makes {made}"
        special = [t.content for t in self.backend.get_added_tokens_decoder().values() if t.special]
        self.special = re.compile("|".join(map(re.escape, special)))
        self.encode_text: Callable[[str], tuple[int, ...]] = lru_cache(4096)(self.tokenise)
        if args.image_folder and not Path(args.image_folder).is_dir():
            hint = nearest_path(args.image_folder)
            raise UserError(f"--image_folder: no such folder {args.image_folder}; expected that of the clips{hint}")
        self.places = Places(args)
        self.cache = ClipCache(args.cache_mb * 2**20)
        self.rebudgeted: dict[str, str] = {}  # samples that got fewer frames to fit max_seq_length, and how many
        self.notes: Counter = Counter()  # options that were overruled, and how often

    def token_id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no {token}; expected that of a Qwen2.5-VL checkpoint")
        return found

    def tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    # -- From record to Example

    def encode(self, record: dict, answer: bool = True, control: str = "none", name: str | None = None) -> Example:
        """One record as an Example.

        answer=True: the whole conversation, with targets. answer=False: up to the last user turn, ready for the reply.
        control: "none", or the clips "reversed", "shuffled" (by the record's name) or "blank".
        Raises UserError naming the sample or file; TooLong if it cannot be brought within max_seq_length.
        """
        assert control in CONTROLS, f"control {control!r}, expected one of {CONTROLS}"
        name = name or record_name(record)
        pieces, plans = self.layout(record, answer, name)
        ids, trained = self.expand(pieces, plans)
        targets = np.full(len(ids), IGNORE, np.int64)
        targets[:-1][trained[1:]] = ids[1:][trained[1:]]
        grids, seconds = [plan.grid_thw for plan in plans], [plan.second_per_grid for plan in plans]
        clips, orders = self.read(plans, control, name)
        return Example(
            name=name,
            ids=ids,
            targets=targets,
            position_ids=mrope_position_ids(ids.tolist(), grids, seconds, self.config),
            patches=None if not clips else clips[0] if len(clips) == 1 else torch.cat(clips),
            grid_thw=grids,
            second_per_grid=seconds,
            frame_indices=[[plan.indices[i] for i in order] for plan, order in zip(plans, orders, strict=True)],
            frame_times=[[plan.times[i] for i in order] for plan, order in zip(plans, orders, strict=True)],
            num_vision_tokens=sum(plan.num_tokens for plan in plans),
            record=record,
        )

    def length(self, record: dict, answer: bool = True, name: str | None = None) -> int:
        """Tokens that encode would give, without decoding more than a clip's first frame. Raises as encode does."""
        return self.shape(record, answer, name)[1]

    def shape(self, record: dict, answer: bool = True, name: str | None = None) -> tuple[list, int, int]:
        """(grids, tokens, those of them that are trained) that encode would give, as `length` finds them."""
        pieces, plans = self.layout(record, answer, name or record_name(record))
        trained = sum(len(piece) for piece, said in pieces if said and not isinstance(piece, Media))
        return [plan.grid_thw for plan in plans], text_length(pieces) + sum(plan.num_tokens for plan in plans), trained

    def layout(self, record: dict, answer: bool, name: str) -> tuple[list, list[ClipPlan]]:
        """Pieces of the chat (token ids, or a Media) with whether they are trained, and the plan of each clip."""
        turns = spoken_turns(read_turns(record, name), answer, name)
        pieces = self.render(turns, answer, name)
        media = [piece for piece, _ in pieces if isinstance(piece, Media)]
        plans = [self.plan(item, name) for item in media]
        return pieces, self.fit(media, plans, text_length(pieces), name)

    def render(self, turns: list[Turn], answer: bool, name: str) -> list[tuple[tuple[int, ...] | Media, bool]]:
        """The chat template of Qwen2.5-VL. Text between two special tokens is encoded in one go, as tokenizing the
        rendered template does; only an answer starts anew, because in generation it does too."""
        pieces = []
        for turn in turns:
            text = f"{turn.role}\n"
            pieces.append(((self.im_start,), False))
            if turn.role == "assistant":
                answer_ids = (*self.encode_text(self.plain(turn.text, name)), self.im_end)
                pieces += [(self.encode_text(text), False), (answer_ids, turn.trained)]
            else:
                for part in turn.parts:
                    if isinstance(part, str):
                        text += self.plain(part, name)
                        continue
                    pieces += [((*self.encode_text(text), self.config.vision_start_token_id), False), (part, False)]
                    pieces.append(((self.config.vision_end_token_id,), False))
                    text = ""
                pieces.append(((*self.encode_text(text), self.im_end), False))
            pieces.append((self.encode_text("\n"), False))
        if not answer:
            pieces.append(((self.im_start, *self.encode_text("assistant\n")), False))
        return pieces

    def plain(self, text: str, name: str) -> str:
        """Text without special tokens: they would change who speaks, or stand for clips that are not there."""
        found = self.special.search(text)
        if found:
            told = f"{name}: the text holds the special token {found[0]}"
            raise UserError(f"{told}; remove it (clips are marked <video> or <image>)")
        return text

    def expand(self, pieces: list, plans: list[ClipPlan]) -> tuple[np.ndarray, np.ndarray]:
        """Pieces -> ids (L,) int64 and whether each is the assistant's (L,) bool."""
        ids, trained, plans = [], [], iter(plans)
        for piece, is_answer in pieces:
            if isinstance(piece, Media):
                pad = self.config.video_token_id if piece.kind == "video" else self.config.image_token_id
                piece = (pad,) * next(plans).num_tokens
            ids += piece
            trained += [is_answer] * len(piece)
        return np.array(ids, np.int64), np.array(trained, bool)

    # -- Clips

    def plan(self, media: Media, name: str, most_frames: int | None = None, size=None) -> ClipPlan:
        """The plan of a clip, remembered as long as its files do not change."""
        paths = tuple(self.places.locate(path, name) for path in media.paths)
        options = Options.from_args(media.kind, self.args, media.options, name)
        stamp = tuple(map(file_stamp, paths))
        key = (media.kind, stamp, options, most_frames, size)
        plan = self.cache.get(key)
        if plan is None:
            plan = plan_clip(media.kind, paths, options, most_frames, size)
            plan = replace(plan, stamp=stamp)
            self.cache.put(key, plan, 1000 + 200 * len(plan.indices))  # about its bytes
            for note in plan.notes:
                self.tell(note, name)
        return plan

    def read(self, plans: list[ClipPlan], control: str, name: str) -> tuple[list[Tensor], list[list[int]]]:
        """The patches of each clip, (P, 1176) uint8, and the order of its frames."""
        clips, orders = [], []
        for i, plan in enumerate(plans):
            patches = self.cache.get(plan)
            if patches is None:
                patches = read_clip(plan)
                self.cache.put(plan, patches, patches.nbytes)
            still = plan.kind == "image" and control in ("reversed", "shuffled")
            patches, order = apply_control(patches, plan.grid_thw, "none" if still else control, f"{name} {i}")
            clips.append(patches)
            orders.append(order[: len(plan.indices)])
        return clips, orders

    def fit(self, media: list[Media], plans: list[ClipPlan], text: int, name: str) -> list[ClipPlan]:
        """Plans whose tokens stay within max_seq_length: the clip with most frames loses two at a time, keeping two."""
        limit, frames = self.args.max_seq_length, [len(plan.indices) for plan in plans]
        a_step = [math.prod(plan.size) // (PATCH * MERGE) ** 2 for plan in plans]  # tokens a grid step
        steps = [plan.grid_thw[0] for plan in plans]
        found = length = text + sum(n * s for n, s in zip(steps, a_step, strict=True))
        while length > limit:
            i = max(range(len(plans)), key=lambda i: steps[i], default=None)
            if self.args.overlong == "drop" or i is None or steps[i] == 1:
                raise TooLong(f"{name}: {found} tokens, {text} of them text; max_seq_length is {limit}")
            steps[i] -= 1
            length -= a_step[i]
        for i, plan in enumerate(plans):
            if steps[i] < plan.grid_thw[0]:
                plans[i] = self.plan(media[i], name, steps[i] * TEMPORAL, plan.size)
                self.rebudgeted[name] = f"{frames} -> {[n * TEMPORAL for n in steps]} frames for max_seq_length {limit}"
        return plans

    def tell(self, note: str, name: str) -> None:
        """Log an overruled option once, however many samples it touches."""
        kind = re.sub(r"[\d.]+", "#", note)
        self.notes[kind] += 1
        if self.notes[kind] == 1:
            log.warning("%s: %s (told once)", name, note)


def spoken_turns(turns: list[Turn], answer: bool, name: str) -> list[Turn]:
    """The turns to render: a system turn first; with the answers checked, or without the last one."""
    if not answer and turns[-1].role == "assistant":
        turns = turns[:-1]
    elif answer and turns[-1].role != "assistant":
        raise UserError(f"{name}: ends with a turn of the {turns[-1].role}; expected the assistant's answer")
    if not any(turn.role == "user" for turn in turns):
        raise UserError(f"{name}: no user's turn; expected a question")
    if any(turn.role == "assistant" and not turn.text.strip() for turn in turns):
        raise UserError(f"{name}: an empty answer; expected text in every turn of the assistant")
    if answer and not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise UserError(f"{name}: every answer is marked as not learned (loss, weight); leave the record out")
    if any(turn.role == "user" and not any(not isinstance(p, str) or p.strip() for p in turn.parts) for turn in turns):
        raise UserError(f"{name}: an empty turn of the user; expected text, a video or an image")
    return turns if turns[0].role == "system" else [DEFAULT_SYSTEM, *turns]


def text_length(pieces: list) -> int:
    return sum(len(piece) for piece, _ in pieces if not isinstance(piece, Media))


# -- python data.py FILE...


def describe(name: str, processor: Processor, record: dict) -> list[str]:
    """The lines that tell what the model will see of one record."""
    pieces, plans = processor.layout(record, False, name)
    lines = []
    for plan in plans:
        lines.append(f"{', '.join(plan.paths[:2])}{' ...' if len(plan.paths) > 2 else ''}")
        h, w = plan.source_size
        t, rows, columns = plan.grid_thw
        lines.append(f"  source    {plan.total_frames} frame(s), {w} x {h}, {plan.source_fps:.6g} fps")
        lines.append(f"  frames    {len(plan.indices)}: {' '.join(map(str, plan.indices))}")
        lines.append(f"  seconds   {' '.join(f'{s:.2f}' for s in plan.times)}")
        grid = f"grid {t} x {rows} x {columns} patches, {plan.num_tokens} tokens"
        lines.append(f"  size      {plan.size[1]} x {plan.size[0]}, {grid}")
        if plan.kind == "video":
            lines += describe_time(plan, processor.config)
        lines += [f"  note      {note}" for note in plan.notes]
    total = text_length(pieces) + sum(plan.num_tokens for plan in plans)
    return [*lines, f"  prompt    {total} tokens with the question, limit {processor.args.max_seq_length}"]


def describe_time(plan: ClipPlan, config: ModelConfig) -> list[str]:
    ids = [config.video_token_id] * plan.num_tokens
    positions = mrope_position_ids(ids, [plan.grid_thw], [plan.second_per_grid], config)
    times = positions[0, :: plan.num_tokens // plan.grid_thw[0]].tolist()
    lines = [f"  time ids  {' '.join(map(str, times))}  ({plan.second_per_grid:.4g} s a grid step)"]
    same = sum(a == b for a, b in pairwise(times))
    if same:
        rate = TEMPORAL / plan.second_per_grid
        most = config.vision.tokens_per_second * TEMPORAL
        told = f"{rate:.3g} frames a second are sampled, at most {most:g} are told apart"
        lines.append(f"  WARNING   {same} grid step(s) share the time id of the one before: {told}")
    return lines


SHOWN = 8  # samples that cannot be used, named one by one


def describe_dataset(file: str, processor: Processor) -> list[str]:
    """The lines that tell the lengths of a dataset's samples, and which of them are broken."""
    args = copy(processor.args)
    args.data_path = file
    processor = Processor(processor.tokenizer, processor.config, args)
    lengths, broken = [], []
    records = read_records(file)
    for i in range(len(records)):
        try:
            lengths.append(processor.length(records[i], name=f"sample {i}"))
        except UserError as error:
            which = "" if str(error).startswith(f"sample {i}") else f"sample {i}: "
            broken.append(f"  skipped   {which}{error}")
    if not lengths:
        first = broken[0].removeprefix("  skipped   ")
        raise UserError(f"{file}: none of its {len(records)} samples can be used; the first: {first}")
    low, median, high = np.percentile(lengths or [0], (0, 50, 100))
    spread = f"{low:.0f} to {high:.0f} a sample, median {median:.0f}"
    lines = [file, f"  samples   {len(lengths)}, {sum(lengths)} tokens: {spread}"]
    lines += [f"  rebudget  {name}: {told}" for name, told in processor.rebudgeted.items()]
    more = [f"  skipped   {len(broken) - SHOWN} more"] if len(broken) > SHOWN else []
    return [*lines, *broken[:SHOWN], *more]


def main(argv: list[str] | None = None) -> None:
    args = parse(Look, argv)
    for line in ignored_options(args):
        print(f"note: {line}")
    folder = resolve_folder(args.model_id, args.local_files_only)
    processor = Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), args)
    for file in args.files:
        if file.endswith((".json", ".jsonl")):
            print("\n".join(describe_dataset(file, processor)))
            continue
        processor.places.allow(file)
        is_image = file.lower().endswith(IMAGE_SUFFIXES)
        part = {"type": "image" if is_image else "video", "path": os.path.abspath(file)}
        record = {"messages": [{"role": "user", "content": [part, args.text]}]}
        print("\n".join(describe(file, processor, record)))


if __name__ == "__main__":
    cli(main)

"""Records -> conversation -> ids, already shifted targets, positions, patches -> packed batches.

    Processor.encode(record)   one record -> an Example
    pack, pack_groups          Examples -> a packed batch without padding; in GRPO a prompt stands once for its group
    python data.py FILE...     what the model will see of each video, image, folder of frames or dataset

SFT, rollouts, evaluation and inference all come through here.
L tokens of a sample, T of a batch, F frames, P patches, N clips, G completions a prompt.
"""

# ruff: noqa: E402
import sys

from config import Look, cli, ignored_options, parse

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # before torch is imported
    cli(lambda: parse(Look))

import base64
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import get_worker_info

from clips import png, strip
from model import UserError, nearest_path
from model.loading import ModelConfig, resolve_folder
from model.qwen import IGNORE, Packed, Segments
from model.rope import mrope_position_ids
from reader import errors_name, file_stamp
from records import DATA_SUFFIXES, IMAGE_SUFFIXES, Media, Turn, read_records, read_turns, record_name, sample_name
from video import TEMPORAL, ClipPlan, Options, apply_control, frames_in, from_patches, plan_clip, read_clip

# The system turn that Qwen2.5-VL's chat template adds when a conversation brings none
DEFAULT_SYSTEM = Turn("system", "", parts=["You are a helpful assistant."])
CONTROLS = ("none", "reversed", "shuffled", "blank")
log = logging.getLogger("data")


class TooLong(UserError):
    """A sample that cannot be brought within max_seq_length: left out on purpose, not broken."""


def check_share(broken: int, records, args, last) -> None:
    """UserError if more of the records than args.max_skip_share are broken. last: the last of them, and why."""
    if broken > args.max_skip_share * len(records):
        most = f"max_skip_share is {args.max_skip_share}"
        raise UserError(f"{broken} of {len(records)} samples are broken, {most}; the last: {last}")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint's tokenizer.json. No class that the folder names is imported, no template of it rendered."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():  # a fifo would block for good
        raise UserError(f"{path}: no such file; expected the tokenizer of a Qwen2.5-VL checkpoint")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing more special)
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(f"{path}: no tokenizer of a Qwen2.5-VL checkpoint ({reason}); download it again") from None
    tokenizer.no_truncation()  # transformers saves with it what its last call was asked for
    tokenizer.no_padding()
    return tokenizer


@dataclass(eq=False)
class Example:
    """One conversation, ready for the model."""

    name: str
    ids: np.ndarray  # (L,) int64; a clip's pad stands once per vision token
    targets: np.ndarray  # (L,) int64: ids[i + 1] where the assistant says it, its <|im_end|> included; IGNORE elsewhere
    position_ids: np.ndarray  # (3, L) int64
    patches: Tensor | None  # (P, 1176) uint8; shared with the cache, never written to
    grid_thw: list[tuple[int, int, int]]  # N grids in patches
    second_per_grid: list[float]  # N; 0 for images
    frame_indices: list[list[int]]  # N lists of F frame numbers, in the order shown
    frame_times: list[list[float]]  # N lists of F seconds
    record: dict = field(repr=False)
    number: int = -1  # of its record, in loader.Samples

    def __len__(self) -> int:
        return len(self.ids)


class Processor:
    """Turns records into Examples. args: a config.VideoArgs, or anything with its fields."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, args):
        self.backend, self.config, self.args = tokenizer, config, args
        self.im_end = self.token_id("<|im_end|>")
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.special = re.compile("|".join(map(re.escape, special)))
        self.encode_text = lru_cache(4096)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
        if args.image_folder and not Path(args.image_folder).is_dir():
            hint = nearest_path(args.image_folder)
            raise UserError(f"--image_folder: no such folder {args.image_folder}; expected that of the clips{hint}")
        self.inline = tempfile.TemporaryDirectory(prefix="inline_clips_")  # of clips inside their records
        self.plan_clip = lru_cache(4096)(plan_clip)
        self.cache, self.cache_room = {}, args.cache_mb * 2**20  # {plan: patches}; bytes
        self.warned: set[str] = set()  # kinds of notes that were logged

    def token_id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer has no {token}; expected that of a Qwen2.5-VL checkpoint")
        return number

    # -- From record to Example

    def encode(self, record: dict, answer: bool = True, control: str = "none", name: str | None = None) -> Example:
        """One record as an Example. answer: the whole conversation, with targets; else up to the last user turn, ready
        for the reply. control: "none", or the clips "reversed", "shuffled" (by the record's name) or "blank".
        Raises UserError; TooLong if it cannot be brought within max_seq_length."""
        assert control in CONTROLS, f"control {control!r}, expected one of {CONTROLS}"
        name = name or record_name(record)
        ids, trained, plans = self.layout(record, answer)
        if control != "none" and not any(plan.kind == "video" or control == "blank" for plan in plans):
            raise UserError(f"control {control}: no {'clip' if control == 'blank' else 'video'} in it, nothing changes")
        targets = np.full(len(ids), IGNORE, np.int64)
        targets[:-1][trained[1:]] = ids[1:][trained[1:]]
        grids, seconds = [plan.grid_thw for plan in plans], [plan.second_per_grid for plan in plans]
        clips = [self.read(plan, control, f"{name} {i}") for i, plan in enumerate(plans)]
        patches = [patches for patches, _ in clips]
        shown = [(plan, order[: len(plan.indices)]) for plan, (_, order) in zip(plans, clips)]
        return Example(
            name=name,
            ids=ids,
            targets=targets,
            position_ids=mrope_position_ids(ids.tolist(), grids, seconds, self.config),
            patches=None if not patches else patches[0] if len(patches) == 1 else torch.cat(patches),
            grid_thw=grids,
            second_per_grid=seconds,
            frame_indices=[[plan.indices[i] for i in order] for plan, order in shown],
            frame_times=[[plan.times[i] for i in order] for plan, order in shown],
            record=record,
        )

    def layout(self, record: dict, answer: bool) -> tuple[np.ndarray, np.ndarray, list[ClipPlan]]:
        """ids (L,) int64, whether each is learned (L,) bool, and the plan of each clip, of which one frame is decoded.
        Raises what encode raises."""
        turns = chat_turns(read_turns(record), answer)
        ids, trained = self.render(turns, answer, record.get("answer_prefix", ""))
        media = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
        folder = self.args.image_folder or getattr(record, "folder", None)
        plans = self.fit(media, folder, len(ids) - len(media))
        for note in [note for plan in plans for note in plan.notes]:
            self.warn_once(note, record)
        repeats = np.ones(len(ids), np.int64)  # a pad stands once for each vision token of its clip
        is_pad = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
        repeats[is_pad] = [plan.num_tokens for plan in plans]
        return np.repeat(ids, repeats), np.repeat(trained, repeats), plans

    def render(self, turns: list[Turn], answer: bool, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """The chat template of Qwen2.5-VL: ids int64 with one pad a clip, and whether each is learned. An answer is
        encoded apart from what stands before it, because in generation it is too. prefix: what a reply begins with."""
        pieces = []  # (text, learned)
        for turn in turns:
            # Special tokens in a text would change who speaks, or stand for clips that are not there
            if match := self.special.search(turn.text):
                problem = f"the text holds the special token {match[0]}"
                raise UserError(f"{problem}; remove it (clips are marked <video> or <image>)")
            head = f"<|im_start|>{turn.role}\n"
            if turn.role == "assistant":
                pieces += [(head, False), (f"{turn.text}<|im_end|>", turn.trained), ("\n", False)]
            else:
                marks = [part if isinstance(part, str) else f"<|vision_start|><|{part.kind}_pad|><|vision_end|>"
                         for part in turn.parts]  # fmt: skip
                pieces.append((f"{head}{''.join(marks)}<|im_end|>\n", False))
        if not answer:
            pieces.append((f"<|im_start|>assistant\n{prefix}", False))
        ids = [self.encode_text(text) for text, _ in pieces]
        trained = np.repeat([learned for _, learned in pieces], list(map(len, ids)))
        return np.array([i for piece in ids for i in piece], np.int64), trained

    # -- Clips

    def fit(self, media: list[Media], folder: str | None, text: int) -> list[ClipPlan]:
        """Plans of clips that fit into max_seq_length beside `text` tokens: the clip with most frames loses two at a
        time, keeping two. folder: where relative names are looked up first."""
        plans, limit = [self.plan(each, folder) for each in media], self.args.max_seq_length
        steps = [plan.grid_thw[0] for plan in plans]
        a_step = [plan.num_tokens // plan.grid_thw[0] for plan in plans]  # tokens a grid step
        while text + sum(n * tokens for n, tokens in zip(steps, a_step)) > limit:
            i = max(range(len(plans)), key=steps.__getitem__, default=None)
            if self.args.overlong == "drop" or i is None or steps[i] == 1:
                whole = text + sum(plan.num_tokens for plan in plans)
                raise TooLong(f"{whole} tokens, {text} of them text; max_seq_length is {limit}")
            steps[i] -= 1
        for i, plan in enumerate(plans):
            if steps[i] < plan.grid_thw[0]:
                (height, width), n = plan.size, steps[i] * TEMPORAL
                fewer = {"nframes": n, "resized_height": height, "resized_width": width}
                shorter = self.plan(replace(media[i], options=media[i].options | fewer), folder)
                note = f"{len(plan.indices)} -> {n} frames for max_seq_length {limit}"
                plans[i] = replace(shorter, notes=(*shorter.notes, note))
        return plans

    def plan(self, media: Media, folder: str | None) -> ClipPlan:
        """The plan of a clip of a record."""
        paths = tuple(self.locate_file(path, folder) for path in media.paths)
        if media.kind == "video" and len(paths) == 1 and os.path.isdir(paths[0]):
            paths = frames_in(paths[0])
        with errors_name(media.paths[0][:100]):  # as the record has it
            options = Options.from_args(media.kind, self.args, media.options)
        return self.plan_clip(media.kind, paths, options, tuple(map(file_stamp, paths)))

    def read(self, plan: ClipPlan, control: str, seed: str) -> tuple[Tensor, list[int]]:
        """The patches of a clip, (P, 1176) uint8, and the order of its frames. They are remembered until the cache is
        full: of more clips than fit some stay for good, where the most recent would be gone before the next epoch."""
        patches = self.cache.get(plan)
        if patches is None:
            patches = read_clip(plan)
            # a worker's patches go to shared memory, which is small in containers
            if patches.nbytes <= self.cache_room and get_worker_info() is None:
                self.cache[plan] = patches
                self.cache_room -= patches.nbytes
        still = plan.kind == "image" and control in ("reversed", "shuffled")
        return apply_control(patches, plan.grid_thw, "none" if still else control, seed)

    def locate_file(self, path: str, folder: str | None) -> str:
        """In the folder's videos/, in the folder, or in the current one; a clip inside its record as a file."""
        if path[:5].lower() == "data:":
            return self.inline_file(path)
        if "://" in path:
            raise UserError(f"{path[:200]} is a web address; download the file and name it instead")
        folders = [] if folder is None else [os.path.join(folder, "videos"), folder]
        for candidate in [*(os.path.join(each, path) for each in folders), path]:  # join leaves an absolute path so
            if os.path.exists(candidate):
                return candidate
        where = ", ".join([*folders, "the current folder"])
        raise UserError(f"no file {' '.join(path[:200].split())} in {where}; check --image_folder")

    def inline_file(self, address: str) -> str:
        """data:video/mp4;base64,... (RFC 2397, as OpenAI and ms-swift use it) as a file, written once a process."""
        head, _, text = address.partition(",")
        suffix = re.sub(r"^x-|\W", "", head.partition("/")[2].partition(";")[0])[:9]  # all that tells a tga
        digest = blake2b(address.encode(), digest_size=16).hexdigest()
        path = Path(self.inline.name) / f"{digest}_{os.getpid()}.{suffix}"
        if not path.exists():
            try:
                data = base64.b64decode("".join(text.split()), validate=True)
            except ValueError as error:
                raise UserError(f"{address[:40]}… is not base64 ({error}); encode the file again") from None
            if not data:
                raise UserError(f"{address[:40]} holds no file; expected it in base64 behind the comma")
            path.write_bytes(data)
        return str(path)

    def warn_once(self, note: str, record: dict) -> None:
        """Log an overruled option, each kind once, however many samples it touches."""
        kind = re.sub(r"[\d.]+", "#", note)
        if kind not in self.warned:
            self.warned.add(kind)
            log.warning("%s: %s (said once)", record_name(record), note)


def chat_turns(turns: list[Turn], answer: bool) -> list[Turn]:
    """The turns to render: a system turn first; with the answers checked, or without the last one."""
    if not answer and turns[-1].role == "assistant":
        turns = turns[:-1]
    answers, questions = ([turn for turn in turns if turn.role == role] for role in ("assistant", "user"))
    is_empty = lambda turn: not turn.text.strip() and all(isinstance(part, str) for part in turn.parts)
    last_answers = [turn.text.rpartition("<answer>")[2].partition("</answer>")[0] for turn in answers]
    problem = ""
    if answer and turns[-1].role != "assistant":
        problem = f"ends with a turn of the {turns[-1].role}; expected an answer"
    elif not questions or any(map(is_empty, questions)):
        problem = "no user's turn, or an empty one; expected text, a video or an image"
    elif not all(map(str.strip, last_answers)):
        problem = "an empty answer; expected text in every turn of the assistant"
    elif answer and not any(turn.trained for turn in answers):
        problem = "every answer is marked as not learned (loss, weight)"
    if problem:
        raise UserError(f"{problem}; correct the record or leave it out")
    return turns if turns[0].role == "system" else [DEFAULT_SYSTEM, *turns]


# -- Examples -> packed batches


def pack(examples: list[Example], pin: bool = False) -> Packed:
    """Examples laid end to end, each seeing only itself. pin: pixels in memory that a GPU reads while the host goes on.
    An empty list gives one untrained token: all ranks must run the same number of passes, also where all is skipped."""
    if not examples:
        zero = torch.zeros(1, dtype=torch.int64)
        return Packed(zero, zero.expand(3, 1), Segments.causal([1]), targets=torch.full((1,), IGNORE))
    runs = [e.ids for e in examples], [e.position_ids for e in examples], [e.targets for e in examples]
    return Packed(**join(examples, *runs, pin), segments=Segments.causal([len(e) for e in examples]))


def pack_groups(prompts: list[Example], completions: list[list[list[int]]]) -> Packed:
    """Each prompt once, then its completions, which attend to it: prompt_0, c_00, c_01, ..., prompt_1, ...

    completions: ids of each prompt's G completions, end token included. A completion's first token is predicted by the
    prompt's last one, so that one token is not shared: every completion's run is [last prompt token, c_1 .. c_n-1] with
    targets c_1 .. c_n, and the shared run is the prompt without it. Positions go on as in decoding.
    """
    ids, positions, targets = [], [], []
    for prompt, group in zip(prompts, completions, strict=True):
        ids.append(prompt.ids[:-1])
        positions.append(prompt.position_ids[:, :-1])
        targets.append(np.full(len(prompt) - 1, IGNORE))
        last = prompt.position_ids.max()
        assert (prompt.position_ids[:, -1] == last).all(), f"{prompt.name}: ends within a clip, expected text"
        for completion in group:
            assert len(completion), f"{prompt.name}: a completion without a token"
            ids.append(np.array([prompt.ids[-1], *completion[:-1]]))
            positions.append(np.tile(last + np.arange(len(completion)), (3, 1)))
            targets.append(np.array(completion))
    fields = join(prompts, ids, positions, targets)
    lengths = [list(map(len, group)) for group in completions]
    return Packed(**fields, segments=Segments.shared_prompt([len(p) - 1 for p in prompts], lengths))


def join(examples: list[Example], ids: list, positions: list, targets: list, pin: bool = False) -> dict:
    """Fields of a Packed: runs of tokens laid end to end, and the clips of the Examples."""
    patches = [e.patches for e in examples if e.patches is not None]
    patches = torch.cat(patches) if patches else None
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids)),
        "position_ids": torch.from_numpy(np.concatenate(positions, axis=1)),
        "targets": torch.from_numpy(np.concatenate(targets)),
        "patches": patches.pin_memory() if pin and patches is not None else patches,
        "grid_thw": [grid for e in examples for grid in e.grid_thw],
        "names": [e.name for e in examples],
    }


# -- python data.py FILE...


def main(argv: list[str] | None = None) -> None:
    args = parse(Look, argv)
    for line in ignored_options(args):
        print(f"note: {line}", file=sys.stderr)
    folder = resolve_folder(args.model_id, args.local_files_only)
    processor = Processor(load_tokenizer(folder), ModelConfig.from_folder(folder), args)
    for file in args.files:
        for line in look_at_file(file, processor, args.json, args.text):
            print(line)
    if args.preview:
        records, _ = records_of(args.files[0], args.text)
        write_preview(processor.encode(records[0], answer=False), args.preview)


def look_at_file(file: str, processor: Processor, as_json: bool, question: str) -> Iterator[str]:
    """The lines that describe one file, the clips of its first record in full; with as_json, a JSON line a record."""
    records, is_dataset = records_of(file, question)
    results = (look_at(processor, record, is_dataset, as_json or not is_dataset) for record in records)
    if as_json:
        yield from map(json.dumps, results)
        return
    results = list(results)
    good = [result for result in results if "refused" not in result]
    refused = {i: result["refused"] for i, result in enumerate(results) if "refused" in result}
    refused = [f"{sample_name(records, i)}: {reason}" for i, reason in refused.items()]
    if not good:
        raise UserError(f"{file}: nothing can be used; {refused[0]}")
    yield file
    lengths = [result["tokens"] for result in good]
    low, median, high = np.percentile(lengths, (0, 50, 100))
    yield f"  samples {len(good)}, {sum(lengths)} tokens: {low:g} to {high:g} a sample, median {median:g}"
    yield from (f"  skipped: {error}" for error in refused[:8])
    yield from [f"  skipped: {len(refused) - 8} more; --json has them all"] * (len(refused) > 8)
    for clip in good[0]["clips"]:
        for key, value in clip.items():
            values = value if isinstance(value, list | tuple) else [value]
            yield f"  {key:<16}{' '.join(f'{x:.6g}' if isinstance(x, float) else str(x) for x in values)}"


def records_of(file: str, question: str) -> tuple:
    """(records, whether they are a dataset's) of a dataset, or of a clip and a question about it."""
    if file.lower().endswith(DATA_SUFFIXES) and not Path(file).is_dir():
        return read_records(file), True
    return [{"messages": [{"role": "user", "content": [clip_part(file), question]}]}], False


def clip_part(file: str | Path, image_folder: str | None = None) -> dict:
    """A video, an image, or a folder of frames as a part of a message: in the current folder, else the image_folder."""
    path = Path(file)
    if not (path.exists() or image_folder or "://" in str(file)):
        expected = f"expected a video, an image, or a folder of frames{nearest_path(path)}"
        raise UserError(f"{file}: no such file; {expected}")
    if path.suffix.lower() in DATA_SUFFIXES and path.is_file():
        raise UserError(f"{file}: a dataset, expected a video or an image; give it as --data_path")
    kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
    return {"type": kind, "path": str(path.absolute() if path.exists() else file)}


def look_at(processor: Processor, record: dict, answer: bool, decode: bool) -> dict:
    """What the model will see of a record: learned texts, clips, tokens, warnings; or refused, why. decode: the frames
    too, so that a broken one is named."""
    try:
        ids, _, plans = processor.layout(record, answer)
        for plan in plans if decode else []:
            processor.read(plan, "none", "")
        turns = read_turns(record)
    except UserError as error:
        return {"refused": str(error), "clips": [], "warnings": []}
    clips = []
    for plan in plans:
        (height, width), fps, frames = plan.source_size, plan.source_fps, plan.total_frames  # of the file
        clip = {"paths": plan.paths, "frames": frames, "width": width, "height": height, "fps": fps}
        clip |= {"seconds": frames / fps if fps else 0.0, "indices": plan.indices, "times": plan.times}
        clip |= {"time_ids": time_ids(plan.grid_thw, plan.second_per_grid, processor.config)}
        clip |= {"size": plan.size, "grid_thw": plan.grid_thw, "tokens": plan.num_tokens}
        clips.append(clip)
    learned = [turn.text for turn in turns if turn.role == "assistant" and turn.trained and answer]
    warnings = [note for plan in plans for note in plan.notes]
    return {"learned": learned, "clips": clips, "tokens": len(ids), "warnings": warnings}


def time_ids(grid: tuple[int, int, int], second_per_grid: float, config: ModelConfig) -> list[int]:
    """The temporal position of each grid step of a clip, from 0."""
    tokens = math.prod(grid) // 4  # one for 2 x 2 patches
    positions = mrope_position_ids([config.video_token_id] * tokens, [grid], [second_per_grid], config)
    return positions[0, :: tokens // grid[0]].tolist()


def write_preview(example, path: str) -> None:
    """A PNG of the frames of an Example's clips, eight in a row."""
    if example.patches is None:
        raise UserError(f"--preview: {example.name} has no clip, expected a video or an image")
    patches = example.patches.split([math.prod(grid) for grid in example.grid_thw])
    clips = [from_patches(each.numpy(), grid) for each, grid in zip(patches, example.grid_thw)]
    rows = [strip(frames[i : i + 8]) for frames in clips for i in range(0, len(frames), 8)]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png(np.concatenate(rows)))


if __name__ == "__main__":
    cli(main)

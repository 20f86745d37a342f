"""Records -> conversation -> ids, already shifted targets, positions, patches -> packed batches.

    Processor.encode(record)   one record -> an Example
    pack, pack_groups          Examples -> a packed batch without padding; in GRPO a prompt stands once for its group
    python data.py FILE...     what the model will see of each video, image or dataset (look.py)

SFT, rollouts, evaluation and inference all come through here.
L tokens of a sample, T of a batch, F frames, P patches, N clips, G completions a prompt.
"""

# ruff: noqa: E402
import sys

from config import Look, cli, parse

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):  # before torch is imported
        cli(lambda: parse(Look))
    import look

    cli(look.main)
    sys.exit()

import base64
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import get_worker_info

from model import UserError, nearest_path
from model.loading import ModelConfig
from model.qwen import IGNORE, Packed, Segments
from model.rope import mrope_position_ids
from reader import file_stamp
from records import Media, Turn, read_records, read_turns, record_name  # noqa: F401 (scripts take read_records here)
from video import TEMPORAL, ClipPlan, Options, apply_control, frames_in, plan_clip, read_clip

# The system turn that Qwen2.5-VL's chat template adds when a conversation brings none
DEFAULT_SYSTEM = Turn("system", "", parts=["You are a helpful assistant."])
CONTROLS = ("none", "reversed", "shuffled", "blank")
log = logging.getLogger("data")


class TooLong(UserError):
    """A sample that cannot be brought within max_seq_length: left out on purpose, not broken."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint's tokenizer.json. No class that the folder names is imported, no template of it rendered."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():  # a fifo would block for good
        raise UserError(f"{path}: no such file; expected the tokenizer of a Qwen2.5-VL checkpoint")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing more special)
        reason = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise UserError(f"{path}: no tokenizer could be loaded from it ({reason}); download it again") from None


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
    num_vision_tokens: int
    record: dict = field(repr=False)
    notes: tuple[str, ...] = ()  # options that were overruled
    number: int = -1  # of its record, where a Loader or examples() made it

    def __len__(self) -> int:
        return len(self.ids)


class Processor:
    """Turns records into Examples. args: a config.VideoArgs, or anything with its fields."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, args):
        self.backend, self.config, self.args = tokenizer, config, args
        self.im_end = self.token_id("<|im_end|>")
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.special = re.compile("|".join(map(re.escape, special)))
        tokenise = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.encode_text: Callable[[str], list[int]] = lru_cache(4096)(tokenise)
        if args.image_folder and not Path(args.image_folder).is_dir():
            hint = nearest_path(args.image_folder)
            raise UserError(f"--image_folder: no such folder {args.image_folder}; expected that of the clips{hint}")
        self.inline = tempfile.TemporaryDirectory(prefix="inline_clips_")  # of clips inside their records
        self.cache, self.cache_room = {}, args.cache_mb * 2**20  # plans and patches; bytes
        self.rebudgeted: dict[str, str] = {}  # samples that got fewer frames to fit max_seq_length, and how many
        self.notes: Counter = Counter()  # kinds of overruled options, and how many samples they touched

    def token_id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise UserError(f"the tokenizer has no {token}; expected that of a Qwen2.5-VL checkpoint")
        return number

    # -- From record to Example

    def encode(self, record: dict, answer: bool = True, control: str = "none", name: str | None = None) -> Example:
        """One record as an Example. answer: the whole conversation, with targets; else up to the last user turn, ready
        for the reply. control: "none", or the clips "reversed", "shuffled" (by the record's name) or "blank".
        Raises UserError naming the sample or file; TooLong if it cannot be brought within max_seq_length."""
        assert control in CONTROLS, f"control {control!r}, expected one of {CONTROLS}"
        name = name or record_name(record)
        ids, trained, plans = self.layout(record, answer, name)
        targets = np.full(len(ids), IGNORE, np.int64)
        targets[:-1][trained[1:]] = ids[1:][trained[1:]]
        grids, seconds = [plan.grid_thw for plan in plans], [plan.second_per_grid for plan in plans]
        clips = [self.read(plan, control, f"{name} {i}") for i, plan in enumerate(plans)]
        patches = [patches for patches, _ in clips]
        shown = [(plan, order[: len(plan.indices)]) for plan, (_, order) in zip(plans, clips)]
        example = Example(
            name=name,
            ids=ids,
            targets=targets,
            position_ids=mrope_position_ids(ids.tolist(), grids, seconds, self.config),
            patches=None if not patches else patches[0] if len(patches) == 1 else torch.cat(patches),
            grid_thw=grids,
            second_per_grid=seconds,
            frame_indices=[[plan.indices[i] for i in order] for plan, order in shown],
            frame_times=[[plan.times[i] for i in order] for plan, order in shown],
            num_vision_tokens=sum(plan.num_tokens for plan in plans),
            record=record,
            notes=tuple(note for plan in plans for note in plan.notes),
        )
        if get_worker_info() is None:  # else the process that receives it warns
            self.warn_once(example)
        return example

    def layout(self, record: dict, answer: bool, name: str = "") -> tuple[np.ndarray, np.ndarray, list[ClipPlan]]:
        """ids (L,) int64, whether each is learned (L,) bool, and the plan of each clip, of which one frame is decoded.
        Raises what encode raises."""
        name = name or record_name(record)
        turns = chat_turns(read_turns(record, name), answer, name)
        ids, trained = self.render(turns, answer, name, record.get("answer_prefix", ""))
        folder = self.args.image_folder or getattr(record, "folder", None)
        media = [(part, folder, name) for turn in turns for part in turn.parts if isinstance(part, Media)]
        plans = self.fit(media, len(ids) - len(media), name)
        repeats = np.ones(len(ids), np.int64)  # a pad stands once for each vision token of its clip
        is_pad = (ids == self.config.video_token_id) | (ids == self.config.image_token_id)
        repeats[is_pad] = [plan.num_tokens for plan in plans]
        return np.repeat(ids, repeats), np.repeat(trained, repeats), plans

    def render(self, turns: list[Turn], answer: bool, name: str, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """The chat template of Qwen2.5-VL: ids int64 with one pad a clip, and whether each is learned. An answer is
        encoded apart from what stands before it, because in generation it is too. prefix: what a reply begins with."""
        pieces = []  # (text, learned)
        for turn in turns:
            # Special tokens in a text would change who speaks, or stand for clips that are not there
            if match := self.special.search(turn.text):
                problem = f"{name}: the text holds the special token {match[0]}"
                raise UserError(f"{problem}; remove it (clips are marked <video> or <image>)")
            head = f"<|im_start|>{turn.role}\n"
            if turn.role == "assistant":
                pieces += [(head, False), (f"{turn.text}<|im_end|>", turn.trained), ("\n", False)]
            else:
                clips = (f"<|vision_start|><|{part.kind}_pad|><|vision_end|>" if isinstance(part, Media) else part
                         for part in turn.parts)  # fmt: skip
                pieces.append((f"{head}{''.join(clips)}<|im_end|>\n", False))
        if not answer:
            pieces.append((f"<|im_start|>assistant\n{prefix}", False))
        ids = [self.encode_text(text) for text, _ in pieces]
        trained = np.repeat([learned for _, learned in pieces], list(map(len, ids)))
        return np.array([i for piece in ids for i in piece], np.int64), trained

    # -- Clips

    def fit(self, media: list[tuple[Media, str | None, str]], text: int, name: str) -> list[ClipPlan]:
        """Plans of clips that fit into max_seq_length beside `text` tokens: the clip with most frames loses two at a
        time, keeping two. media: the first three arguments of plan()."""
        plans, limit = [self.plan(*item) for item in media], self.args.max_seq_length
        steps = [plan.grid_thw[0] for plan in plans]
        a_step = [plan.num_tokens // plan.grid_thw[0] for plan in plans]  # tokens a grid step
        while text + sum(n * tokens for n, tokens in zip(steps, a_step)) > limit:
            i = max(range(len(plans)), key=steps.__getitem__, default=None)
            if self.args.overlong == "drop" or i is None or steps[i] == 1:
                whole = text + sum(plan.num_tokens for plan in plans)
                raise TooLong(f"{name}: {whole} tokens, {text} of them text; max_seq_length is {limit}")
            steps[i] -= 1
        frames = [len(plan.indices) for plan in plans], [n * TEMPORAL for n in steps]
        for i, plan in enumerate(plans):
            if steps[i] < plan.grid_thw[0]:
                plans[i] = self.plan(*media[i], steps[i] * TEMPORAL, plan.size)
                self.rebudgeted[name] = f"{frames[0]} -> {frames[1]} frames for max_seq_length {limit}"
        return plans

    def plan(self, media: Media, folder: str | None, name: str, most_frames: int | None = None, size=None) -> ClipPlan:
        """The plan of a clip that record `name` means. folder: where relative names are looked up first."""
        paths = tuple(self.locate_file(path, folder, name) for path in media.paths)
        if media.kind == "video" and len(paths) == 1 and os.path.isdir(paths[0]):
            paths = frames_in(paths[0])
        options = Options.from_args(media.kind, self.args, media.options, name, listed=len(paths) > 1)
        key = (media.kind, tuple(map(file_stamp, paths)), options, most_frames, size)
        about = lambda plan: 1000 + 200 * len(plan.indices)  # bytes
        return self.cached(key, lambda: plan_clip(media.kind, paths, options, most_frames, size), about)

    def read(self, plan: ClipPlan, control: str, seed: str) -> tuple[Tensor, list[int]]:
        """The patches of a clip, (P, 1176) uint8, and the order of its frames."""
        patches = self.cached(plan, lambda: read_clip(plan), lambda patches: patches.nbytes)
        still = plan.kind == "image" and control in ("reversed", "shuffled")
        return apply_control(patches, plan.grid_thw, "none" if still else control, seed)

    def cached(self, key, make: Callable, size: Callable):
        """make(), remembered until the cache is full: of more clips than fit some stay for good, where a cache of the
        most recent ones would have forgotten each before its next epoch."""
        value = self.cache.get(key)
        if value is None:
            value = make()
            # a worker's patches go to shared memory, which is small in containers
            if size(value) <= self.cache_room and not (isinstance(value, Tensor) and get_worker_info()):
                self.cache[key] = value
                self.cache_room -= size(value)
        return value

    def locate_file(self, path: str, folder: str | None, name: str) -> str:
        """In the folder's videos/, in the folder, or in the current one; a clip inside its record as a file."""
        if path[:5].lower() == "data:":
            return self.inline_file(path, name)
        if "://" in path:
            raise UserError(f"{name}: {path[:200]} is a web address; download the file and name it instead")
        # join leaves an absolute path as it is
        tried = [path] if folder is None else [os.path.join(folder, sub, path) for sub in ("videos", "")] + [path]
        for candidate in tried:
            if os.path.exists(candidate):
                return candidate
        shown = [" ".join(file[:200].split()) for file in dict.fromkeys([path, *tried])]
        raise UserError(f"{name}: no file {shown[0]}; looked for {', '.join(shown[1:] or shown)}; check --image_folder")

    def inline_file(self, address: str, name: str) -> str:
        """data:video/mp4;base64,... (RFC 2397, as OpenAI and ms-swift use it) as a file, written once a process."""
        head, _, text = address.partition(",")
        suffix = re.sub(r"\W", "", head.partition("/")[2].partition(";")[0])
        digest = blake2b(address.encode(), digest_size=16).hexdigest()
        path = Path(self.inline.name) / f"{digest}_{os.getpid()}.{suffix}"
        if not path.exists():
            try:
                path.write_bytes(base64.b64decode("".join(text.split()), validate=True))
            except ValueError as error:
                raise UserError(f"{name}: {address[:40]}… is not base64 ({error}); encode the file again") from None
        return str(path)

    def warn_once(self, example: Example) -> None:
        """Log each kind of overruled option once, however many samples it touches."""
        for note in example.notes:
            kind = re.sub(r"[\d.]+", "#", note)
            self.notes[kind] += 1
            if self.notes[kind] == 1:
                log.warning("%s: %s (said once)", example.name, note)


def chat_turns(turns: list[Turn], answer: bool, name: str) -> list[Turn]:
    """The turns to render: a system turn first; with the answers checked, or without the last one."""
    if not answer and turns[-1].role == "assistant":
        turns = turns[:-1]
    answers, questions = ([turn for turn in turns if turn.role == role] for role in ("assistant", "user"))
    last = turns[-1].role if turns else "nobody"
    is_empty = lambda turn: not any(not isinstance(part, str) or part.strip() for part in turn.parts)
    last_answers = [turn.text.rpartition("<answer>")[2].partition("</answer>")[0] for turn in answers]
    for is_wrong, problem in (
        (answer and last != "assistant", f"ends with a turn of the {last}; expected an answer"),
        (not questions, "no user's turn; expected a question"),
        (not all(map(str.strip, last_answers)), "an empty answer; expected text in every turn of the assistant"),
        (answer and not any(turn.trained for turn in answers), "every answer is marked as not learned (loss, weight)"),
        (any(map(is_empty, questions)), "an empty turn of the user; expected text, a video or an image"),
    ):
        if is_wrong:
            raise UserError(f"{name}: {problem}; correct the record or leave it out")
    return turns if turns[0].role == "system" else [DEFAULT_SYSTEM, *turns]


# -- Examples -> packed batches


def pack(examples: list[Example], pin: bool = False) -> Packed:
    """Examples laid end to end, each seeing only itself. pin: pixels in memory that a GPU reads while the host goes on.
    An empty list gives one untrained token: all ranks must run the same number of passes, also where all is skipped."""
    if not examples:
        zero = torch.zeros(1, dtype=torch.int64)
        return Packed(zero, zero.expand(3, 1), Segments.causal([1]), targets=torch.full((1,), IGNORE))
    return Packed(
        input_ids=join(e.ids for e in examples),
        position_ids=join((e.position_ids for e in examples), axis=1),
        patches=join_patches(examples, pin),
        segments=Segments.causal([len(e) for e in examples]),
        grid_thw=[grid for e in examples for grid in e.grid_thw],
        targets=join(e.targets for e in examples),
        names=[e.name for e in examples],
    )


def pack_groups(prompts: list[Example], completions: list[list[list[int]]]) -> Packed:
    """Each prompt once, then its completions, which attend to it: prompt_0, c_00, c_01, ..., prompt_1, ...

    completions: ids of each prompt's G completions, end token included. A completion's first token is predicted by the
    prompt's last one, so that one token is not shared: every completion's run is [last prompt token, c_1 .. c_n-1] with
    targets c_1 .. c_n, and the shared run is the prompt without it. Positions go on as in decoding.
    """
    assert len(prompts) == len(completions), f"{len(prompts)} prompts, {len(completions)} groups of completions"
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
    return Packed(
        input_ids=join(ids),
        position_ids=join(positions, axis=1),
        patches=join_patches(prompts),
        segments=Segments.shared_prompt([len(p) - 1 for p in prompts], [list(map(len, c)) for c in completions]),
        grid_thw=[grid for p in prompts for grid in p.grid_thw],
        targets=join(targets),
        names=[p.name for p in prompts],
    )


def join(arrays: Iterable[np.ndarray], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays), axis=axis))


def join_patches(examples: list[Example], pin: bool = False) -> Tensor | None:
    patches = [e.patches for e in examples if e.patches is not None]
    whole = torch.cat(patches) if patches else None
    return whole.pin_memory() if patches and pin else whole

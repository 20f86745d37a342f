"""A dataset's file -> records -> turns of text and clips. No torch: nothing is decoded or tokenised here.

A file is a .json array or .jsonl (one record a line). What a record may look like, and whose form that is, is told in
forms.py; this one is our own too:

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhere to?"},
                                         {"from": "gpt", "value": "Left"}]}

`video` and `image` are a name or a list of names; one of a list may itself be a list: the frames of one clip. A part's
other keys are its own sampling options. A clip's tag and the line break after it give way to the clip, as in Qwen's own
fine-tuning; where a record names clips and has no tag at all, they stand before its first question.
"""

import json
import logging
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from dataset.forms import FORMS, Message, first_of, read_form
from model import UserError, nearest_path

log = logging.getLogger("data")

TAG = re.compile(r"<(video|image)>\n?")
# RFC 2397, as far as OpenAI and ms-swift use it: a file inside its record
INLINE = re.compile(r"data:(video|image)/([\w.+-]+)(?:;[\w.+=-]+)*;base64,")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

# A jsonl file up to this size is checked whole when it is opened (0.3 s); a larger one line by line, as lines are used
CHECKED_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Media:
    """One video (a file, or a list of frames) or image of a turn, as the record names it."""

    kind: str  # "video" or "image"
    paths: tuple[str, ...]
    options: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Turn:
    role: str  # system, user or assistant
    parts: tuple[str | Media, ...]
    trained: bool = True  # of the assistant: whether this answer is learned

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


# -- Files


def read_records(path: str | Path) -> Sequence[dict]:
    """The records of a .json or .jsonl file. UserError naming file and line for what does not parse.

    A jsonl file stays on disk: only the place of each line is kept in memory (8 bytes a record).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .json or .jsonl dataset{nearest_path(path)}")
    records = JsonLines(path) if path.suffix == ".jsonl" else read_json(path)
    if not len(records):
        raise UserError(f"{path}: holds no records; expected at least one")
    if path.stat().st_size <= CHECKED_BYTES:
        tell_copies(path, records)
    return records


def read_json(path: Path) -> list[dict]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors put a mark before the text
    except json.JSONDecodeError as error:
        hint = "one record a line is .jsonl, rename it" if error.msg == "Extra data" else "correct it"
        raise UserError(f"{path}: line {error.lineno} column {error.colno} is not JSON ({error.msg}); {hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise UserError(f"{path}: cannot be read as JSON ({str(error)[:80]}); correct it") from None
    if not isinstance(records, list):
        raise UserError(f"{path}: found a JSON {type(records).__name__}, expected an array of records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}: record {i} is a {type(record).__name__}, expected an object")
    return records


class JsonLines(Sequence):
    """The records of a jsonl file, parsed when they are asked for. Threads may share it."""

    def __init__(self, path: Path):
        self.path = path
        self.starts = array("Q")  # bytes; blank lines are left out
        with open(path, "rb") as file:
            place = 0
            for line in file:
                if not line.isspace():
                    self.starts.append(place)
                place += len(line)
        self.starts.append(place)
        self.file = os.open(path, os.O_RDONLY)
        for i in range(len(self) if place <= CHECKED_BYTES else min(len(self), 1)):
            self[i]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]
        line = os.pread(self.file, self.starts[i + 1] - self.starts[i], self.starts[i])
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            told = f"{self.path}: line {self.line_number(i)} is not JSON ({str(error)[:120]})"
            raise UserError(f"{told}; correct or remove it") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.path}: line {self.line_number(i)} is a {type(record).__name__}, expected an object")
        return record

    def line_number(self, i: int) -> int:
        return os.pread(self.file, self.starts[i], 0).count(b"\n") + 1

    def __del__(self):
        if hasattr(self, "file"):
            os.close(self.file)


def tell_copies(path: Path, records: Sequence[dict]) -> None:
    """Warn of records that are there twice: they count twice in training, and weigh falsely in an evaluation."""
    first, copies = {}, []
    for i, record in enumerate(records):
        text = json.dumps({key: value for key, value in record.items() if key != "id"}, sort_keys=True)
        there = first.setdefault(blake2b(text.encode(), digest_size=16).digest(), i)
        if there != i:
            copies.append(f"sample {i} is sample {there} again")
    if copies:
        log.warning("%s: %d of %d records are there twice; %s", path, len(copies), len(records), copies[0])


def record_name(record: dict) -> str:
    """What messages call a record: its id, else its first clip, else the start of its text."""
    for key in ("id", "problem_id"):
        if record.get(key) is not None:
            return str(record[key])[:80]
    name = clip_name(record)
    text = next((record[form.key] for form in FORMS if record.get(form.key) is not None), record)
    return name or json.dumps(text, ensure_ascii=False)[:60]


def clip_name(record: dict) -> str | None:
    """The first file that a record names, wherever that stands; None for text alone and for clips inside the record."""
    text = json.dumps(record, ensure_ascii=False)
    for key in ("(?:video|image)s?", "path|url|(?:video|image)_url"):
        found = re.search(rf'"(?:{key})": (?:\[+)?("(?!data:)(?:[^"\\]|\\.)+")', text)
        if found:
            return json.loads(found[1])
    return None


# -- Turns


def read_turns(record: dict, where: str) -> list[Turn]:
    """The turns of a record. UserError, beginning with `where`, for an unknown role or form or wrong count of tags."""
    talk = read_form(record, where)
    tags = {kind: sum(count_tags(kind, message.content) for message in talk.messages) for kind in talk.clips}
    pools = {kind: media_pool(kind, found, tags[kind], where) for kind, found in talk.clips.items()}
    taken = dict.fromkeys(pools, 0)
    turns = [read_turn(message, pools, taken, where) for message in talk.messages]
    untagged = [kind for kind in ("image", "video") if not tags[kind] and not has_media(turns, kind)]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if untagged and first is not None:  # before the first question, as with TRL and in 2U1's sets for GRPO
        ahead = [clip for kind in untagged for clip in pools[kind]]
        turns[first] = replace(turns[first], parts=(*ahead, *turns[first].parts))
        taken |= {kind: len(pools[kind]) for kind in untagged}
    for kind, pool in pools.items():
        if taken[kind] != len(pool):
            told = f"{taken[kind]} <{kind}> tag(s) for {len(pool)} {kind}(s)"
            raise UserError(f"{where}: {told}; expected one tag for each, or none at all")
    return turns


def has_media(turns: list[Turn], kind: str) -> bool:
    return any(isinstance(part, Media) and part.kind == kind for turn in turns for part in turn.parts)


def read_turn(message: Message, pools: dict, taken: dict, where: str) -> Turn:
    role, content, trained = message
    if isinstance(content, str):
        parts = split_tags(content, pools, taken) if role == "user" else (content,)
    else:
        parts = tuple(found for part in content for found in read_part(part, pools, taken, where))
    for part in parts:
        if isinstance(part, Media) and role != "user":
            raise UserError(f"{where}: a video or image in a turn of the {role}; expected it in a user's turn")
        if isinstance(part, str) and not part.isascii():
            check_text(part, where)
    return Turn(role, parts, trained)


def check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold half of a pair, as "\ud83d"; no tokenizer takes it
        raise UserError(f"{where}: {text[error.start]!r} is half a character; write the text anew as UTF-8") from None


def media_pool(kind: str, found, tags: int, where: str) -> list[Media]:
    """The clips that a record names beside its turns, in the order of their tags, of which there are `tags`."""
    if found is None:
        return []
    if not isinstance(found, list):
        return [read_media(kind, found, {}, where)]
    names = [name for name in found if isinstance(name, str) and name.lower().endswith(IMAGE_SUFFIXES)]
    if kind == "video" and tags <= 1 and names and len(names) == len(found):
        return [read_media(kind, found, {}, where)]  # at most one tag, nothing but pictures: the frames of one clip
    return [read_media(kind, item, {}, where) for item in found]


def count_tags(kind: str, content: str | list) -> int:
    """Tags in the text, and typed parts that name no file: each stands for an entry of `videos` or `images`."""
    if isinstance(content, str):
        return content.count(f"<{kind}>")
    typed = [part for part in content if isinstance(part, dict) and part.get("type") == kind]
    empty = sum(first_of(part, kind, "path") is None for part in typed)
    return empty + sum(count_tags(kind, text) for text in map(part_text, content) if text)


def part_text(part) -> str | None:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    return text if isinstance(text, str) else None


def split_tags(text: str, pools: dict, taken: dict) -> tuple[str | Media, ...]:
    """Text with its <video> and <image> tags replaced by the next clip of their kind; counts the tags."""
    parts, end = [], 0
    for match in TAG.finditer(text):
        parts += [text[end : match.start()], *next_clip(match[1], pools, taken)]
        end = match.end()
    return tuple(part for part in (*parts, text[end:]) if part != "")


def next_clip(kind: str, pools: dict, taken: dict) -> list[Media]:
    """The clip that a tag stands for; [] where there are more tags than clips, which is told when all are counted."""
    taken[kind] += 1
    return pools[kind][taken[kind] - 1 : taken[kind]]


def read_part(part, pools: dict, taken: dict, where: str) -> tuple[str | Media, ...]:
    """A typed part of a message's content. Tags in its text are tags only where the record names clips beside it."""
    text = part_text(part)
    if text is not None:
        return split_tags(text, pools, taken) if any(pools.values()) else (text,)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image_url", "video_url"):  # its `detail` is OpenAI's price class; options set the size here
        return (read_media(kind[:5], part.get(kind), {}, where),)
    if kind not in ("video", "image"):
        expected = "type text, video, image, video_url or image_url"
        raise UserError(f"{where}: unknown content part {str(part)[:80]}; expected {expected}")
    found = first_of(part, kind, "path")
    if found is None:
        return tuple(next_clip(kind, pools, taken))
    besides = ("type", "path", "text", "video", "image")
    options = {key: value for key, value in part.items() if value is not None and key not in besides}
    return (read_media(kind, found, options, where),)


def read_media(kind: str, found, options: dict, where: str) -> Media:
    names = [plain_name(item) for item in (found if isinstance(found, list) else [found])]
    if not names or not all(isinstance(name, str) and name for name in names) or (kind == "image" and len(names) > 1):
        expected = "a file name or a list of frames" if kind == "video" else "a file name"
        raise UserError(f"{where}: {kind} is {str(found)[:80]!r}; expected {expected}")
    for name in names:
        if re.match(r"(?!file:)[a-zA-Z][\w+.-]+://", name):
            raise UserError(f"{where}: {name[:200]} is a web address; download it first")
        if name.startswith("data:") and (not (match := INLINE.match(name)) or (kind, match[1]) == ("image", "video")):
            raise UserError(f"{where}: {kind} is {name[:40]!r}…; expected data:{kind}/…;base64,… or a file name")
    return Media(kind, tuple(name.removeprefix("file://") for name in names), options)


def plain_name(found):
    """{"url": name} as OpenAI and {"path": name} as Hugging Face's datasets write it -> name."""
    return first_of(found, "url", "path") if isinstance(found, dict) else found

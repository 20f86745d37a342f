"""A dataset's file -> records -> turns of text and clips. No torch: nothing is decoded or tokenised here.

Two forms, in a .json array or in .jsonl (one record a line):

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhere to?"},
                                         {"from": "gpt", "value": "Left"}]}
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 4}, {"type": "text", ...}]},
                  {"role": "assistant", "content": "Left"}]}

`video` and `image` are a name or a list of names; one of a list may itself be a list: the frames of one clip. A part's
other keys are its own sampling options. A clip's tag and the line break after it give way to the clip, as in Qwen's own
fine-tuning.
"""

import json
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TAG = re.compile(r"<(video|image)>\n?")
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
        raise UserError(f"{path}: no such file; expected a .json or .jsonl dataset")
    records = JsonLines(path) if path.suffix == ".jsonl" else read_json(path)
    if not len(records):
        raise UserError(f"{path}: holds no records; expected at least one")
    return records


def read_json(path: Path) -> list[dict]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        hint = "one record a line is .jsonl, rename it" if error.msg == "Extra data" else "correct it"
        raise UserError(f"{path}: line {error.lineno} column {error.colno} is not JSON ({error.msg}); {hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
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
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            told = f"{self.path}: line {self.line_number(i)} is not JSON ({error})"
            raise UserError(f"{told}; correct or remove it") from None
        if not isinstance(record, dict):
            raise UserError(f"{self.path}: line {self.line_number(i)} is a {type(record).__name__}, expected an object")
        return record

    def line_number(self, i: int) -> int:
        return os.pread(self.file, self.starts[i], 0).count(b"\n") + 1

    def __del__(self):
        if hasattr(self, "file"):
            os.close(self.file)


def record_name(record: dict) -> str:
    """What messages call a record: its id, else its first clip, else the start of its text."""
    if "id" in record:
        return str(record["id"])
    found = re.search(r'"(?:video|image)s?": (?:\[+)?"([^"]+)"', json.dumps(record, ensure_ascii=False))
    turns = record.get("conversations", record.get("messages"))
    return found[1] if found else json.dumps(turns, ensure_ascii=False)[:60]


# -- Turns


def read_turns(record: dict, where: str) -> list[Turn]:
    """The turns of a record. UserError, beginning with `where`, for an unknown role or form or wrong count of tags."""
    messages = record.get("conversations", record.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: found no conversations or messages; expected a list of turns")
    pools = {kind: media_pool(record, kind, messages, where) for kind in ("video", "image")}
    given = {kind: len(pool) for kind, pool in pools.items()}
    tags = dict.fromkeys(given, 0)
    turns = []
    for message in messages:
        role, content = read_message(message, where)
        if isinstance(content, str):
            parts = split_tags(content, pools, tags) if role == "user" else (content,)
        else:
            parts = tuple(read_part(part, where) for part in content)
        if role != "user" and any(isinstance(part, Media) for part in parts):
            raise UserError(f"{where}: a video or image in a turn of the {role}; expected it in a user's turn")
        turns.append(Turn(role, parts))
    for kind, n in given.items():
        if tags[kind] != n:
            raise UserError(f"{where}: {tags[kind]} <{kind}> tag(s) for {n} {kind}(s); expected one tag for each")
    return turns


def read_message(message, where: str) -> tuple[str, str | list]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: a turn is a {type(message).__name__}, expected an object")
    role = message.get("from", message.get("role"))
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; expected human/user, gpt/assistant or system")
    content = message.get("value", message.get("content"))
    if not isinstance(content, (str, list)):
        raise UserError(f"{where}: the {role}'s turn holds {content!r}; expected text or a list of parts")
    return ROLES[role], content


def media_pool(record: dict, kind: str, messages: list, where: str) -> list[Media]:
    """The clips that a record names beside its turns, in the order of their tags."""
    found = record.get(kind, record.get(f"{kind}s"))
    if found is None:
        return []
    if not isinstance(found, list):
        return [read_media(kind, found, {}, where)]
    texts = [m.get("value", m.get("content")) for m in messages if isinstance(m, dict)]
    tags = sum(text.count(f"<{kind}>") for text in texts if isinstance(text, str))
    names = [name for name in found if isinstance(name, str) and name.lower().endswith(IMAGE_SUFFIXES)]
    if kind == "video" and tags == 1 and len(names) == len(found):
        return [read_media(kind, found, {}, where)]  # one tag and nothing but pictures: the frames of one clip
    return [read_media(kind, item, {}, where) for item in found]


def split_tags(text: str, pools: dict, tags: dict) -> tuple[str | Media, ...]:
    """Text with its <video> and <image> tags replaced by the next clip of their kind; counts the tags."""
    parts, end = [], 0
    for match in TAG.finditer(text):
        kind = match[1]
        parts.append(text[end : match.start()])
        if tags[kind] < len(pools[kind]):
            parts.append(pools[kind][tags[kind]])
        tags[kind] += 1
        end = match.end()
    return tuple(part for part in (*parts, text[end:]) if part != "")


def read_part(part, where: str) -> str | Media:
    """A typed part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else part
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in ("video", "image"):
        raise UserError(f"{where}: unknown content part {str(part)[:80]}; expected type text, video or image")
    options = {key: value for key, value in part.items() if key not in ("type", kind, "path")}
    return read_media(kind, part.get(kind, part.get("path")), options, where)


def read_media(kind: str, found, options: dict, where: str) -> Media:
    names = found if isinstance(found, list) else [found]
    if not names or not all(isinstance(name, str) and name for name in names) or (kind == "image" and len(names) > 1):
        expected = "a file name, or a list of frames" if kind == "video" else "a file name"
        raise UserError(f"{where}: {kind} is {str(found)[:80]!r}; expected {expected}")
    for name in names:
        if name.startswith(("http://", "https://")):
            raise UserError(f"{where}: {name} is a web address; download it first")
    return Media(kind, tuple(name.removeprefix("file://") for name in names), options)

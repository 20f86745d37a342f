"""A dataset's records -> turns of text and clips. No torch: nothing is decoded or tokenised here.

Two forms (dataset/index.py reads them from a .json array or from .jsonl, one record a line):

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhere to?"},
                                         {"from": "gpt", "value": "Left"}]}
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 4}, {"type": "text", ...}]},
                  {"role": "assistant", "content": "Left"}]}

`video` and `image` are a name or a list of names; one of a list may itself be a list: the frames of one clip. A part's
other keys are its own sampling options. A clip's tag and the line break after it give way to the clip, as in Qwen's own
fine-tuning.
"""

import json
import re
from dataclasses import dataclass, field

from model import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TAG = re.compile(r"<(video|image)>\n?")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


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
    if not isinstance(role, str) or role not in ROLES:
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
    return Media(kind, tuple(name.removeprefix("file://") for name in names), options)

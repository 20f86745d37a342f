"""A dataset's records -> turns of text and clips. No torch: nothing is decoded or tokenised here.

What a record may look like, and whose form that is, is told in forms.py (dataset/index.py reads them from a .json array
or from .jsonl, one record a line); this one is our own too:

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhere to?"},
                                         {"from": "gpt", "value": "Left"}]}

`video` and `image` are a name or a list of names; one of a list may itself be a list: the frames of one clip. A part's
other keys are its own sampling options. A clip's tag and the line break after it give way to the clip, as in Qwen's own
fine-tuning; where a record names clips and has no tag at all, they stand before its first question.
"""

import json
import re
from dataclasses import dataclass, field, replace

from dataset.forms import FORMS, Message, first_of, read_form
from model import UserError

TAG = re.compile(r"<(video|image)>\n?")
# RFC 2397, as far as OpenAI and ms-swift use it: a file inside its record
INLINE = re.compile(r"data:(video|image)/([\w.+-]+)(?:;[\w.+=-]+)*;base64,")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
VIDEO_SUFFIXES += (".gif", ".m2ts", ".h264", ".hevc")
# Columns that hold a picture or clip in other people's datasets, whatever their value looks like
CLIP_COLUMNS = {f"{kind}{end}" for kind in ("image", "img", "video", "clip", "frame", "picture", "photo", "media")
                for end in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_name")}  # fmt: skip
CLIP_COLUMNS |= {"file_name", "filename", "file_path", "filepath", "visual", "visuals", "pixel_values"}


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
    refuse_unread_clips(record, pools, talk.messages, where)
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


def refuse_unread_clips(record: dict, pools: dict, messages: list[Message], where: str) -> None:
    """UserError where a record names its picture or clip in a column that no form knows: it would be text alone."""
    typed = any(isinstance(part, dict) and part.get("type") not in (None, "text")
                for message in messages if isinstance(message.content, list) for part in message.content)  # fmt: skip
    if typed or any(pools.values()):
        return
    known = {name for form in FORMS for name in (form.key, *form.columns)} | {"id", "problem_id", "videos", "images"}
    for column, value in record.items():
        if column not in known and (names_clip(value) or (column.lower() in CLIP_COLUMNS and holds_something(value))):
            kind = "video or image" if column.lower() in ("path", "file_name", "filename") else clip_kind(column, value)
            told = f"{where}: its picture or clip seems to stand in the column {column}, which no form of record has"
            raise UserError(f"{told}; rename the column to {kind}, or remove it if it is none")


def names_clip(value) -> bool:
    """Whether a value, or anything in it, is the name of a picture's or clip's file."""
    if isinstance(value, dict):
        return any(map(names_clip, value.values()))
    if isinstance(value, list):
        return any(map(names_clip, value))
    is_name = isinstance(value, str) and len(value) < 4096 and "\n" not in value
    return is_name and (value.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)) or bool(INLINE.match(value)))


def holds_something(value) -> bool:
    return isinstance(value, (str, list, dict)) and bool(value)


def clip_kind(column: str, value) -> str:
    pictures = str(value).lower().rstrip("'\"]}").endswith(IMAGE_SUFFIXES)
    if "frame" in column.lower():
        return "video (a list of frames)"
    return "image" if pictures or column.lower().startswith(("im", "pic", "photo")) else "video"


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
        if name.startswith("data:") and (not (match := INLINE.match(name)) or (kind, match[1]) == ("image", "video")):
            raise UserError(f"{where}: {kind} is {name[:40]!r}…; expected data:{kind}/…;base64,… or a file name")
    return Media(kind, tuple(name.removeprefix("file://") for name in names), options)


def plain_name(found):
    """{"url": name} as OpenAI and {"path": name} as Hugging Face's datasets write it -> name."""
    return first_of(found, "url", "path") if isinstance(found, dict) else found

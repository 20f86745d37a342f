"""A dataset's files -> records -> turns of text and clips. Imports no torch.

    read_records(path)    .json arrays and .jsonl files with one object a line
    read_form(record)     messages, clips, solution, options, problem_type: training, rewards and evaluation read this
    read_turns(record)    its turns, each clip in its place

forms.py knows the forms of other trainers. One of a list of videos may itself be a list: the frames of a clip. The
other keys of a typed part are its own sampling options. A tag and the line break after it give way to the clip, as in
Qwen's own fine-tuning; without tags, clips stand before the first question.
"""

import json
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from forms import FORMS, KNOWN_COLUMNS, Conversation, first_of, read_form
from model import UserError, nearest_path

SPACE = re.compile(r"[ \t\r\n]*")
TAG = re.compile(r"<(video|image)>\n?")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".tga", ".jp2")
IMAGE_SUFFIXES += (".avif", ".heic", ".heif", ".jpe", ".pgm", ".pbm", ".ico")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
VIDEO_SUFFIXES += (".gif", ".apng", ".m2ts", ".mts", ".m2v", ".vob", ".ogv", ".mxf", ".h264", ".hevc")
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".arrow", ".xlsx")  # of datasets that are not read
NAMES = ("video", "image", "video_url", "image_url", "path", "url", "value")  # where a typed part names its file
# Columns that hold a picture or clip in other people's datasets, whatever their value looks like
CLIP_COLUMNS = {f"{kind}{end}" for kind in ("image", "img", "video", "clip", "frame", "picture", "photo", "media")
                for end in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_name")}  # fmt: skip
CLIP_COLUMNS |= {"path", "file_name", "filename", "file_path", "filepath", "visual", "visuals", "pixel_values"}


# -- A file -> records


class Record(dict):
    """A record of a file. folder: the file's, where its clips are looked for first."""

    folder = None


class Records(Sequence):
    """The records of one or several files, parsed when they are used. One buffer holds their text: forked workers share
    it, and it takes no more memory than the files."""

    def __init__(self):
        self.data, self.ends = bytearray(), array("Q", [0])
        self.files: list[tuple[str, float, int]] = []  # folder, weight, number of the first record

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8")
        self.ends.append(len(self.data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        record = Record(json.loads(self.data[self.ends[i] : self.ends[i + 1]]))
        record.folder = next(folder for folder, _, first in reversed(self.files) if first <= i)
        return record

    def shares(self) -> list[tuple[float, Sequence[int]]]:
        """(weight, numbers of the records) of each file."""
        firsts = [first for _, _, first in self.files] + [len(self)]
        return [(weight, range(first, end)) for (_, weight, first), end in zip(self.files, firsts[1:])]


class Selection(Sequence):
    """Some records of a sequence, by number. check: called with (number, record), raises for one not to be used."""

    def __init__(self, records: Sequence[dict], numbers: Iterable[int], check: Callable | None = None):
        self.records, self.check = records, check
        self.numbers = numbers if isinstance(numbers, range) else array("Q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i):
        record = self.records[self.numbers[i]]
        if self.check:
            self.check(self.numbers[i], record)
        return record

    def shares(self) -> list[tuple[float, Sequence[int]]]:
        place = {number: i for i, number in enumerate(self.numbers)}
        return [(weight, [place[n] for n in mine if n in place]) for weight, mine in shares(self.records)]


def shares(records: Sequence[dict]) -> list[tuple[float, Sequence[int]]]:
    """(weight, numbers of its records) of each file: how often an epoch of training has them."""
    return records.shares() if isinstance(records, (Records, Selection)) else [(1.0, range(len(records)))]


def data_files(text: str | Path) -> list[tuple[str, float]]:
    """(path, weight) of each file of a --data_path: "train.json", or "a.json:2,b.jsonl:0.5". UserError for a weight
    that is none. A name that exists is taken as it is, whatever colons and commas it holds."""
    files = []
    for item in [str(text)] if os.path.exists(text) else str(text).split(","):
        path, _, weight = item.rpartition(":")
        if os.path.exists(item) or not os.path.exists(path):  # no weight; or no file, which read_file() says
            path, weight = item, "1"
        if not weight.replace(".", "", 1).isdecimal() or float(weight) == 0:
            raise UserError(f"{item}: the weight is {weight!r}; expected a number above 0, as in {path}:2")
        files.append((path, float(weight)))
    return files


def read_records(path: str | Path) -> Records:
    """The records of a .json or .jsonl file, or of several, as data_files() takes them apart. UserError naming file and
    line for what does not parse."""
    records = Records()
    for file, weight in data_files(path):
        if "://" in file:
            raise UserError(f"{file} is a web address; download it first (curl -LO {file}) and name the file")
        records.files.append((str(Path(file).parent), weight, len(records)))
        read_file(Path(file), records)
    return records


def read_file(path: Path, records: Records) -> None:
    """Append the records of one file."""
    if not os.path.isfile(path):  # a fifo would block for good
        inside = path / "train.json"
        hint = f"; did you mean {inside}?" if os.path.isfile(inside) else nearest_path(path)
        expected = f"expected a .json or .jsonl dataset, python generate.py makes one{hint}"
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}; {expected}")
    if path.suffix.lower() in TABLE_SUFFIXES:
        raise UserError(f"{path}: a table, which is not read; write its records to a .json or .jsonl file")
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a .json or .jsonl dataset") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    first, items = len(records), line_items(text) if path.suffix.lower() == ".jsonl" else array_items(text)
    try:
        for record, source in items:
            if not isinstance(record, dict):
                raise ValueError(f"is a {type(record).__name__}, expected an object")
            if "\\u" in source:  # only an escape can make half of a character
                json.dumps(record, ensure_ascii=False).encode("utf-8")
            records.append(source)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{path}: {where} is not JSON ({error.msg}); correct or remove it") from None
    except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
        names = {RecursionError: "is nested too deeply", UnicodeEncodeError: "holds half a character (\\ud800-\\udfff)"}
        why = names.get(type(error), error)
        raise UserError(f"{path}: record {len(records) - first} {why}; correct or remove it") from None
    if len(records) == first:
        raise UserError(f"{path}: holds no records; expected at least one")


def line_items(text: str) -> Iterator[tuple[object, str]]:
    """(value, its text) of each line that is not blank. json.JSONDecodeError for what is no JSON."""
    start = 0
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line), line
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, text, start + error.pos) from None
        start += len(line) + 1


def array_items(text: str) -> Iterator[tuple[object, str]]:
    """(value, its text) of each entry of a JSON array. json.JSONDecodeError for what is none."""
    decode, at = json.JSONDecoder().raw_decode, SPACE.match(text).end()
    if text[at : at + 1] != "[":
        raise json.JSONDecodeError("expected [ ] around the records; one a line is .jsonl: rename it", text, at)
    at = SPACE.match(text, at + 1).end()
    sign = "]" if text[at : at + 1] == "]" else ","
    end = at = SPACE.match(text, at + (sign == "]")).end()
    while sign == ",":
        value, end = decode(text, at)
        yield value, text[at:end]
        end = SPACE.match(text, end).end()
        sign, at = text[end : end + 1], SPACE.match(text, end + 1).end()
    if sign != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def spread(records: Sequence[dict], wanted: int | None, seed: int) -> Sequence[dict]:
    """`wanted` of the records in their order, spread over all of them by the seed; all where that is not fewer.

    The first ones of a file are no fair sample: files are often sorted by class or by source.
    """
    if wanted is None or wanted >= len(records):
        return records
    return Selection(records, sorted(random.Random(seed).sample(range(len(records)), wanted)))


# -- Messages -> turns, each clip in its place


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


def read_turns(record: dict, where: str) -> list[Turn]:
    """The turns of a record. UserError, beginning with `where`, for an unknown role or form or wrong count of tags."""
    form = read_form(record, where)
    try:
        return turns_of(record, form)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def turns_of(record: dict, form: Conversation) -> list[Turn]:
    tagged = any(form.clips.values())  # in typed parts, tags are tags only where the record names clips beside them
    turns = [Turn(m.role, tuple(parts_of(m.role, m.content, tagged)), m.trained) for m in form.messages]
    for kind, names in form.clips.items():
        named = [part for turn in turns for part in turn.parts if isinstance(part, Media) and part.kind == kind]
        tags = sum(not part.paths for part in named)
        pool = media_pool(kind, names, tags)
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if pool and not named and first is not None:  # before the first question, as with TRL and in 2U1's GRPO sets
            turns[first] = replace(turns[first], parts=(*pool, *turns[first].parts))
        elif tags != len(pool):
            raise UserError(
                f"{tags} <{kind}> tag(s) for {len(pool)} {kind}(s); expected one tag for each, or none at all"
            )
        clips = iter(pool)
        turns = [replace(turn, parts=tuple(fill(part, kind, clips) for part in turn.parts)) for turn in turns]
    media = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
    refuse_unread_clips(record, [path for part in media for path in part.paths])
    span = {key: record[key] for key in ("video_start", "video_end") if record.get(key) is not None}
    videos = [part for part in media if part.kind == "video"]
    if span and len(videos) != 1:
        raise UserError(f"{' and '.join(span)} beside {len(videos)} videos; expected one video")
    for key, value in span.items():
        if key in videos[0].options:
            raise UserError(f"{key} of the record and of its video; expected one of them")
        videos[0].options[key] = value
    return turns


def fill(part: str | Media, kind: str, clips: Iterator[Media]) -> str | Media:
    """The next clip for a part of its kind that names no file, with the options of both."""
    if not isinstance(part, Media) or part.kind != kind or part.paths:
        return part
    clip = next(clips)
    return replace(clip, options=clip.options | part.options)


def parts_of(role: str, content: str | list, tagged: bool) -> Iterator[str | Media]:
    """Text and clips of one message; a tag, and a part that names no file, as a Media without paths."""
    for part in [content] if isinstance(content, str) else content:
        is_text = isinstance(part, dict) and part.get("type") == "text" and not any(map(part.get, NAMES[:-1]))
        text = first_of(part, "text", "value") if is_text else part
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(text, str):
            has_tags = role == "user" and (tagged or text is content)
            pieces = TAG.split(text) if has_tags else [text]  # text, kind, text, kind, text
            yield from (Media(piece, ()) if i % 2 else piece for i, piece in enumerate(pieces) if piece)
        elif kind not in ("image", "video", "image_url", "video_url"):
            raise UserError(
                f"unknown content part {str(part)[:80]}; expected type text, video, image or video_url, image_url"
            )
        elif role != "user":
            raise UserError(f"a video or image in a turn of the {role}; expected it in a user's turn")
        else:
            yield read_media(kind[:5], part, unnamed=True)


def media_pool(kind: str, names, tags: int) -> list[Media]:
    """The clips that a record names beside its turns, in the order of their tags, of which there are `tags`."""
    if names is None or not isinstance(names, list):
        return [] if names is None else [read_media(kind, names)]
    if kind == "video" and tags <= 1 and names and all(map(names_picture, names)):
        return [read_media(kind, names)]  # at most one tag, nothing but pictures: the frames of one clip
    return [read_media(kind, name) for name in names]


def names_picture(name) -> bool:
    name = first_of(name, "url", "path") if isinstance(name, dict) else name
    name = name.lower() if isinstance(name, str) else ""
    return name.startswith("data:image/") or name.endswith(IMAGE_SUFFIXES)


def read_media(kind: str, names, unnamed: bool = False) -> Media:
    """names: a file, the frames of a clip, or an object with one of NAMES and options beside it: a typed part, OpenAI's
    {"url": name}, the {"path": name} of Hugging Face's datasets. unnamed: it may leave its file to the record."""
    options = {}
    while isinstance(names, dict):
        given = {key: value for key, value in names.items() if value is not None and value != ""}
        found = [key for key in NAMES if key in given]
        # `detail` is OpenAI's price class; options set the size here
        options |= {key: given[key] for key in given if key not in (*found, "type", "detail")}
        if not found and unnamed:
            return Media(kind, (), options)
        if len(found) != 1:
            raise UserError(f"{kind} is {str(names)[:80]!r}; expected one file name")
        names, unnamed = given[found[0]], False
    plain = [first_of(name, "url", "path") if isinstance(name, dict) else name
             for name in (names if isinstance(names, list) else [names])]  # fmt: skip
    if not plain or not all(isinstance(name, str) and name for name in plain) or (kind == "image" and len(plain) > 1):
        expected = "a file name or a list of frames" if kind == "video" else "a file name"
        raise UserError(f"{kind} is {str(names)[:80]!r}; expected {expected}")
    return Media(kind, tuple(name.removeprefix("file://") for name in plain), options)


def refuse_unread_clips(record: dict, read: list[str]) -> None:
    """UserError where a record names a picture or clip in a column that no form knows: it would be lost. Beside clips
    that are read, only in a column whose own name says so, for a file of another name: others may describe the clip."""
    read_names = {os.path.basename(path) for path in read}
    for column, value in record.items():
        named = column.lower() in CLIP_COLUMNS
        if read:
            lost = named and any(os.path.basename(name) not in read_names for name in file_names(value))
        else:
            lost = (named and isinstance(value, (str, list, dict)) and value) or any(file_names(value))
        if lost and column not in KNOWN_COLUMNS:
            message = f"its picture or clip seems to stand in the column {column}, which no form of record has"
            raise UserError(f"{message}; rename the column to video or image, or remove it if it is none")


def file_names(value) -> Iterator[str]:
    """The names of pictures and clips in a value; web addresses of them, and their data, too."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from file_names(item)
    elif isinstance(value, str) and "\n" not in value.strip():
        name = value.strip().partition("?")[0].lower()
        if name.startswith(("data:image/", "data:video/")) or name.endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES):
            yield value.strip()


# -- Names


def record_name(record: dict) -> str:
    """What messages call a record: its id, else its first clip, else the start of its text."""
    for key in ("id", "problem_id"):
        if record.get(key) is not None:
            return str(record[key])[:80]
    text = next((record[key] for key in FORMS if record.get(key) is not None), record)
    return clip_name(record) or json.dumps(text, ensure_ascii=False)[:60]


def clip_name(record: dict) -> str | None:
    """The first file that a record's turns name; None for text alone, clips inside the record and a refused one."""
    try:
        turns = read_turns(record, "")
    except UserError:
        return None
    names = (part.paths[0] for turn in turns for part in turn.parts if isinstance(part, Media))
    return next((name for name in names if not name.startswith("data:")), None)

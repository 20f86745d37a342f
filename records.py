"""A dataset's files -> records -> turns of text and clips. Imports no torch.

    read_records(path)   .json arrays and .jsonl files with one object a line
    read_form(record)    messages, solution, options, problem_type: training, rewards and evaluation read this
    read_turns(record)   the same turns, with each clip in its place

docs/data.md lists the forms, and what each becomes. What cannot be read raises UserError; who reads the records adds
the number of the sample.
"""

import json
import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from answers import parse_options
from model import UserError, nearest_path

TAG = re.compile(r"<(video|image)>\n?")  # it and the line break after it give way to the clip, as in Qwen's fine-tuning
CHATS = "conversations", "messages", "conversation", "prompt"
QUESTIONS = "problem", "query", "question", "instruction"
ANSWERS = "response", "output", "completion"
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}  # the last is OpenAI's newer word
ROLES |= {role: role for role in ("user", "assistant", "system")}
FILE_KEYS = "video", "image", "video_url", "image_url", "path", "url", "value"  # where a typed part names its file
RECORD_WEIGHTS = "loss_weight", "loss_scale"  # 0 = not learned
TURN_WEIGHTS = (*RECORD_WEIGHTS, "loss", "weight", "train")
# What changes the meaning of a record, or of a turn, and is not read: where it holds something, the record is refused
UNREAD = "chosen rejected rejected_response rejected_messages rejected_images tools audio audios objects".split()
UNREAD_IN_TURN = "tool_calls", "function_call", "thinking", "reasoning", "reasoning_content"

IMAGE_SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .bmp .webp .tif .tiff .ppm .pgm .pbm .tga .jp2 .ico .avif .heic .heif".split()
)
TABLE_SUFFIXES = ".parquet", ".csv", ".tsv", ".arrow", ".xlsx"  # of datasets that are not read
DATA_SUFFIXES = ".json", ".jsonl", *TABLE_SUFFIXES
SUFFIX = "|".join(map(re.escape, IMAGE_SUFFIXES))
SUFFIX += r"|\.(?:mp4|m4v|mov|avi|mkv|webm|mpe?g|m?ts|m2ts|m2v|flv|wmv|3gp|gif|apng|vob|ogv|mxf|h264|hevc)"
# In JSON: a quoted name with one of these suffixes, perhaps of a web address; or a picture or clip itself
CLIP_NAME = re.compile(rf'"(data:(?:image|video)/[^"]*|[^"]*(?:{SUFFIX})(?:\?[^"]*)?)"', re.IGNORECASE)
# Columns that hold a picture or clip in other people's datasets, whatever their value looks like
CLIP_COLUMN = re.compile(
    "(image|img|video|clip|frame|picture|photo|media|visual)s?(_paths?|_files?|_url|_name)?"
    "|file_?(name|path)|path|pixel_values"
)
KNOWN_COLUMNS = {*CHATS, *QUESTIONS, *ANSWERS, "id", "problem_id", "video", "videos", "image", "images", "system"}
KNOWN_COLUMNS |= {"solution", "answer", "options", "problem_type", "process", "data_type", "input", "history"}


# -- Files -> records


class Record(dict):
    """A record of a file. folder: the file's, where its clips are looked for first."""

    folder = None


class Records(Sequence):
    """The records of one or several files, parsed when they are used: one buffer, which forked workers share."""

    def __init__(self):
        self.data, self.ends = bytearray(), array("Q", [0])
        self.file = array("H")  # of each record: which of the files
        self.folders, self.weights = [], []  # of each file; how often an epoch of training has its records

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, i):
        i = range(len(self))[i]
        record = Record(json.loads(self.data[self.ends[i] : self.ends[i + 1]]))
        record.folder = self.folders[self.file[i]]
        return record


class Selection(Sequence):
    """Some records of a sequence, by number. check: called with each record, raises for one not to be used."""

    def __init__(self, records: Sequence[dict], numbers: Iterable[int], check: Callable | None = None):
        self.records, self.numbers, self.check = records, array("Q", numbers), check
        self.weights, all_files = getattr(records, "weights", [1.0]), getattr(records, "file", None)
        self.file = array("H", (all_files[number] if all_files else 0 for number in self.numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i):
        record = self.records[self.numbers[i]]
        if self.check:
            self.check(record)
        return record


def spread(records: Sequence[dict], wanted: int | None, seed: int) -> Sequence[dict]:
    """`wanted` of the records in their order, spread by the seed over all of them: files are often sorted by class."""
    if wanted is None or wanted >= len(records):
        return records
    return Selection(records, sorted(random.Random(seed).sample(range(len(records)), wanted)))


def data_files(text: str | Path) -> list[tuple[str, float]]:
    """(path, weight) of each file of a --data_path: "train.json", or "a.json:2,b.jsonl:0.5". A name that exists is
    taken as it is, whatever colons and commas it holds."""
    files = []
    for item in [str(text)] if os.path.exists(text) else str(text).split(","):
        path, _, weight = item.rpartition(":")
        if os.path.exists(item) or not os.path.exists(path):  # no weight; or no file, as read_file() says
            path, weight = item, "1"
        if not weight.replace(".", "", 1).isdecimal() or float(weight) == 0:
            raise UserError(f"{item}: the weight is {weight!r}; expected a number above 0, as in {path}:2")
        files.append((path, float(weight)))
    return files


def read_records(path: str | Path) -> Records:
    """The records of a .json or .jsonl file, or of several with weights. UserError naming the file."""
    records = Records()
    for i, (file, weight) in enumerate(data_files(path)):
        records.folders.append(str(Path(file).parent))
        records.weights.append(weight)
        for text in read_file(file):
            records.data += text
            records.ends.append(len(records.data))
            records.file.append(i)
    return records


def read_file(file: str) -> list[bytes]:
    """The records of a file, as JSON in UTF-8."""
    if "://" in file:
        raise UserError(f"{file} is a web address; download it first (curl -LO {file}) and name the file")
    if not os.path.isfile(file):  # a fifo would block for good
        reason = "not a file" if os.path.exists(file) else "no such file"
        expected = f"expected a .json or .jsonl dataset, python generate.py makes one{nearest_path(file)}"
        raise UserError(f"{file}: {reason}; {expected}")
    if file.lower().endswith(TABLE_SUFFIXES):
        raise UserError(f"{file}: a table, which is not read; load_dataset(...).to_json(...) makes a .jsonl of it")
    lines, values = 0, []  # lines: before the one that is being read
    try:
        text = Path(file).read_text("utf-8-sig")
        if not file.lower().endswith(".jsonl"):
            values = json.loads(text) if text.strip() else []
        else:
            for lines, line in enumerate(text.split("\n")):  # noqa: B007 (an error below says where)
                values += [json.loads(line)] if line.strip() else []
        if not values or not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            problem = "it is empty; " if values == [] else ""
            raise ValueError(f"{problem}expected an array [...] of objects, or one object a line in .jsonl")
        return [json.dumps(value, ensure_ascii=False).encode("utf-8") for value in values]
    except json.JSONDecodeError as error:
        where = f"line {lines + error.lineno} column {error.colno}"
        raise UserError(f"{file}: {where} is not JSON ({error.msg}); one object a line is .jsonl") from None
    except (OSError, ValueError, RecursionError) as error:  # also no UTF-8, half a character, a number without end
        raise UserError(f"{file}: cannot be read ({error})") from None


# -- A record in any form -> its messages, and what stands beside them


@dataclass
class Media:
    """One video (a file, or a list of frames) or image of a turn, as the record names it."""

    kind: str  # "video" or "image"
    paths: tuple[str, ...]  # (): the next one that the record names beside its turns
    options: dict = field(default_factory=dict)


@dataclass
class Turn:
    role: str  # system, user or assistant
    content: str | list  # as the record has it: text, or typed parts
    trained: bool = True  # of the assistant: whether this answer is learned
    parts: list[str | Media] = field(default_factory=list)  # filled by read_turns

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


class Conversation(NamedTuple):
    """A record, whatever its form was."""

    messages: list[Turn]
    solution: str | None  # what the rewards judge by, where it stands apart from the messages
    options: list[str]  # lettered, "A. Left"; [] where they are not apart from the question
    problem_type: str  # as Video-R1 has it; "" where there is none


def read_form(record: dict) -> Conversation:
    """What a record says. UserError for no known form, and for what is not learned here."""
    form = next((key for key in CHATS + QUESTIONS if record.get(key) is not None), None)
    if form is None:
        names = " ".join(", ".join(map(str, record)).split())[:200] or "none"  # a key may hold line breaks
        expected = f"expected one of {', '.join(CHATS + QUESTIONS)}"
        raise UserError(f"no known form of record, its keys are: {names}; {expected}")
    rejected = any(str(record.get(key)).lower() in ("false", "0", "0.0") for key in ("label", "kto_tag"))
    if rejected or not is_learned(record, RECORD_WEIGHTS, UNREAD):
        raise UserError("marked as not learned (weight 0, or label false: a rejected answer); leave it out")
    texts = (form, "input", "process", *ANSWERS) if form in QUESTIONS else ()
    for key in ("system", "problem_type", *texts):
        if not isinstance(record.get(key), str | None):
            raise UserError(f"{key} is a {type(record[key]).__name__}, expected text")
    solution, system = read_solution(record), record.get("system")
    options = read_options(record, form, solution)
    turns = read_question(record, form, options, solution) if form in QUESTIONS else read_chat(record, form)
    if solution is not None and turns[-1].role != "assistant":
        turns.append(Turn("assistant", solution))
    if system and turns[0].role == "system":
        raise UserError("a system column beside another system turn; expected one of them")
    turns = [Turn("system", system), *turns] if system else turns
    return Conversation(turns, solution, options, record.get("problem_type") or "")


def read_chat(record: dict, form: str) -> list[Turn]:
    """A list of messages; of TRL's prompt and completion only the completion is learned, as there."""
    chat, completion = record[form], record.get("completion") if form == "prompt" else None
    if form == "conversation" and isinstance(chat, list):
        pairs = [pair.items() for pair in chat if isinstance(pair, dict)]
        chat = [{"role": role, "content": text} for pair in pairs for role, text in pair if text is not None]
    elif form == "prompt" and isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(chat, list) or not chat or not isinstance(completion, list | None):
        raise UserError(f"{form} is {str(chat)[:80]!r}; expected a list of turns")
    turns = []
    for i, message in enumerate([*chat, *(completion or [])]):
        given = message if isinstance(message, dict) else {}
        role, content = first_of(given, "from", "role"), first_of(given, "value", "content")
        if str(role) not in ROLES or not isinstance(content, (str, list)):
            expected = "expected a role (user, assistant, system) and text or parts"
            raise UserError(f"a turn is {str(message)[:80]}; {expected}")
        if not all(is_learned(part) for part in content if isinstance(part, dict)):
            raise UserError("a part of a turn is marked as not learned; a turn is learned whole or not at all")
        turns.append(Turn(ROLES[role], content, is_learned(given) and (form != "prompt" or i >= len(chat))))
    return turns


def read_question(record: dict, form: str, options: list[str], solution: str | None) -> list[Turn]:
    """Video-R1, query and response, Alpaca: earlier questions and answers, one question, and at most one answer."""
    history = record.get("history") or []
    are_texts = lambda pair: isinstance(pair, list) and [type(text) for text in pair] == [str, str]
    if not isinstance(history, list) or not all(map(are_texts, history)):
        raise UserError(f"history is {str(history)[:80]}; expected pairs of a question and its answer")
    texts = [text for pair in history for text in pair]
    texts.append("\n".join(filter(None, (record[form], record.get("input")))))
    if options:
        texts[-1] = "\n".join([texts[-1].rstrip("\n"), "Options:", *options])
    answer, process = next(filter(None, map(record.get, ANSWERS)), None), record.get("process")
    if answer is None and process and solution:
        answer = f"{process}\n{solution}"  # the reasoning, then the answer in its tags
    texts += [answer] if answer else []
    return [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def is_learned(item: dict, weights: Sequence[str] = TURN_WEIGHTS, unread: Sequence[str] = UNREAD_IN_TURN) -> bool:
    """Whether a record, a turn or a part of one is learned. UserError for what is not read, and for other weights."""
    for key in unread:
        if item.get(key) not in (None, "", [], {}, "[]"):
            raise UserError(f"holds {key}, which is not read here; remove it, or leave the record out")
    weight = {key: item[key] for key in weights if item.get(key) is not None}
    if any(value not in (0, 1) for value in weight.values()):
        raise UserError(f"{str(weight)[:80]}: expected 0 or 1, for an answer is learned whole or not at all")
    return 0 not in weight.values()


def first_of(record: dict, *keys: str):
    """The first value that is there: exports write null for what a record lacks."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")  # no truth value, NaN or Infinity


def read_solution(record: dict) -> str | None:
    """Text or a number, or a list of numbers, a span or a box, as its text; None where there is none."""
    for key in ("solution", "answer"):
        value = record.get(key)
        numbers = value if isinstance(value, list) else [value]
        if not (value is None or isinstance(value, str) or (numbers and all(map(is_number, numbers)))):
            raise UserError(f"{key} is {str(value)[:80]}; expected text, a finite number, or a list of such numbers")
        if value is not None and str(value).strip():
            return str(value)
    return None


def read_options(record: dict, form: str, solution: str | None) -> list[str]:
    """["A. Left", ...]. Options without letters get them. Of a question that lists none, choices are options too, and
    candidates beside a solution: else these may be answers that a model gave."""
    columns = ("options", "choices", "candidates") if solution else ("options", "choices")
    column = next(filter(record.get, columns), "options")
    if column != "options" and (form in CHATS or parse_options(record[form])):
        return []
    options = record.get(column) or []
    if isinstance(options, dict):  # exports write null for an option that a question lacks
        options = {label.strip().upper(): words for label, words in options.items() if words is not None}
        if "".join(options) != ascii_uppercase[: len(options)]:
            raise UserError(f"{column} are labelled {', '.join(options)[:80]}; expected A, B, C and so on")
        options = list(options.values())
    is_list = isinstance(options, list) and all(isinstance(words, str) or is_number(words) for words in options)
    if not is_list or len(options) > len(ascii_uppercase):
        raise UserError(f"{column} are {str(options)[:80]}; expected a list of at most {len(ascii_uppercase)} texts")
    options = list(map(str, options))
    lettered = all(re.match(rf"\(?{letter}[.):]", words) for words, letter in zip(options, ascii_uppercase))
    return options if lettered else [f"{letter}. {words}" for letter, words in zip(ascii_uppercase, options)]


# -- Messages -> turns, each clip in its place


def read_turns(record: dict) -> list[Turn]:
    """The turns of a record. UserError for what is no turn, a wrong count of tags, and a clip that would be lost."""
    turns = read_form(record).messages
    clips = {kind: clips_beside(record, kind) for kind in ("video", "image")}
    tagged = any(clips.values())  # in typed parts, tags are tags only where the record names clips beside them
    for turn in turns:
        turn.parts = list(parts_of(turn, tagged))
    for kind, names in clips.items():
        assign_clips(turns, kind, names)
    media = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
    refuse_unread_clips(record, {os.path.basename(path) for part in media for path in part.paths})
    span = {key: record[key] for key in ("video_start", "video_end") if record.get(key) is not None}
    videos = [part for part in media if part.kind == "video"]
    if span and (len(videos) != 1 or span.keys() & videos[0].options.keys()):
        raise UserError(f"{' and '.join(span)} beside {len(videos)} videos; expected one video without its own")
    for video in videos:
        video.options |= span
    return turns


def clips_beside(record: dict, kind: str) -> list:
    """The clips of a kind that a record names beside its messages, each as it names it."""
    names = [record[key] for key in (kind, f"{kind}s") if record.get(key) not in (None, [], "")]
    if len(names) == 2:
        raise UserError(f"got {kind} and {kind}s; expected one of them")
    if not names and record.get("data_type") == kind and record.get("path"):
        names = [record["path"]]
    return names[0] if names and isinstance(names[0], list) else names


def parts_of(turn: Turn, tagged: bool) -> Iterator[str | Media]:
    """Text and clips of one message; a tag, and a part that names no file, as a Media without paths."""
    for part in [turn.content] if isinstance(turn.content, str) else turn.content:
        kind = part.get("type") if isinstance(part, dict) else None
        is_text = kind == "text" and not any(map(part.get, FILE_KEYS[:-1]))  # a file beside it would be lost
        text = first_of(part, "text", "value") if is_text else part
        if isinstance(text, str):
            has_tags = turn.role == "user" and (tagged or text is turn.content)
            pieces = TAG.split(text) if has_tags else [text]  # text, kind, text, kind, text
            yield from (Media(piece, ()) if i % 2 else piece for i, piece in enumerate(pieces) if piece)
        elif kind not in ("image", "video", "image_url", "video_url"):
            raise UserError(f"unknown content part {str(part)[:80]}; expected text, video, image, video_url, image_url")
        elif turn.role != "user":
            raise UserError(f"a video or image in a turn of the {turn.role}; expected it in a user's turn")
        else:
            yield read_media(kind[:5], part, unnamed=True)


def assign_clips(turns: list[Turn], kind: str, names: list) -> None:
    """Put the clips that a record names beside its turns where its tags stand, or before the first question."""
    parts = [part for turn in turns for part in turn.parts]
    media = [part for part in parts if isinstance(part, Media) and part.kind == kind]
    tags = [part for part in media if not part.paths]
    clips = [read_media(kind, name) for name in names]
    files = [path for clip in clips for path in clip.paths]
    are_pictures = all(file.startswith("data:image/") or file.lower().endswith(IMAGE_SUFFIXES) for file in files)
    if kind == "video" and len(tags) <= 1 < len(clips) == len(files) and are_pictures:
        clips = [
            Media(kind, tuple(files), clips[0].options)
        ]  # at most one tag, nothing but pictures: frames of one clip
    question = next((turn for turn in turns if turn.role == "user"), None)
    if clips and not media and question:
        question.parts[:0] = clips
    elif len(tags) != len(clips):
        raise UserError(f"{len(tags)} <{kind}> tag(s) for {len(clips)} {kind}(s); expected one for each, or no tags")
    else:
        for tag, clip in zip(tags, clips):
            tag.paths, tag.options = clip.paths, clip.options | tag.options


def read_media(kind: str, names, unnamed: bool = False) -> Media:
    """names: a file, the frames of a clip, or an object with one of FILE_KEYS and options beside it, as a typed part or
    OpenAI's {"url": name}. unnamed: it may leave its file to the record."""
    options = {}
    while isinstance(names, dict):
        given = {key: value for key, value in names.items() if value not in (None, "")}
        keys = [key for key in FILE_KEYS if key in given]
        # `detail` is OpenAI's price class; options set the size here
        options |= {key: given[key] for key in given if key not in (*keys, "type", "detail")}
        if not keys and unnamed:
            return Media(kind, (), options)
        if len(keys) != 1:
            raise UserError(f"{kind} is {str(names)[:80]!r}; expected one file name")
        names, unnamed = given[keys[0]], False
    files = names if isinstance(names, list) else [names]
    files = [first_of(file, "url", "path") if isinstance(file, dict) else file for file in files]
    if not files or not all(isinstance(name, str) and name for name in files) or (kind == "image" and len(files) > 1):
        raise UserError(f"{kind} is {str(names)[:80]!r}; expected a file name, of a video also a list of frames")
    return Media(kind, tuple(name.removeprefix("file://") for name in files), options)


def refuse_unread_clips(record: dict, read: set[str]) -> None:
    """UserError where a record names a picture or clip in a column that no form knows: it would be lost. Beside clips
    that are read, only in a column whose own name says so, for a file of another name: others may describe the clip."""
    for column in record.keys() - KNOWN_COLUMNS:
        value, is_named = record[column], CLIP_COLUMN.fullmatch(column.lower())
        files = {os.path.basename(name) for name in CLIP_NAME.findall(json.dumps(value, ensure_ascii=False))}
        is_lost = files or (is_named and value and isinstance(value, (str, list, dict)))
        if read:
            is_lost = is_named and files - read
        if is_lost:
            problem = f"its picture or clip seems to stand in the column {column}, which no form of record has"
            raise UserError(f"{problem}; rename the column to video or image, or remove it if it is none")


# -- Names


def record_name(record: dict) -> str:
    """What messages call a record: its id, else its first clip, else the start of its text."""
    name = first_of(record, "id", "problem_id")
    text = first_of(record, *CHATS, *QUESTIONS) or record
    return str(name)[:80] if name is not None else clip_name(record) or json.dumps(text, ensure_ascii=False)[:60]


def sample_name(records: Sequence[dict], i: int) -> str:
    """What messages call sample i of a selection: its number in the file, and its record's name."""
    while isinstance(records, Selection):
        records, i = records.records, records.numbers[i]
    return f"sample {i} ({record_name(records[i])})"


def clip_name(record: dict) -> str | None:
    """The first file that a record's turns name; None for text alone, clips inside the record and a refused one."""
    try:
        turns = read_turns(record)
    except UserError:
        return None
    names = (part.paths[0] for turn in turns for part in turn.parts if isinstance(part, Media))
    return next((name for name in names if not name.startswith("data:")), None)

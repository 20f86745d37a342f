"""A dataset's file -> records, whatever trainer they were written for -> turns of text and clips. Imports no torch.

    read_records(path)    a .json array or a .jsonl file with one object a line
    read_form(record)     messages, clips, solution, options, problem_type: training, rewards and evaluation read this
    read_turns(record)    its turns, each clip in its place

The forms, and the documents that they were read from:

    conversations  LLaVA, 2U1 (its README, Dataset Preparation; for GRPO without tags), LLaMA-Factory sharegpt (its
                   data/README.md): from/value or role/content; `video`, `image` or `videos`, `images`, `system`
    messages       OpenAI (developers.openai.com, guides/vision-fine-tuning) and vLLM: parts, weight 0 = not learned
                   ms-swift (its docs/source_en/Customization/Custom-dataset.md): tags, loss false = not learned
                   TRL (its docs/source/dataset_formats.md): parts {"type": "image"} stand for entries of `images`
                   LLaMA-Factory v1: parts with `value`, `loss_weight`
    conversation   ms-swift sharegpt: [{"human": …, "assistant": …}], `system`
    prompt         TRL: messages or text, with `completion`, which alone is learned, or `solution` for GRPO
    problem        Video-R1 (its src/r1-v/src/open_r1/sft_video.py, without the wording of its prompt): `options`,
                   `problem_type`, `process`, `solution`, `path`, `data_type`
    query          ms-swift query and response; question: question and answer; instruction: Alpaca

One of a list of videos may itself be a list: the frames of a clip. The other keys of a typed part are its own sampling
options. A tag and the line break after it give way to the clip, as in Qwen's own fine-tuning; without tags, clips stand
before the first question. `solution` or `answer` is what the rewards judge by, and what is learned where there is no
other answer.
"""

import json
import math
import random
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from model import UserError, nearest_path

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROLES["developer"] = "system"  # OpenAI's newer word
ANSWERS = ("response", "output", "completion")
SPACE = re.compile(r"[ \t\r\n]*")
TAG = re.compile(r"<(video|image)>\n?")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
VIDEO_SUFFIXES += (".gif", ".m2ts", ".h264", ".hevc")
# Columns that hold a picture or clip in other people's datasets, whatever their value looks like
CLIP_COLUMNS = {f"{kind}{end}" for kind in ("image", "img", "video", "clip", "frame", "picture", "photo", "media")
                for end in ("", "s", "_path", "_paths", "_file", "_files", "_url", "_name")}  # fmt: skip
CLIP_COLUMNS |= {"file_name", "filename", "file_path", "filepath", "visual", "visuals", "pixel_values"}
# Columns that change what a record means and that nothing here reads: where they hold something, the record is refused
UNREAD = ("tools", "audio", "audios", "objects", "chat_template_kwargs", "rejected_response")


# -- A file -> records


class Records(Sequence):
    """Records parsed when they are used. One buffer holds their text: forked workers share it, and it takes no more
    memory than the file."""

    def __init__(self):
        self.data, self.ends = bytearray(), array("Q", [0])

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8")
        self.ends.append(len(self.data))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i):
        """A record; of a slice, a Selection."""
        if isinstance(i, slice):
            return Selection(self, range(len(self))[i])
        i = range(len(self))[i]
        return json.loads(self.data[self.ends[i] : self.ends[i + 1]])


class Selection(Sequence):
    """Some records of a sequence, by number. check: called with (number, record), raises for one not to be used."""

    def __init__(self, records: Sequence[dict], numbers: Iterable[int], check: Callable | None = None):
        self.records, self.check = records, check
        self.numbers = numbers if isinstance(numbers, range) else array("Q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Selection(self.records, self.numbers[i], self.check)
        record = self.records[self.numbers[i]]
        if self.check:
            self.check(self.numbers[i], record)
        return record


def read_records(path: str | Path) -> Records:
    """The records of a .json or .jsonl file. UserError naming file and line for what does not parse."""
    path = Path(path)
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)  # a fifo would block for good
        data = path.read_bytes() if is_file else b""
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", error)
        message = f"{path}: no such file, or not readable ({reason}); expected a .json or .jsonl dataset"
        raise UserError(f"{message}, python generate.py makes one{nearest_path(path)}") from None
    if not is_file:
        raise UserError(f"{path}: not a regular file; expected a .json or .jsonl dataset")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    records, items = Records(), line_items(text) if path.suffix == ".jsonl" else array_items(text)
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
        raise UserError(f"{path}: record {len(records)} {why}; correct or remove it") from None
    if not len(records):
        raise UserError(f"{path}: holds no records; expected at least one")
    return records


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


# -- A record -> messages, and what stands beside them


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str | list  # text, with tags in a user's turn; or typed parts
    trained: bool = True  # of the assistant: whether it is learned


class Conversation(NamedTuple):
    """A record, whatever its form was."""

    messages: list[Message]
    clips: dict  # "video", "image" -> what the record names beside its messages: a name, a list of them, or None
    solution: str | None  # where it stands apart from the messages
    options: list[str]  # lettered, "A. Left"; [] where they are not apart from the question
    problem_type: str  # as Video-R1 has it; "" where there is none


def read_form(record: dict, where: str) -> Conversation:
    """What a record says. UserError, beginning with `where`, for no known form, and for what is not learned here."""
    try:
        return conversation_of(record)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def conversation_of(record: dict) -> Conversation:
    forms = [key for key in FORMS if record.get(key) is not None]
    if not forms:
        names = " ".join(", ".join(map(str, record)).split())[:200] or "none"  # a key may hold line breaks
        raise UserError(f"no known form of record, its keys are: {names}; expected one of {', '.join(FORMS)}")
    if len(chats := [key for key in forms if key in ("conversations", "messages", "conversation")]) > 1:
        raise UserError(f"found {' and '.join(chats)}; expected one of them")
    for key in UNREAD:
        if record.get(key) not in (None, "", [], {}, "[]"):
            raise UserError(f"holds {key}, which nothing here reads; remove it, or leave the record out")
    if record.get("chosen") is not None:
        raise UserError("a preference (chosen, rejected); expected one answer: keep the chosen one as completion")
    if record.get("label") is not None and record["label"] in (False, 0):
        raise UserError(f"label is {record['label']}: a rejected answer; leave it out, or rename the column")
    messages, options, solution = FORMS[forms[0]](record, forms[0]), read_options(record), read_solution(record)
    if solution is not None and messages[-1].role != "assistant":
        messages.append(Message("assistant", solution))
    system = read_text(record, "system")
    if system and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Conversation(messages, read_clips(record), solution, options, read_text(record, "problem_type") or "")


def read_chat(record: dict, form: str) -> list[Message]:
    return message_list(form, record[form])


def read_pairs(record: dict, form: str) -> list[Message]:
    """ms-swift sharegpt."""
    pairs, chat = record[form], []
    for pair in pairs if isinstance(pairs, list) else []:
        says = pair.items() if isinstance(pair, dict) else []
        chat += [{"role": role, "content": text} for role, text in says if text is not None]
    return message_list(form, chat)


def read_prompt(record: dict, form: str) -> list[Message]:
    """TRL. Only the completion is learned, as with its completion_only_loss; the answers of the prompt are history."""
    messages = message_list(form, record[form], "user", trained=False)
    completion = record.get("completion")
    return messages if completion is None else messages + message_list("completion", completion, "assistant")


def read_question(record: dict, form: str) -> list[Message]:
    """Video-R1, query and response, Alpaca: one question, with its options, and at most one answer."""
    question = "\n".join(filter(None, (read_text(record, form), read_text(record, "input"))))
    if options := read_options(record):
        question = "\n".join([question.rstrip("\n"), "Options:", *options])
    answer = next((text for key in ANSWERS if (text := read_text(record, key))), None)
    process, solution = read_text(record, "process"), read_solution(record)
    if answer is None and process and solution:
        answer = f"{process}\n{solution}"  # the reasoning, then the answer in its tags
    messages = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"history holds {str(pair)[:80]}; expected pairs of a question and its answer")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return [*messages, Message("user", question), *([] if answer is None else [Message("assistant", answer)])]


def message_list(name: str, value, role: str = "", trained: bool = True) -> list[Message]:
    """Messages as a list of objects; or, where there is a role for it, a text of that role."""
    if role and isinstance(value, str):
        return [Message(role, value, trained)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} is {str(value)[:80]!r}; expected a list of turns")
    return [read_message(message, trained) for message in value]


def read_message(message, trained: bool) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"a turn is a {type(message).__name__}, expected an object")
    role, content = first_of(message, "from", "role"), first_of(message, "value", "content")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"unknown role {str(role)[:40]!r}; expected human/user, gpt/assistant or system")
    if message.get("tool_calls"):
        raise UserError("a tool call, which is not learned here; leave the record out")
    if not isinstance(content, (str, list)):
        raise UserError(f"the {role}'s turn holds {str(content)[:80]}; expected text or a list of parts")
    for key in ("loss", "weight", "loss_weight"):  # of ms-swift, OpenAI, LLaMA-Factory v1
        weight = message.get(key)
        if weight is not None and weight not in (0, 1):
            raise UserError(f"{key} is {str(weight)[:40]}; expected 0 or 1: an answer is learned whole or not at all")
        trained = trained and weight not in (0,)
    return Message(ROLES[role], content, trained)


def first_of(record: dict, *keys: str):
    """The first value that is there: exports write null for what a record lacks."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def read_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} is a {type(value).__name__}, expected text")
    return value


def read_solution(record: dict) -> str | None:
    """Text or a number; None where there is none."""
    for key in ("solution", "answer"):
        value = record.get(key)
        is_number = type(value) is int or (type(value) is float and math.isfinite(value))
        if not (value is None or isinstance(value, str) or is_number):
            raise UserError(f"{key} is {str(value)[:80]}; expected text or a finite number")
        if value is not None and str(value).strip():
            return str(value)
    return None


def read_options(record: dict) -> list[str]:
    """["A. Left", …]. Options without letters get them."""
    options, letters = record.get("options") or [], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if isinstance(options, dict):
        options = [f"{letter}. {words}" for letter, words in options.items()]
    if not isinstance(options, list) or not all(isinstance(x, str) for x in options) or len(options) > len(letters):
        raise UserError(f"options are {str(options)[:80]}; expected a list of at most {len(letters)} texts")
    lettered = all(re.match(rf"\(?{letter}[.):]", words) for words, letter in zip(options, letters))
    return list(options) if lettered else [f"{letter}. {words}" for letter, words in zip(letters, options)]


def read_clips(record: dict) -> dict:
    clips = {}
    for kind in ("video", "image"):
        names = [key for key in (kind, f"{kind}s") if record.get(key) not in (None, [], "")]
        if len(names) == 2:
            raise UserError(f"found {names[0]} and {names[1]}; expected one of them")
        clips[kind] = first_of(record, *(names or (kind, f"{kind}s")))
    if record.get("problem") is not None and record.get("path"):
        kind = record.get("data_type")
        if kind not in ("video", "image"):
            raise UserError(f"data_type is {str(kind)[:40]!r}; expected video or image beside path")
        clips[kind] = record["path"]
    return clips


FORMS = {  # the key that tells a form, and what reads it; of several that would do, the first counts
    "conversations": read_chat,
    "messages": read_chat,
    "conversation": read_pairs,
    "prompt": read_prompt,
    "problem": read_question,
    "query": read_question,
    "question": read_question,
    "instruction": read_question,
}
KNOWN_COLUMNS = {*FORMS, *ANSWERS, "id", "problem_id", "video", "videos", "image", "images", "system", "solution"}
KNOWN_COLUMNS |= {"answer", "options", "problem_type", "process", "path", "data_type", "input", "history"}


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
    try:
        return turns_of(record, conversation_of(record))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def turns_of(record: dict, talk: Conversation) -> list[Turn]:
    tagged = any(talk.clips.values())  # in typed parts, tags are tags only where the record names clips beside them
    turns = [Turn(m.role, tuple(parts_of(m.role, m.content, tagged)), m.trained) for m in talk.messages]
    for kind, names in talk.clips.items():
        named = [part for turn in turns for part in turn.parts if isinstance(part, Media) and part.kind == kind]
        tag, tags = Media(kind, ()), sum(not part.paths for part in named)
        pool = media_pool(kind, names, tags)
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
        if pool and not named and first is not None:  # before the first question, as with TRL and in 2U1's GRPO sets
            turns[first] = replace(turns[first], parts=(*pool, *turns[first].parts))
        elif tags != len(pool):
            raise UserError(
                f"{tags} <{kind}> tag(s) for {len(pool)} {kind}(s); expected one tag for each, or none at all"
            )
        clips = iter(pool)
        for i, turn in enumerate(turns):
            turns[i] = replace(turn, parts=tuple(next(clips) if part == tag else part for part in turn.parts))
    span = {key: record[key] for key in ("video_start", "video_end") if record.get(key) is not None}
    videos = [part for turn in turns for part in turn.parts if isinstance(part, Media) and part.kind == "video"]
    if span and len(videos) != 1:
        raise UserError(f"{' and '.join(span)} beside {len(videos)} videos; expected one video")
    if span:
        videos[0].options.update(span)
    if not any(isinstance(part, Media) for turn in turns for part in turn.parts):
        refuse_unread_clips(record)
    return turns


def parts_of(role: str, content: str | list, tagged: bool) -> Iterator[str | Media]:
    """Text and clips of one message; a tag, and a part that names no file, as a Media without paths."""
    for part in [content] if isinstance(content, str) else content:
        is_text = isinstance(part, dict) and part.get("type") == "text"
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
        elif kind.endswith("_url"):  # its `detail` is OpenAI's price class; options set the size here
            yield read_media(kind[:5], first_of(part, kind, "value"))
        elif (name := first_of(part, kind, "path")) is None:
            yield Media(kind, ())
        else:
            besides = ("type", "path", "text", "video", "image")
            yield read_media(kind, name, {k: v for k, v in part.items() if v is not None and k not in besides})


def media_pool(kind: str, names, tags: int) -> list[Media]:
    """The clips that a record names beside its turns, in the order of their tags, of which there are `tags`."""
    if names is None or not isinstance(names, list):
        return [] if names is None else [read_media(kind, names)]
    pictures = all(isinstance(name, str) and name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    if kind == "video" and tags <= 1 and names and pictures:
        return [read_media(kind, names)]  # at most one tag, nothing but pictures: the frames of one clip
    return [read_media(kind, name) for name in names]


def read_media(kind: str, names, options: dict | None = None) -> Media:
    # {"url": name} as OpenAI and {"path": name} as Hugging Face's datasets write it
    plain = [first_of(name, "url", "path") if isinstance(name, dict) else name
             for name in (names if isinstance(names, list) else [names])]  # fmt: skip
    if not plain or not all(isinstance(name, str) and name for name in plain) or (kind == "image" and len(plain) > 1):
        expected = "a file name or a list of frames" if kind == "video" else "a file name"
        raise UserError(f"{kind} is {str(names)[:80]!r}; expected {expected}")
    return Media(kind, tuple(name.removeprefix("file://") for name in plain), options or {})


def refuse_unread_clips(record: dict) -> None:
    """UserError where a record names its picture or clip in a column that no form knows: it would be text alone."""
    for column, value in record.items():
        named = column.lower() in CLIP_COLUMNS and isinstance(value, (str, list, dict)) and value
        if column not in KNOWN_COLUMNS and (named or names_clip(value)):
            message = f"its picture or clip seems to stand in the column {column}, which no form of record has"
            raise UserError(f"{message}; rename the column to video or image, or remove it if it is none")


def names_clip(value) -> bool:
    """Whether a value, or anything in it, is the name of a picture's or clip's file."""
    if isinstance(value, (dict, list)):
        return any(map(names_clip, value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str) or "\n" in value:
        return False
    return value.startswith(("data:image/", "data:video/")) or value.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)


# -- Names


def record_name(record: dict) -> str:
    """What messages call a record: its id, else its first clip, else the start of its text."""
    for key in ("id", "problem_id"):
        if record.get(key) is not None:
            return str(record[key])[:80]
    text = next((record[key] for key in FORMS if record.get(key) is not None), record)
    return clip_name(record) or json.dumps(text, ensure_ascii=False)[:60]


def clip_name(record: dict) -> str | None:
    """The first file that a record names, wherever that stands; None for text alone and for clips inside the record."""
    text = json.dumps(record, ensure_ascii=False)
    for key in ("(?:video|image)s?", "path|url|(?:video|image)_url"):
        found = re.search(rf'"(?:{key})": (?:\[+)?("(?!data:)(?:[^"\\]|\\.)+")', text)
        if found:
            return json.loads(found[1])
    return None

"""A dataset's file -> its records, parsed when they are asked for. Memory holds where each begins: 8 bytes a record.

    read_records(path)   .json: one array of objects    .jsonl: one object a line
    Selection            some of them, by number

An array is scanned once when it is opened: every record is parsed, checked and dropped. So is a jsonl file up to
CHECKED_BYTES; of a larger one only the line breaks are looked for, and a line that does not parse is told when it is
used. Threads may share one.
"""

import codecs
import json
import logging
import os
import random
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

from model import UserError, nearest_path

log = logging.getLogger("data")

CHECKED_BYTES = 32 * 2**20  # 0.3 s
PIECE = 2**20  # bytes read at once
# Text and names of files: a thousand times the longest chain of thought. What is longer has lost a quote or a break
MAX_RECORD_BYTES = 16 * 2**20
BOM = codecs.BOM_UTF8
SPACE = re.compile(r"[ \t\r\n]*")


def read_records(path: str | Path) -> "Records":
    """The records of a .json or .jsonl file. UserError naming file and line for what does not parse."""
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", error)
        told = f"{path}: no such file ({reason}); expected a .json or .jsonl dataset{nearest_path(path)}"
        raise UserError(told) from None
    if not stat.S_ISREG(found.st_mode):  # a fifo would block for good
        raise UserError(f"{path}: not a regular file; expected a .json or .jsonl dataset")
    records = Records(path)
    if not len(records):
        raise UserError(f"{path}: holds no records; expected at least one")
    if records.starts[-1] <= CHECKED_BYTES:
        tell_copies(path, records)
    return records


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


class Records(Sequence):
    """The records of a file. Raises UserError, naming the line, for one that is not a JSON object."""

    def __init__(self, path: Path):
        self.path, lines = path, path.suffix == ".jsonl"
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        with open(self.file, "rb", closefd=False) as file:
            self.starts = line_starts(file, path) if lines else array_starts(file, path)
        if lines:
            small = self.starts[-1] <= CHECKED_BYTES
            for i in range(len(self) if small else min(len(self), 1)):
                self[i]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i):
        """A record; of a slice, a Selection."""
        if isinstance(i, slice):
            return Selection(self, range(len(self))[i])
        i = range(len(self))[i]
        data = os.pread(self.file, self.starts[i + 1] - self.starts[i], self.starts[i])
        try:
            return parse(data.rstrip(b", \t\r\n"))
        except (ValueError, RecursionError) as error:
            line = line_of(self.file, self.starts[i])
            raise UserError(f"{self.path}: line {line} {error}; correct or remove it") from None

    def __del__(self):
        if hasattr(self, "file"):
            os.close(self.file)


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


def spread(records: Sequence[dict], wanted: int | None, seed: int) -> Sequence[dict]:
    """`wanted` of the records in their order, spread over all of them by the seed; all where that is not fewer.

    The first ones of a file are no fair sample: files are often sorted by class or by source.
    """
    if wanted is None or wanted >= len(records):
        return records
    return Selection(records, sorted(random.Random(seed).sample(range(len(records)), wanted)))


def parse(data: bytes) -> dict:
    """One record. ValueError or RecursionError, worded to follow "line 3 ", for what is none."""
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start} of it)") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    check_record(record, data)
    return record


def check_record(record, data: bytes | str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, expected an object")
    if ("\\u" if isinstance(data, str) else b"\\u") in data:  # only an escape can make half a character
        try:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a lone \\ud800-\\udfff)") from None


# -- Where records begin: array("Q") of places in bytes, and of the end behind the last one


def line_starts(file, path: Path) -> array:
    """Blank lines are left out: they belong to the line before."""
    starts = array("Q")
    place = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(place)
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) > MAX_RECORD_BYTES:
            told = f"line {line_of(file.fileno(), place)} is longer than {MAX_RECORD_BYTES} bytes"
            raise UserError(f"{path}: {told}; expected one record a line")
        if not line.isspace():
            starts.append(place)
        place += len(line)
    starts.append(place)
    return starts


def array_starts(file, path: Path) -> array:
    """Every record is parsed on the way. UserError naming line and column, or the record's number."""
    starts, text = array("Q"), Text(file, path)
    if text.peek() != "[":
        found = type(text.value()).__name__
        hint = "one record a line is .jsonl, rename it" if text.peek() else "put it into [ ]"
        raise UserError(f"{path}: found a JSON {found}, expected an array of records; {hint}")
    text.at += 1
    closed = text.peek() == "]"
    while not closed:
        text.peek()
        starts.append(text.place)
        record = text.value()
        try:
            check_record(record, text.last)
        except ValueError as error:
            raise UserError(f"{path}: record {len(starts) - 1} {error}; correct or remove it") from None
        sign = text.peek()
        if sign not in (",", "]"):
            text.refuse("Expecting ',' delimiter", text.place)
        closed = sign == "]"
        text.at += not closed
    starts.append(text.place)
    text.at += 1
    if text.peek():
        text.refuse("Extra data", text.place)
    return starts


class Text:
    """A file's bytes as text of one character a byte (JSON's own signs are ASCII), a piece of it at a time."""

    def __init__(self, file, path: Path):
        self.file, self.path, self.utf8 = file, path, codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.start = "", 0, 0  # what is held, where we stand in it, where it begins in the file
        self.last = ""  # the value that was read last
        self.decode = json.JSONDecoder().raw_decode
        while len(self.text) < len(BOM) and self.more():
            pass
        if self.text.startswith(BOM.decode("latin-1")):
            self.at = len(BOM)

    @property
    def place(self) -> int:
        return self.start + self.at

    def more(self) -> bool:
        """Drop what lies behind and read on, as much again as is held. False at the end of the file."""
        piece = self.file.read(max(PIECE, len(self.text) - self.at))
        waiting = self.utf8.getstate()[0]
        try:
            self.utf8.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            byte = self.start + len(self.text) - len(waiting) + error.start
            raise UserError(f"{self.path}: byte {byte} is not UTF-8; save the file as UTF-8") from None
        self.start += self.at
        self.text, self.at = self.text[self.at :] + piece.decode("latin-1"), 0
        return bool(piece)

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self):
        """The value that begins here, in the wrong encoding: only for its form."""
        while True:
            try:
                found, end = self.decode(self.text, self.at)
                self.last, self.at = self.text[self.at : end], end
                return found
            except json.JSONDecodeError as error:  # cut off by the end of what is held, or wrong
                wrong = error.msg, self.start + error.pos
                if len(self.text) - self.at > MAX_RECORD_BYTES or not self.more():
                    self.refuse(*wrong)
            except RecursionError:
                self.refuse("nested too deeply", self.place)
            except ValueError as error:  # a number of more than 4,300 digits
                self.refuse(str(error), self.place)

    def refuse(self, why: str, byte: int):
        line, column = line_of(self.file.fileno(), byte), column_of(self.file.fileno(), byte)
        raise UserError(f"{self.path}: line {line} column {column} is not JSON ({why}); correct it")


def line_of(file: int, byte: int) -> int:
    return 1 + sum(os.pread(file, min(PIECE, byte - at), at).count(b"\n") for at in range(0, byte, PIECE))


def column_of(file: int, byte: int) -> int:
    back = min(byte, PIECE)
    return len(os.pread(file, back, byte - back).rpartition(b"\n")[2]) + 1

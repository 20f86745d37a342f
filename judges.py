"""Typed answers: how one is scored by its record's `problem_type`, from 0 to 1. No torch, no state.

A judge reads the dataset's solution and a completion's answer with the same function. A solution that it cannot read
is refused when the data is loaded; a completion that it cannot read scores 0. docs/data.md has the rules as a table.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

from answers import after_thinking, answer_span, fold, last_block, normalise, plain
from model import UserError


class Judge(NamedTuple):
    expects: str  # what a solution must be, for messages
    read: Callable[[str], Any]  # an answer's text -> its value, None where it cannot be read
    score: Callable[..., float]  # (value of the answer, value of the solution[, duration]) -> 0 to 1
    tag: str = "answer"  # the block that holds it; without one, the answer
    timed: bool = False  # score takes the record's duration too

    def value(self, text: str) -> Any:
        """What a whole completion or solution says, None where it cannot be read."""
        block = None if self.tag == "answer" else last_block(after_thinking(text), self.tag)
        return self.read(block or answer_span(text) or "")


# "-1,200.50e3": a sign, digits with commas as thousands or none, a fraction, a power of ten
NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?"
UNIT = r"%|°?[^\W\d_]*(?:/[^\W\d_]+)?"  # "%", "m", "km/h", "°C"


def read_number(text: str) -> tuple[float, str] | None:
    """A text such as "3.50", "1,200", "-7 %" or "5 m" -> (number, unit); else None, also for words before it."""
    match = re.fullmatch(rf"({NUMBER})\s*({UNIT})\.?", plain(text), re.IGNORECASE)
    value = float(match[1].replace(",", "")) if match else math.nan
    return (value, match[2].casefold()) if math.isfinite(value) else None


def equal_number(said: tuple[float, str], true: tuple[float, str]) -> float:
    """1 for the same number to two places, as Video-R1 compares them, else 0."""
    return float(said[1] in ("", true[1]) and round(said[0], 2) == round(true[0], 2))


def relative_error(said: tuple[float, str], true: tuple[float, str]) -> float:
    """|said - true| / |true|; infinite for another unit, which may be left out, and for all but 0 where 0 is true."""
    if said[1] not in ("", true[1]):
        return math.inf
    difference = abs(said[0] - true[0])
    return difference / abs(true[0]) if true[0] else math.inf if difference else 0.0


def closeness(said: tuple[float, str], true: tuple[float, str]) -> float:
    """1 - relative error, at least 0 (Video-R1's regression)."""
    return 1 - min(1.0, relative_error(said, true))


def mean_relative_accuracy(said: tuple[float, str], true: tuple[float, str]) -> float:
    """The share of VSI-Bench's ten limits that the relative error keeps to."""
    error = relative_error(said, true)
    confidences = [0.5 + i * ((0.95 - 0.5) / 9) for i in range(9)] + [0.95]  # numpy.linspace(0.5, 0.95, 10) bit for bit
    return sum(error <= 1 - confidence for confidence in confidences) / 10


def read_text(text: str) -> str | None:
    return unicodedata.normalize("NFC", text).strip() or None


def read_yes_no(text: str) -> str | None:
    """What an answer such as "Yes, it does." begins with."""
    word = re.match("(yes|no)\\b", plain(text), re.IGNORECASE)
    return word[1].casefold() if word else None


def same_text(said: str, true: str) -> float:
    """1 for the same words without case and marks, or the same number, else 0."""
    if normalise(said) == normalise(true):
        return 1.0
    numbers = read_number(said), read_number(true)
    return float(None not in numbers and relative_error(*numbers) == 0)


def edits(said: list[str], true: list[str], change: int = 1) -> int:
    """The fewest words to insert, to delete and to change, a change counted as so many: Levenshtein's distance."""
    distances = list(range(len(said) + 1))  # of no words of the solution to the first j words said
    for i, word in enumerate(true, 1):
        before, distances[0] = distances[0], i
        for j, other in enumerate(said, 1):
            changed = before + (change if word != other else 0)
            before, distances[j] = distances[j], min(changed, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


def word_accuracy(said: str, true: str) -> float:
    """1 - word error rate, at least 0: words are split at blanks, case counts (Video-R1's OCR)."""
    return max(0.0, 1 - edits(said.split(), true.split()) / len(true.split()))


def read_words(text: str) -> list[str] | None:
    """For ROUGE: runs of letters and digits of any script in lower case; each Chinese character and kana is one."""
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", unicodedata.normalize("NFC", text))
    return re.findall(r"[^\W_]+", spaced.casefold()) or None


def rouge_n(said: list[str], true: list[str], n: int) -> float:
    """F1 of the word n-grams."""
    said, true = (Counter(zip(*(words[i:] for i in range(n)))) for words in (said, true))
    common = (said & true).total()
    return 2 * common / (said.total() + true.total()) if common else 0.0


def rouge_l(said: list[str], true: list[str]) -> float:
    """F1 of the longest common subsequence: what is left when words are only inserted and deleted."""
    return 1 - edits(said, true, change=2) / (len(said) + len(true))


def likeness(said: str, true: str) -> float:
    """The mean of ROUGE-1, ROUGE-2 and ROUGE-L (Video-R1's free-form), without stemming. The same text is 1, also of
    one word, which has no ROUGE-2. A number, a time or a name with initials is right or wrong: 12.48 is not 12.5."""
    if is_fact(true) or same_text(said, true):
        return same_text(said, true)
    said, true = read_words(said) or [], read_words(true) or []
    return (rouge_n(said, true, 1) + rouge_n(said, true, 2) + rouge_l(said, true)) / 3


def is_fact(text: str) -> bool:
    """Whether it is like "12.5", "2:30", "3 m" or "J. R. Smith"."""
    words = plain(text).split() or [""]
    number = words[0].lstrip("-+.(")[:1].isdigit() and len(words) <= 2
    initial = re.fullmatch(r"[^\W\d_]\.", words[0]) and len(words) <= 3
    return bool(number or initial)


TIME = r"[-+]?(?:[0-9]{1,20}:){0,2}[0-9]{0,20}\.?[0-9]{1,20}"  # 7.5, 1:05.5, 1:02:03
PAIR = re.compile(
    rf"(?<![\w.:])({TIME})\s*(?:s|sec|seconds?)?\s*(?:to|and|until|-*>|-|~|,|;)\s*({TIME})", re.IGNORECASE
)
OTHER_UNIT = re.compile(r"%|\b(?:ms|min|mins|minutes?|hours?|frames?)\b", re.IGNORECASE)


def read_time(text: str) -> float:
    """Seconds; not a number where minutes or seconds reach 60."""
    pieces = [float(piece) for piece in text.lstrip("-+").split(":")]
    seconds = sum(piece * 60**i for i, piece in enumerate(reversed(pieces)))
    return math.nan if max(pieces[1:], default=0) >= 60 else -seconds if text[0] == "-" else seconds


def read_spans(text: str) -> list[tuple[float, float]] | None:
    """A text such as "2.5 to 7.5 s", "[2.5, 7.5]", "0:02 - 0:07" or "[(1, 2), (4, 9)]" -> [(start, end)]; None where
    any number of the text is no part of a span, and for a span that ends before it starts."""
    text = fold(text)
    spans = [(read_time(start), read_time(end)) for start, end in PAIR.findall(text)]
    numbers = re.findall(r"[0-9]+(?:[.:][0-9]+)*", text)
    clean = spans and len(numbers) == 2 * len(spans) and not OTHER_UNIT.search(text)
    return spans if clean and all(start <= end < math.inf for start, end in spans) else None


def read_span(text: str) -> list[tuple[float, float]] | None:
    """The same, of exactly one span."""
    spans = read_spans(text)
    return spans if spans and len(spans) == 1 else None


def span_iou(said: list[tuple[float, float]], true: list[tuple[float, float]]) -> float:
    """Seconds that both sets of spans cover over seconds that either covers; the same moments are 1."""
    ends = sorted({end for span in said + true for end in span})
    covers = lambda spans, start, end: any(one <= start and end <= two for one, two in spans)
    both = either = 0.0
    for start, end in zip(ends, ends[1:]):
        covered = covers(said, start, end), covers(true, start, end)
        both += (end - start) * all(covered)
        either += (end - start) * any(covered)
    return both / either if either else float(set(said) == set(true))


def span_iou_by_duration(said: list[tuple[float, float]], true: list[tuple[float, float]], duration: float) -> float:
    """Of one span each, Time-R1's: IoU x (1 - error of start / duration) x (the same of the end), each at least 0."""
    start, end = (max(0.0, 1 - abs(one - two) / duration) for one, two in zip(said[0], true[0]))
    return span_iou(said, true) * start * end


def to_box(value: Any) -> tuple[float, ...] | None:
    """[x1, y1, x2, y2], finite, x1 <= x2, y1 <= y2, else None."""
    number = lambda x: type(x) in (int, float) and abs(x) < 1e30  # json reads NaN and 400 digits too
    if not isinstance(value, list) or len(value) != 4 or not all(map(number, value)):
        return None
    return tuple(value) if value[0] <= value[2] and value[1] <= value[3] else None


def read_boxes(text: str, timed: bool = False) -> dict | None:
    """{"boxes": {"1": box, …}}, a list of boxes, or one box -> {key: box, None where it is none}.

    timed: with "time": its span, None where there is none.
    """
    try:
        value = json.loads(text.strip().strip("`").removeprefix("json"))
    except (ValueError, RecursionError):
        return None
    value = value if isinstance(value, dict) else {"boxes": value}
    boxes = value.get("boxes", value)
    if isinstance(boxes, list):
        one = len(boxes) == 4 and not isinstance(boxes[0], list)
        boxes = {"1": boxes} if one else {str(i): box for i, box in enumerate(boxes, 1)}
    boxes = {key.strip(): to_box(box) for key, box in boxes.items()} if isinstance(boxes, dict) else {}
    return (boxes | {"time": read_span(str(value.get("time")))} if timed else boxes) or None


def read_box(text: str) -> dict | None:
    """The same, of exactly one box."""
    boxes = read_boxes(text)
    return boxes if boxes and len(boxes) == 1 else None


def box_iou(said: tuple[float, ...] | None, true: tuple[float, ...]) -> float:
    """Area of the overlap over that of the union; 0 without a box, 1 for the same box."""
    if said is None or said == true:
        return float(said == true)
    width, height = (max(0.0, min(said[i + 2], true[i + 2]) - max(said[i], true[i])) for i in (0, 1))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    union = area(said) + area(true) - width * height
    return width * height / union if union else 0.0


def boxes_iou(said: dict, true: dict) -> float:
    """The mean over the solution's boxes, 0 for one that is not given; with a time, half of it is for the span."""
    boxes = [box_iou(said.get(key), box) for key, box in true.items() if key != "time"]
    mean = sum(boxes) / len(boxes)
    if "time" not in true:
        return mean
    return (mean + (span_iou(said["time"], true["time"]) if said["time"] else 0.0)) / 2


OPEN = Judge("text", read_text, same_text)
FREE_FORM = Judge("text", read_text, likeness)
SPAN = Judge('one time span, such as "2.5 to 7.5"', read_span, span_iou)
SPANS = Judge('time spans, such as "[[0, 2], [8, 10]]"', read_spans, span_iou, tag="glue")
BOX = Judge('{"boxes": [x1, y1, x2, y2]}', read_box, boxes_iou)
TRACK = Judge('{"boxes": {"1": [x1, y1, x2, y2], …}}', read_boxes, boxes_iou)
TUBE = Judge('{"time": [start, end], "boxes": {…}}', partial(read_boxes, timed=True), boxes_iou)
MRA = Judge("a number", read_number, mean_relative_accuracy)
JUDGES = {  # None: an option, answers.py's
    "multiple choice": None,
    "yes or no": Judge("yes or no", read_yes_no, same_text),
    "numerical": Judge("a number", read_number, equal_number),
    "regression": Judge("a number", read_number, closeness),
    "MRA": MRA,
    "VSI": MRA,
    "OCR": Judge("text", read_text, word_accuracy),
    "free-form": FREE_FORM,
    "open-ended": FREE_FORM,
    "ROUGE-L": Judge("text", read_words, rouge_l),
    "temporal grounding": SPAN,
    "timestamp": SPAN,
    "time span": SPAN,
    "timestamp tIoU": SPAN._replace(score=span_iou_by_duration, timed=True),
    "span set": SPANS,
    "glue": SPANS,
    "spatial grounding": BOX,
    "box": BOX,
    "tracking": TRACK,
    "spatial-temporal grounding": TUBE,
    "spatial-temporal": TUBE,
}


@lru_cache
def judge_for(problem_type: str) -> Judge | None:
    """The judge of a `problem_type`, in any case, with blanks or hyphens; None for multiple choice. "" is an open
    question: the same text, or not. UserError for an unknown one."""
    letters_of = lambda name: "".join(filter(str.isalnum, name.casefold()))
    judges = {letters_of(name): judge for name, judge in JUDGES.items()} | {"": OPEN}
    if letters_of(problem_type) not in judges:
        raise UserError(f"problem_type is {problem_type[:40]!r}, expected one of {', '.join(JUDGES)}")
    return judges[letters_of(problem_type)]


def is_whole(value: Any) -> bool:
    """Whether a solution was read, all boxes of it."""
    return value is not None and not (isinstance(value, dict) and (None in value.values() or set(value) == {"time"}))

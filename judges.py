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
UNIT = r"%|[^\W\d_]*(?:/[^\W\d_]+)?"  # "%", "m", "km/h"


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


def word_accuracy(said: str, true: str) -> float:
    """1 - word error rate, at least 0: words are split at blanks, case counts (Video-R1's OCR)."""
    said, true = said.split(), true.split()
    distances = list(range(len(said) + 1))  # of no words of the solution to the first j words said
    for i, word in enumerate(true, 1):
        before, distances[0] = distances[0], i
        for j, other in enumerate(said, 1):
            change = before + (word != other)
            before, distances[j] = distances[j], min(change, distances[j] + 1, distances[j - 1] + 1)
    return max(0.0, 1 - distances[-1] / len(true))


def read_words(text: str) -> list[str] | None:
    """For ROUGE: runs of letters and digits of any script in lower case; each Chinese character and kana is one."""
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", unicodedata.normalize("NFC", text))
    return re.findall(r"[^\W_]+", spaced.casefold()) or None


def f1(common: int, said: int, true: int) -> float:
    return 2 * common / (said + true) if common else 0.0


def rouge_n(said: list[str], true: list[str], n: int) -> float:
    """F1 of the word n-grams."""
    said, true = (Counter(zip(*(words[i:] for i in range(n)))) for words in (said, true))
    return f1((said & true).total(), said.total(), true.total())


def rouge_l(said: list[str], true: list[str]) -> float:
    """F1 of the longest common subsequence of words."""
    lengths = [0] * (len(said) + 1)
    for word in true:
        before = 0
        for j, other in enumerate(said, 1):
            before, lengths[j] = lengths[j], before + 1 if word == other else max(lengths[j], lengths[j - 1])
    return f1(lengths[-1], len(said), len(true))


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


TIME = r"[-+]?(?:[0-9]+:){0,2}[0-9]*\.?[0-9]+"  # 7.5, 1:05.5, 1:02:03
PAIR = re.compile(rf"(?<![\w.:])({TIME})\s*(?:s|sec|seconds?)?\s*(?:to|and|until|->|-|~|,|;)\s*({TIME})", re.IGNORECASE)
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


def read_span(text: str) -> tuple[float, float] | None:
    """The same, of exactly one span."""
    spans = read_spans(text)
    return spans[0] if spans and len(spans) == 1 else None


def span_iou(said: tuple[float, float], true: tuple[float, float]) -> float:
    """Overlap over the distance from the first start to the last end; two equal moments are 1."""
    if said == true:
        return 1.0
    overlap = min(said[1], true[1]) - max(said[0], true[0])
    return max(0.0, overlap) / (max(said[1], true[1]) - min(said[0], true[0]))


def span_iou_by_duration(said: tuple[float, float], true: tuple[float, float], duration: float) -> float:
    """Time-R1's: IoU x (1 - error of the start / duration) x (the same of the end), each at least 0."""
    start, end = (max(0.0, 1 - abs(one - two) / duration) for one, two in zip(said, true))
    return span_iou(said, true) * start * end


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    result = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            start, end = result[-1][0], max(result.pop()[1], end)
        result.append((start, end))
    return result


def span_set_iou(said: list[tuple[float, float]], true: list[tuple[float, float]]) -> float:
    """Seconds that both sets cover over seconds that either covers."""
    said, true = merged(said), merged(true)
    if said == true:
        return 1.0
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in said for b in true)
    either = sum(end - start for start, end in said + true) - both
    return both / either if either else 0.0


def read_json(text: str) -> Any:
    try:
        return json.loads(text.strip().strip("`").removeprefix("json"))
    except (ValueError, RecursionError):
        return None


def to_box(value: Any) -> tuple[float, ...] | None:
    """[x1, y1, x2, y2], finite, x1 <= x2, y1 <= y2, else None."""
    number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e30
    if not isinstance(value, list) or len(value) != 4 or not all(map(number, value)):
        return None
    return tuple(value) if value[0] <= value[2] and value[1] <= value[3] else None


def read_boxes(text: str, timed: bool = False) -> dict | None:
    """{"boxes": {"1": box, …}}, a list of boxes, or one box -> {key: box, None where it is none}.

    timed: with "time": its span, None where there is none.
    """
    value = read_json(text)
    value = value if isinstance(value, dict) else {"boxes": value}
    boxes = value.get("boxes", value)
    if isinstance(boxes, list):
        one = len(boxes) == 4 and not isinstance(boxes[0], list)
        boxes = {"1": boxes} if one else {str(i): box for i, box in enumerate(boxes, 1)}
    boxes = {key.strip(): to_box(box) for key, box in boxes.items()} if isinstance(boxes, dict) else {}
    return (boxes | {"time": read_span(str(value.get("time")))} if timed else boxes) or None


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
SPANS = Judge('time spans, such as "[[0, 2], [8, 10]]"', read_spans, span_set_iou, tag="glue")
BOX = Judge('{"boxes": [x1, y1, x2, y2]}', read_boxes, boxes_iou)
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

"""Typed answers: how one is scored by its record's `problem_type`, from 0 to 1. No torch, no state.

A judge reads the dataset's solution and a completion's answer with the same function. A solution that it cannot read
is refused when the data is loaded; a completion that it cannot read scores 0. docs/data.md has the rules as a table.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unicodedata import normalize

from answers import after_thinking, answer_span, fold, last_block, normalise, plain
from model import UserError


class Judge(NamedTuple):
    expects: str  # what a solution must be, for messages
    read: Callable[[str], Any]  # an answer's text -> its value, None where it cannot be read
    score: Callable[..., float]  # (value of the answer, value of the solution[, duration]) -> 0 to 1
    timed: bool = False  # score takes the record's duration too

    def value(self, text: str) -> Any:
        """What a whole completion or solution says, in <glue> or as its answer; None where it cannot be read."""
        return self.read(last_block(after_thinking(text), "glue") or answer_span(text) or "")


# -- Numbers

# "-1,200.50e3": a sign, digits with commas as thousands or none, a fraction, a power of ten
NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?(?:e[-+]?[0-9]+)?"
UNIT = r"%|°?[^\W\d_]*(?:/[^\W\d_]+)?"  # "%", "m", "km/h", "°C"


def read_number(text: str) -> tuple[float, str] | None:
    """A text such as "3.50", "1,200", "-7 %" or "5 m" -> (number, unit); None also for words before it."""
    match = re.fullmatch(rf"({NUMBER})\s*({UNIT})\.?", plain(text), re.IGNORECASE)
    value = float(match[1].replace(",", "")) if match else math.nan
    return (value, match[2].casefold()) if math.isfinite(value) else None


def number_judge(rule: Callable[[float, float], float]) -> Judge:
    """rule: (number said, true number) -> 0 to 1. A unit may be left out; another one is wrong."""
    return Judge("a number", read_number, lambda p, t: float(p[1] in ("", t[1]) and rule(p[0], t[0])))


def relative_error(said: float, true: float) -> float:
    """|said - true| / |true|; where 0 is true, infinite for all else."""
    difference = abs(said - true)
    return difference / abs(true) if true else math.inf if difference else 0.0


def mean_relative_accuracy(said: float, true: float) -> float:
    """The share of VSI-Bench's ten limits that the relative error keeps to."""
    confidences = [0.5 + i * ((0.95 - 0.5) / 9) for i in range(9)] + [0.95]  # numpy.linspace(0.5, 0.95, 10) bit for bit
    return sum(relative_error(said, true) <= 1 - confidence for confidence in confidences) / 10


# -- Text


def read_words(text: str) -> list[str]:
    """For ROUGE: runs of letters and digits of any script in lower case; each Chinese character and kana is one."""
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", normalize("NFC", text))
    return re.findall(r"[^\W_]+", spaced.casefold())


def same_text(said: str, true: str) -> float:
    """1 for the same words without case and marks, or the same number, else 0."""
    p, t = read_number(said), read_number(true)
    return float(normalise(said) == normalise(true) or bool(p and t and p[0] == t[0] and p[1] in ("", t[1])))


def edits(said: list[str], true: list[str], change: int = 1) -> int:
    """The fewest words to insert, to delete and to change, a change counted as so many: Levenshtein's distance."""
    distances = list(range(len(said) + 1))  # of no words of the solution to the first j words said
    for i, word in enumerate(true, 1):
        before, distances[0] = distances[0], i
        for j, other in enumerate(said, 1):
            changed = before + (change if word != other else 0)
            before, distances[j] = distances[j], min(changed, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


def rouge(said: str, true: str) -> list[float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, without stemming: F1 of single words, of pairs, and of the longest common
    subsequence, which is what is left when words are only inserted and deleted."""
    said, true = read_words(said), read_words(true)
    scores = []
    for grams in (lambda words: words, lambda words: zip(words, words[1:])):
        one, two = Counter(grams(said)), Counter(grams(true))
        scores.append(2 * (one & two).total() / max(1, one.total() + two.total()))
    return [*scores, 1 - edits(said, true, change=2) / max(1, len(said) + len(true))]


RIGHT_OR_WRONG = re.compile(r"[-+.(]*[0-9]\S*(?: \S+)?|[^\W\d_]\.(?: \S+){0,2}")  # "12.5", "2:30", "3 m", "J. Smith"


def likeness(said: str, true: str) -> float:
    """The mean of ROUGE-1, -2 and -L (Video-R1's free-form); the same text is 1, also of one word. A number, a time or
    a name with initials is right or wrong."""
    if same_text(said, true) or RIGHT_OR_WRONG.fullmatch(plain(true)):
        return same_text(said, true)
    return sum(rouge(said, true)) / 3


# -- Time spans

TIME = r"[-+]?(?:[0-9]{1,20}:){0,2}[0-9]{0,20}\.?[0-9]{1,20}"  # 7.5, 1:05.5, 1:02:03
BETWEEN = r"\s*(?:s|secs?|seconds?)?\s*(?:to|and|until|-*>|→|-|~|,|;)\s*"
PAIR = re.compile(rf"(?<![\w.:])({TIME}){BETWEEN}({TIME})", re.IGNORECASE)
OTHER_UNIT = re.compile(r"%|\b(?:ms|min|mins|minutes?|hours?|frames?)\b", re.IGNORECASE)


def read_time(text: str) -> float:
    """Seconds; not a number where minutes or seconds reach 60."""
    pieces = [float(piece) for piece in text.lstrip("-+").split(":")]
    seconds = sum(piece * 60**i for i, piece in enumerate(reversed(pieces)))
    return math.nan if max(pieces[1:], default=0) >= 60 else -seconds if text[0] == "-" else seconds


def read_spans(text: str, most: float = math.inf) -> list[tuple[float, float]] | None:
    """A text such as "2.5 to 7.5 s", "[2.5, 7.5]", "0:02 - 0:07" or "[(1, 2), (4, 9)]" -> [(start, end)]; None where
    any number of it is no part of a span, for a span that ends before it starts, and for more than `most`."""
    text = fold(text)
    spans = [(read_time(start), read_time(end)) for start, end in PAIR.findall(text)]
    numbers = re.findall(r"[0-9]+(?:[.:][0-9]+)*", text)
    clean = 0 < len(spans) <= most and len(numbers) == 2 * len(spans) and not OTHER_UNIT.search(text)
    return spans if clean and all(start <= end < math.inf for start, end in spans) else None


def span_iou(said: list, true: list) -> float:
    """Seconds that both sets of spans cover over seconds that either covers; the same moments are 1."""
    ends = sorted({end for span in said + true for end in span})
    both = either = 0.0
    for start, end in zip(ends, ends[1:]):
        covered = [any(one <= start and end <= two for one, two in spans) for spans in (said, true)]
        both += (end - start) * all(covered)
        either += (end - start) * any(covered)
    return both / either if either else float(set(said) == set(true))


def span_iou_by_duration(said: list, true: list, duration: float) -> float:
    """Of one span each, Time-R1's: IoU x (1 - error of start / duration) x (the same of the end), each at least 0."""
    start, end = (max(0.0, 1 - abs(one - two) / duration) for one, two in zip(said[0], true[0]))
    return span_iou(said, true) * start * end


# -- Boxes


def read_box(value: Any) -> tuple | None:
    """[x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, else None."""
    number = lambda x: type(x) in (int, float) and abs(x) < 1e30  # json reads NaN and 400 digits too
    if not isinstance(value, list) or len(value) != 4 or not all(map(number, value)):
        return None
    return tuple(value) if value[0] <= value[2] and value[1] <= value[3] else None


def read_boxes(text: str, most: float = math.inf, timed: bool = False) -> dict | None:
    """{"boxes": {"1": box, …}}, a list of boxes, or one box -> {key: box, None where it is none}; None for more than
    `most`. timed: with "time": [its span], None where there is none."""
    try:
        value = json.loads(text.strip().strip("`").removeprefix("json"))
    except (ValueError, RecursionError):
        return None
    value = value if isinstance(value, dict) else {"boxes": value}
    boxes = value.get("boxes", value)
    if isinstance(boxes, list):
        is_one = len(boxes) == 4 and not isinstance(boxes[0], list)
        boxes = {str(i): box for i, box in enumerate([boxes] if is_one else boxes, 1)}
    boxes = {key.strip(): read_box(box) for key, box in boxes.items()} if isinstance(boxes, dict) else {}
    if timed:
        boxes["time"] = read_spans(str(value.get("time")), most=1)
    return boxes if 0 < len(boxes) <= most else None


def box_iou(said: tuple | None, true: tuple) -> float:
    """Area of the overlap over that of the union; 0 without a box, 1 for the same box."""
    if said is None or said == true:
        return float(said == true)
    width, height = (max(0.0, min(said[i + 2], true[i + 2]) - max(said[i], true[i])) for i in (0, 1))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    union = area(said) + area(true) - width * height
    return width * height / union if union else 0.0


def boxes_iou(said: dict, true: dict) -> float:
    """The mean over the solution's boxes, 0 for one that is not given; with a time, half of it is for the span."""
    ious = [box_iou(said.get(key), box) for key, box in true.items() if key != "time"]
    mean = sum(ious) / len(ious)
    return (mean + span_iou(said["time"] or [], true["time"])) / 2 if "time" in true else mean


# -- The table

read_text = lambda text: normalize("NFC", text).strip() or None
YES_NO = re.compile(r"(yes|no)\b(?!\s*(?:/|or\b|and\b)\s*(?:yes|no)\b)")  # the first word, but not "yes or no"
read_yes_no = lambda text: (match := YES_NO.match(plain(text).casefold())) and match[1]
SPAN = Judge('one time span, such as "2.5 to 7.5"', partial(read_spans, most=1), span_iou)
TUBE = Judge('{"time": [start, end], "boxes": {…}}', partial(read_boxes, timed=True), boxes_iou)
TABLE = {
    "multiple choice": None,  # an option, answers.py's
    "": Judge("text", read_text, same_text),  # an open question without a type
    "yes or no": Judge("yes or no", read_yes_no, same_text),
    "numerical": number_judge(lambda p, t: round(p, 2) == round(t, 2)),  # as Video-R1 compares them
    "regression": number_judge(lambda p, t: 1 - min(1.0, relative_error(p, t))),  # Video-R1's
    "MRA, VSI": number_judge(mean_relative_accuracy),
    # 1 - word error rate, case counts: Video-R1's
    "OCR": Judge("text", read_text, lambda p, t: max(0.0, 1 - edits(p.split(), t.split()) / len(t.split()))),
    "free-form, open-ended": Judge("text", read_text, likeness),
    "ROUGE-L": Judge("text", lambda text: text if read_words(text) else None, lambda p, t: rouge(p, t)[2]),
    "temporal grounding, timestamp, time span": SPAN,
    "timestamp tIoU": SPAN._replace(score=span_iou_by_duration, timed=True),
    "span set, glue": Judge('time spans, such as "[[0, 2], [8, 10]]"', read_spans, span_iou),
    "spatial grounding, box": Judge('{"boxes": [x1, y1, x2, y2]}', partial(read_boxes, most=1), boxes_iou),
    "tracking": Judge('{"boxes": {"1": [x1, y1, x2, y2], …}}', read_boxes, boxes_iou),
    "spatial-temporal, spatial-temporal grounding": TUBE,
}
JUDGES = {name: judge for names, judge in TABLE.items() for name in names.split(", ")}


@lru_cache
def judge_for(problem_type: str) -> Judge | None:
    """The judge of a `problem_type`, in any case, with blanks or hyphens; None for multiple choice. UserError for an
    unknown one."""
    letters_of = lambda name: "".join(filter(str.isalnum, name.casefold()))
    judges = {letters_of(name): judge for name, judge in JUDGES.items()}
    if letters_of(problem_type) not in judges:
        raise UserError(f"problem_type is {problem_type[:40]!r}, expected one of {', '.join(filter(None, JUDGES))}")
    return judges[letters_of(problem_type)]

"""Rewards: the text of a completion -> numbers. No torch, no state; each part is scored and logged apart.

A reward is a plain function `name(text, sample) -> float` of the completion's text and its `Sample`. Shipped are
accuracy, format, length, repetition and temporal. Add your own with `--rewards accuracy,format,my_rewards.py:name`.

How an answer is read (`extract_answer`), shared by the rewards, the evaluation and infer.py:
  1. What stands inside <think> is ignored, also when the block was never closed.
  2. The answer stands in the last <answer> block; without one, after the last "Answer:"; without that, in the last
     line that names an option.
  3. There, the last option named counts, by its letter, "(A)", or by its words, "Left to Right", in any case.
  4. A letter owns the text up to the next letter: if that text names another option, as in "(A) Right to Left", the
     answer contradicts itself and counts as none, so it is never right. So does a letter that no option has.
"""

import difflib
import importlib.util
import math
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from pathlib import Path

from dataset.forms import read_form
from model import UserError, nearest_path


@dataclass
class Sample:
    """What a reward may know besides the completion's text.

    options: label -> words, read from the question where not given; {} for an open question.
    problem_type: the record's, as Video-R1 writes it; "numerical" compares numbers.
    n_tokens, max_tokens: length of this completion and the limit it was sampled under, in tokens (0: not known).
    truncated: the completion reached the limit without its end token.
    context: facts about the whole group that this completion belongs to, see `group_context`.
    """

    question: str
    answer: str
    options: dict[str, str] | None = None
    problem_type: str = ""
    n_tokens: int = 0
    max_tokens: int = 0
    truncated: bool = False
    context: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.options is None:
            # A question without a list may still have an answer with label and words, "(A) Left to Right".
            self.options = parse_options(self.question)
            if not self.options and self.problem_type in ("", "multiple choice"):
                self.options = parse_options(answer_span(self.answer) or "", least=1)


def sample_from_record(record: dict) -> Sample:
    """A dataset record, in any of the forms of dataset/forms.py -> Sample of its last question and its answer: the
    solution where that stands apart, else the last answer.

    Raises UserError when the record has no question or no answer.
    """
    talk = read_form(record, "record")
    said = {message.role: plain_text(message.content) for message in talk.messages}  # the last of each
    question, answer = said.get("user"), talk.solution or said.get("assistant")
    if question is None or not answer:
        missing = "question (human or user turn)" if question is None else "answer (gpt or assistant turn, or solution)"
        raise UserError(f"record has no {missing}: {_short(str(record))}")
    problem_type = record["problem_type"] if isinstance(record.get("problem_type"), str) else ""
    return Sample(question, answer, parse_options("\n".join(talk.options)) or None, problem_type)


def plain_text(content: str | list) -> str:
    """Of typed parts, those of text."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "\n".join(text for text in texts if isinstance(text, str))


# --- reading options and answers -----------------------------------------------------------------------------------

SPECIAL = re.compile(r"<\|[^|<>]*\|>")  # <|im_end|> and its like are no words of the answer
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("、"): ord("."), 0x3000: ord(" ")}
LABEL = r"([A-Za-z]|[0-9]{1,2})"
# The ways to write an option's label. One list keeps to one way.
PAREN = re.compile(rf"(?<!\w)\(\s*{LABEL}\s*\)")  # (A)
BRACKET = re.compile(rf"(?<!\w)\[\s*{LABEL}\s*\]")  # [A]
BARE = [re.compile(rf"(?<![\w.]){LABEL}{mark}(?=\s|[^\W\d])") for mark in (r"\.", r"\)", ":")]  # A.  A)  A:
LINE_START = re.compile(r"[\s\-•·]*")  # what may stand before the first label of a line: a bullet


@dataclass(frozen=True)
class Mark:
    """A label found in a question. start, end: where it stands; at_line_start: only a bullet is before it."""

    label: str
    start: int
    end: int
    at_line_start: bool


def parse_options(question: str, least: int = 2) -> dict[str, str]:
    """Question text -> {label: words} in the order given, {} where there is no list of at least `least` options.

    A list has labels of one way of writing in rising order, each with words behind it: one a line, or several a line.
    Of several lists that with most labels at line starts counts, then the longest, then the last. Letters without
    parentheses must begin at A, numbers at 1: "J. Smith", "2:30" and "12.5" begin no list.
    """
    text = fold(question).replace("*", "")
    lists = [options for marks in all_marks(text) for options in lists_of(text, marks, least)]
    return max(enumerate(lists), key=lambda item: (item[1][0], item[0]), default=(0, (0, {})))[1][1]


def all_marks(text: str) -> list[list[Mark]]:
    """The labels of each way of writing, in the order of the text; numbers and letters apart."""
    found = []
    for pattern in (*reversed(BARE), BRACKET, PAREN):
        marks = []
        for match in pattern.finditer(text):
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
            marks.append(Mark(match[1].upper(), match.start(), match.end(), bool(LINE_START.fullmatch(before))))
        if pattern in BARE:
            marks = [mark for mark in marks if mark.at_line_start or text[mark.start].isupper()]
        found += [[mark for mark in marks if mark.label.isdigit()], [mark for mark in marks if mark.label.isalpha()]]
    return found


def lists_of(text: str, marks: list[Mark], least: int) -> list[tuple[tuple, dict[str, str]]]:
    """Every list that starts at one of the marks: ((labels at line starts, labels), {label: words})."""
    found = []
    for i, first in enumerate(marks):
        bracketed = text[first.start] in "(["
        if not (first.label in ("A", "1") or (bracketed and first.at_line_start)):
            continue
        if least < 2 and not (bracketed and text[first.start + 1].isupper()):
            continue  # an answer "(A) left" is an option, "12.5", "J. Smith" and "(c) 2020" are not
        chain = [first]
        while (following := next_mark(chain[-1], marks[i + 1 :], first.at_line_start)) is not None:
            chain.append(following)
        options = words_of(text, chain)
        consecutive = all(rank(two) == rank(one) + 1 for one, two in zip(chain, chain[1:]))
        if not bracketed and (not consecutive or asks_below(text, chain[-1]) or not text[: first.start].strip()):
            continue  # a dialogue, chess moves, subtitles: the question comes after them, or there is none
        dotted_in_line = text[first.end - 1] == "." and not all(mark.at_line_start for mark in chain)
        if dotted_in_line and len(chain) < 3 and not text[: first.start].rstrip().endswith(("?", ":")):
            continue  # "A. Smith and B. Jones meet. Who speaks?" within a sentence
        if len(options) >= least:
            found.append(((sum(mark.at_line_start for mark in chain), len(options)), options))
    return found


def asks_below(text: str, last: Mark) -> bool:
    """Whether a question stands in a line below the last label: options without brackets stand behind the question."""
    return any(line.rstrip().endswith("?") for line in text[last.end :].split("\n")[1:])


def next_mark(last: Mark, marks: list[Mark], by_lines: bool) -> Mark | None:
    """The label that follows: the next letter or number, at a line start if the list began at one and there is such a
    label; a label of another order, as in "(C) both (A) and (B)", belongs to the option's words."""
    later = [mark for mark in marks if mark.start > last.start]
    if by_lines:
        risen = [mark for mark in later if mark.at_line_start and rank(mark) > rank(last)]
        if risen and (rank(risen[0]) == rank(last) + 1 or not follows_inline(last, later, risen[0])):
            return risen[0]
    return next((mark for mark in later if rank(mark) == rank(last) + 1), None)


def follows_inline(last: Mark, later: list[Mark], limit: Mark) -> bool:
    return any(rank(mark) == rank(last) + 1 and mark.start < limit.start for mark in later)


def rank(mark: Mark) -> int:
    return int(mark.label) if mark.label.isdigit() else ord(mark.label)


def words_of(text: str, chain: list[Mark]) -> dict[str, str]:
    """{label: words up to the next label or the line's end}, {} if a label has no words of its own."""
    options = {}
    for mark, following in zip(chain, [*chain[1:], None]):
        line_end = text.find("\n", mark.end)
        end = min(following.start if following else len(text), line_end if line_end >= 0 else len(text))
        if not text[mark.end : end].strip():  # the label has a line of its own, its words the next one
            end = following.start if following else len(text)
            end = min(end, mark.end + len(text[mark.end : end]) - len(text[mark.end : end].lstrip().partition("\n")[2]))
        words = " ".join(text[mark.end : end].split())
        if following and not following.at_line_start:
            words = words.removesuffix(" or").removesuffix(" and")
        words = words.rstrip(" ,;.") or words
        words = words.removesuffix("?") if not following and not mark.at_line_start else words
        if not words.strip(" ,;.:/?!") or words.casefold() in ("or", "and"):
            return {}
        options[mark.label] = words
    return options


def after_thinking(text: str) -> str:
    """What follows the reasoning. The opening tag may be missing (it stood in the prompt), or the closing one (cut)."""
    text = SPECIAL.sub("", text)
    return text.rpartition("</think>")[2].partition("<think>")[0]


def answer_spans(text: str) -> list[str]:
    """Where the answer may stand, the most binding place first."""
    said = after_thinking(text)
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)(?:</answer>|$)", said, re.DOTALL | re.IGNORECASE)
    if tagged:
        return tagged[-1:]
    # "Answer: …" or "the answer is …": to the end of the line, or the next line when nothing stands beside it.
    named = re.findall(r"\banswer(?:\s+is\b\s*:?|\W{0,3}:)[*\s]*([^\n]*)", said, re.IGNORECASE)
    return named[::-1] + said.strip().split("\n")[::-1]


def answer_span(text: str) -> str | None:
    """The answer's own words, "(A) Left to Right", without reasoning and tags; None where nothing was said."""
    return next((span.strip() for span in answer_spans(text) if span.strip()), None)


def extract_answer(text: str, options: dict[str, str]) -> str | None:
    """Completion -> label of the option it settles on; without options, its answer's words, normalised.

    None where there is no answer, or one that contradicts itself (module docstring, 4).
    """
    return cached_answer(text, tuple(options.items()))


@lru_cache(4096)  # a group's reference and each completion are read several times a step
def cached_answer(text: str, options: tuple[tuple[str, str], ...]) -> str | None:
    options = dict(options)
    if not options:
        return plain(answer_span(text) or "").casefold().strip(" ,;:!").rstrip(" .,;:!") or None
    for span in answer_spans(text):
        named, label = named_option(span, options)
        if named:
            return label
    return None


def reference_answer(sample: Sample) -> str | None:
    """The dataset's answer, in the form of `extract_answer`; None where it cannot be read (count and name those)."""
    if is_numerical(sample) and read_number(answer_span(sample.answer)) is None:
        return None
    return extract_answer(sample.answer, sample.options)


def is_numerical(sample: Sample) -> bool:
    return sample.problem_type == "numerical" and not sample.options


def is_correct(text: str, sample: Sample) -> bool:
    """Completion against the dataset's answer. Raises UserError when that answer itself cannot be read."""
    reference = reference_answer(sample)
    if reference is None:
        options = ", ".join(f"({label}) {words}" for label, words in sample.options.items()) or "none"
        raise UserError(f"dataset's answer cannot be read: {_short(sample.answer)}; options of its question: {options}")
    if is_numerical(sample):
        value = read_number(answer_span(text))
        return value is not None and same_number(value, read_number(answer_span(sample.answer)))
    return extract_answer(text, sample.options) == reference


def read_number(text: str | None) -> tuple[float, str] | None:
    """"3.50", "1,200", "-7 %" or "5 m" -> (number, unit); None for anything else, also for words before a number."""
    sign, whole, point = r"([-+−]?)", r"([0-9][0-9,]*|)", r"(\.[0-9]+|\.|)"
    power, unit = r"([eE][-+]?[0-9]+|)", r"([^\W\d]*|%)"
    match = re.fullmatch(rf"{sign}{whole}{point}{power}\s*{unit}\.?", plain(text or ""))
    if match is None or not (match[2] or match[3].strip(".")):
        return None
    if "," in match[2] and not re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", match[2]):  # "1,200" and no "1,2"
        return None
    value = float(f"{match[2].replace(',', '') or 0}{match[3]}{match[4]}")
    return (-value if match[1] in ("-", "−") and match[1] else value, match[5]) if math.isfinite(value) else None


def same_number(said: tuple[float, str], reference: tuple[float, str]) -> bool:
    """Equal to two places, as Video-R1 compares them; the unit may be left out, but no other one given."""
    return round(said[0], 2) == round(reference[0], 2) and said[1] in ("", reference[1])


def named_option(span: str, options: dict[str, str]) -> tuple[bool, str | None]:
    """-> (an option is named at all, label of the last one named or None for a contradiction)."""
    span = plain(span)
    words = mentions_of_words(span, options)
    labels = [match for match in labels_said(span, options) if not within_words(match, words, options)]
    if several_named(span, labels, words):
        return True, None
    if not labels:
        return bool(words), words[-1].labels[0] if words and len(words[-1].labels) == 1 else None
    last = labels[-1]
    label = label_of(last)
    behind = [mention for mention in words if mention.start >= last.end()]
    if not behind and len(labels) == 1:  # "Left to Right (A)": words right before the label are its own
        behind = [m for m in words if m.end <= last.start() and not span[m.end : last.start()].strip(" .,:;-")]
    agrees = label in options and all(label in mention.labels for mention in behind)
    if len(options) == 1 and not behind:  # of a question without a list: other words are another answer
        agrees &= not span[last.end() :].strip(" .,;:!)]")
    return True, label if agrees else None


@dataclass(frozen=True)
class Mention:
    """Words of an option in an answer. labels: the options that have these words."""

    start: int
    end: int
    labels: list[str]


def mentions_of_words(span: str, options: dict[str, str]) -> list[Mention]:
    """Each mention of an option's words, in order; of overlapping ones the longest."""
    by_words = {}
    for label, words in options.items():
        by_words.setdefault(plain(words).casefold(), []).append(label)
    longest_first = sorted(filter(None, by_words), key=len, reverse=True)  # "Left to Right" before "Left"
    if not longest_first:
        return []
    pattern = rf"(?<!\w)(?<!\d\.)({'|'.join(map(re.escape, longest_first))})(?!\w)(?!\.\d)"
    return [Mention(m.start(), m.end(), by_words[m[0]]) for m in re.finditer(pattern, span.casefold())]


def within_words(label: re.Match, words: list[Mention], options: dict[str, str]) -> bool:
    """Whether a label is part of an option's words, as in "both (A) and (B)", or all of them, and no option's label."""
    start, end = next(label.span(i) for i in range(1, 1 + len(label.groups())) if label[i])
    inside = [m for m in words if m.start <= start and end <= m.end]
    return any(m.end - m.start > len(label[0]) or label_of(label) not in options for m in inside)


def labels_said(span: str, options: dict[str, str]) -> list[re.Match]:
    """Labels meant as an option, in order: "(A)" or "[A]" anywhere; "A" alone, or at the start before a mark or the
    option's words; "a" alone; "option A", "the answer is A"."""
    numbered = all(label.isdigit() for label in options)
    key = "[0-9]{1,2}" if numbered else "[A-Z]"
    before, after = (r"[^\w.-]*", r"[^\w%]*") if numbered else (r"\W*", r"\W*")  # "-2" and "2 %" are no labels
    words = "|".join(re.escape(plain(words)) for words in options.values())
    end = rf"(?={after}$|\s*[).:,-](?!\d)|\s+(?i:{words})(?!\w))"  # so the article of "A ball rises" is no label
    said = [
        rf"(?<!\w)[(\[]\s*((?i:{key}))\s*[)\]]",
        rf"^{before}({key}){end}",
        rf"\b(?i:option|choice|answer|letter)(?:\s+is)?\s*:?\s+((?i:{key}))(?=\W*$|\s*[).:,-](?!\d))",
        rf"\b(?i:it is|it's|choose|chose|pick|select)\s+({key})(?=\W*$|\s*[).:,-](?!\d))",
        rf"^{before}({key})(?=\s+(?:is|because|since)\b)",
        rf"\b(?i:so|is|then|therefore)\s+({key})(?={after}$)",
        r"^\W*([a-z])\W*$",
    ]
    return list(re.finditer("|".join(said), span))


def label_of(match: re.Match) -> str:
    return next(group for group in match.groups() if group).upper()


def several_named(span: str, labels: list[re.Match], words: list[Mention]) -> bool:
    """Whether different options are named together, by labels, words or both: "A, B", "(A) left or (B) right"."""
    named = [(label.start(), label.end(), {label_of(label)}) for label in labels]
    named = sorted(named + [(mention.start, mention.end, set(mention.labels)) for mention in words])
    pairs = [(one, two) for one, two in zip(named, named[1:]) if two[0] >= one[1] and not one[2] & two[2]]
    together = any(joined(span[one[1] : two[0]]) and "(" not in span[one[1] : two[0]].strip("( ") for one, two in pairs)
    return together or (bool(labels) and and_another(span, labels[-1]))


def joined(between: str) -> bool:
    """Whether two labels are named together: "(A), (B)", "(A) and (B)", "A/B"."""
    return not between.strip(" ,/&+.;()") or between.strip(" ,/&+.;").casefold() in ("and", "or")


def and_another(span: str, label: re.Match) -> bool:
    """Whether a bare letter goes on behind the label: "B, A", "B/A", "A and B"."""
    return re.match(r"\W*(?:[,/&+]|\band\b|\bor\b)\s*[(\[]?[A-Z][)\]]?\W*$", span[label.end() :]) is not None


def fold(text: str) -> str:
    """Composed characters (NFC), full-width letters and marks as ASCII."""
    return unicodedata.normalize("NFC", text).translate(HALF_WIDTH)


@lru_cache(4096)  # options' words come again with every completion
def plain(text: str) -> str:
    r"""One line without markdown, quotes and \boxed{}; hyphens inside words as spaces: "**Left-to-Right**" -> "Left to
    Right"."""
    text = fold(text)
    for _ in range(2):  # one may stand in the other
        text = re.sub(r"\\(?:boxed|text|mathrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\w)\*+|\*+(?!\w)|[`\"“”„«»$]+", "", text)
    text = re.sub(r"(?<!\w)['‘’]|['‘’](?!\w)", "", text)
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)
    return " ".join(text.split()).strip()


def _short(text: str, limit: int = 300) -> str:
    return repr(text if len(text) <= limit else text[: limit // 2] + " … " + text[-limit // 2 :])


# --- shipped rewards -----------------------------------------------------------------------------------------------

FORMAT = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)
TAGS = re.compile(r"</?(?:think|answer)>")
NGRAM = 3  # words; n of the repetition penalty in arXiv 2502.03373, appendix C.2 and TRL's rewards
TEMPORAL_BONUS = 0.3  # alpha of Video-R1, arXiv 2503.21776


def needs(*facts: str):
    """Marks a reward that reads these entries of `sample.context`, so that the loop makes them: `group_context`."""

    def mark(fn):
        fn.needs = facts
        return fn

    return mark


def accuracy(text: str, sample: Sample) -> float:
    """1 when the answer is the dataset's, else 0."""
    return float(is_correct(text, sample))


def format(text: str, sample: Sample) -> float:  # shadows the builtin, which this file does not use
    """1 for exactly one think block, then one answer block, neither empty, and nothing but white space around them.

    A completion cut by the limit never said that it had ended, so something could still have followed: 0.
    """
    text = SPECIAL.sub("", text).strip()
    blocks = FORMAT.fullmatch(text)
    whole = blocks and len(TAGS.findall(text)) == 4 and all(block.strip() for block in blocks.groups())
    return float(bool(whole) and not sample.truncated)


def length(text: str, sample: Sample, low: float = 0.25, high: float = 0.5, limit: float = 0.8) -> float:
    """From -1 to 1 by the number of tokens, in shares of the limit: a soft band, then a soft penalty.

    Rises from 0 at no tokens to 1 at `low`, stays 1 to `high`, falls to 0 at `limit`, and to -1 at the limit itself
    (the last stretch is DAPO's soft overlong punishment, arXiv 2503.14476 eq. 13: 4096 of 20480 tokens are 0.2).
    Cut completions get -1.
    """
    if not sample.max_tokens:
        raise UserError("reward length: the sample has no max_tokens, expected the limit it was sampled under")
    share = sample.n_tokens / sample.max_tokens
    if sample.truncated or share >= 1:
        return -1.0
    if share > limit:
        return -(share - limit) / (1 - limit)
    if share > high:
        return (limit - share) / (limit - high)
    return min(1.0, share / low)


def repetition(text: str, sample: Sample) -> float:
    """From 0 (every 3 words in a row are new) towards -1: minus the share of word 3-grams that were there before."""
    words = re.findall(r"\w+", text.casefold())
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0


@needs("accuracy", "shuffled_accuracy")
def temporal(text: str, sample: Sample) -> float:
    """0.3 for a correct answer in a group that does better on the true frame order than on shuffled frames, else 0.

    Video-R1's idea (arXiv 2503.21776). Its code pays when accuracy >= 0.8 * shuffled accuracy, so also a policy that
    ignores time; here the true order must be strictly better.
    """
    ordered = sample.context["accuracy"] > sample.context["shuffled_accuracy"]
    return TEMPORAL_BONUS if ordered and is_correct(text, sample) else 0.0


def group_context(sample: Sample, texts: list[str], shuffled_texts: list[str] | None = None) -> dict[str, float]:
    """Facts of one group for `Sample.context`: share of correct answers, and the same with the frames shuffled.

    texts: the group's completions; shuffled_texts: completions of the same prompt with its frames in random order
    (any number of them), None where no reward needs them.
    """
    share = lambda answers: sum(is_correct(text, sample) for text in answers) / len(answers)
    context = {"accuracy": share(texts)}
    if shuffled_texts:
        context["shuffled_accuracy"] = share(shuffled_texts)
    return context


# --- choosing and calling ------------------------------------------------------------------------------------------

LARGEST = 1e30  # of a reward: itself is finite in float32, squares of it and their sums in float64

SHIPPED = {fn.__name__: fn for fn in (accuracy, format, length, repetition, temporal)}


@dataclass
class Reward:
    name: str
    fn: Callable[[str, Sample], float]
    weight: float = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        """Entries of `Sample.context` it reads."""
        return getattr(self.fn, "needs", ())

    def __call__(self, text: str, sample: Sample) -> float:
        """The unweighted reward. Raises UserError with its name and the completion if it fails or is not finite."""
        missing = [fact for fact in self.needs if fact not in sample.context]
        assert not missing, f"reward {self.name} needs {self.needs}, context has only {list(sample.context)}"
        try:
            value = self.fn(text, sample)
        except Exception as error:  # a user's function may raise anything; whatever it is, the run stops with its name
            what = f"raised {type(error).__name__}: {error}"
            raise UserError(f"reward {self.name} {what}; completion: {_short(text)}") from error
        if not isinstance(value, Real) or not abs(value) <= LARGEST:
            what = f"returned {value!r}, expected a finite number of at most {LARGEST:g}"
            raise UserError(f"reward {self.name} {what}; completion: {_short(text)}")
        return float(value)


def load_rewards(spec: str | list[str], weights: list[float] | str | None = None) -> list[Reward]:
    """"accuracy,format,my_rewards.py:name" and one weight each (None: all 1) -> rewards in that order.

    Raises UserError for an empty list, an unknown name, a name given twice, or another number of weights.
    """
    names = [name.strip() for name in (spec.split(",") if isinstance(spec, str) else spec)]
    if not any(names):
        raise UserError(f"--rewards is empty, expected names out of {', '.join(SHIPPED)} or my_rewards.py:name")
    weights = weights.split(",") if isinstance(weights, str) else weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"--reward_weights has {len(weights)} numbers for {len(names)} rewards ({', '.join(names)})")
    rewards = [Reward(*_find(name), _weight(weight)) for name, weight in zip(names, weights)]
    found = [reward.name for reward in rewards]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UserError(f"--rewards has {twice[0]!r} twice; each part is logged under its name, so names must differ")
    return rewards


def score(rewards: list[Reward], text: str, sample: Sample) -> dict[str, float]:
    """Every part apart, unweighted: {name: value}."""
    return {reward.name: reward(text, sample) for reward in rewards}


def total(rewards: list[Reward], parts: dict[str, float]) -> float:
    """The weighted sum that the advantages are made of. UserError if it is larger than they can be made of."""
    found = sum(reward.weight * parts[reward.name] for reward in rewards)
    if not abs(found) <= LARGEST:
        told = ", ".join(f"{reward.weight:g} x {reward.name} {parts[reward.name]:g}" for reward in rewards)
        raise UserError(f"the rewards add up to {found:g} ({told}), expected at most {LARGEST:g}; see --reward_weights")
    return found


def _weight(weight: float | str) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--reward_weights has {weight!r}, expected a finite number")
    return value


def _find(name: str) -> tuple[str, Callable]:
    """"accuracy" or "path/to/my_rewards.py:name" -> (name, function)."""
    path, colon, function = name.rpartition(":")
    if not colon:
        return name, _lookup(name, SHIPPED, "the shipped rewards or my_rewards.py:name")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"--rewards {name}: no file {file}{nearest_path(file)}")
    functions = {key: value for key, value in vars(_import_file(file)).items() if callable(value)}
    return function, _lookup(function, functions, str(file))


def _lookup(name: str, functions: dict[str, Callable], place: str) -> Callable:
    if name in functions:
        return functions[name]
    near = difflib.get_close_matches(name, functions, n=1, cutoff=0.0)
    hint = f", nearest is {near[0]!r}" if near else ""
    raise UserError(f"--rewards: no reward {name!r} in {place}{hint}")


def _import_file(file: Path):
    module_name = f"user_rewards_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None:
        raise UserError(f"--rewards: {file} is no Python file, expected my_rewards.py:name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look a function's module up here
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may fail in any way; name the file, keep the cause
        raise UserError(f"--rewards: {file} does not import: {type(error).__name__}: {error}") from error
    return module

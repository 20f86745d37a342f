"""Text -> the options of a question, and the one that a completion settles on. No torch, no state.

How an answer is read (`extract_answer`); the rewards, the evaluation and infer.py share it:
  1. What stands inside <think> is ignored, also when the block was never closed.
  2. The answer stands in the last <answer> block; without one, after the last "Answer:"; without that, in the last
     line that names an option.
  3. There, the last option named counts, by its letter, "(A)", or by its words, "Left to Right", in any case.
  4. A letter owns the text up to the next letter: if that text names another option, as in "(A) Right to Left", the
     answer contradicts itself and counts as none, so it is never right. So does a letter that no option has.
  5. Two options named together, "A and B", are no answer.
"""

import math
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

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

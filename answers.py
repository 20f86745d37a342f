r"""Text -> the options of a question, and the one that a completion settles on. No torch, no state.

The rewards, the evaluation and infer.py share these rules; docs/data.md has them as a table.
  1. What stands inside <think> is ignored, also when the block was never closed.
  2. The answer stands in the last <answer> block; without one, after the last "Answer:"; without that, in the last
     line that names an option.
  3. There, the last option named counts: by its label, "(A)", "A.", "option a", or by its words, in any case.
  4. A label whose text names another option, as in "(A) Right to Left", is no answer; nor is one that no option has.
  5. Options named together, "A and B", are no answer. An option that is denied, "not B", is not named.
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

SPECIAL = re.compile(r"<\|[^|<>]*\|>")  # <|im_end|> and its like are no words of the answer
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Full-width characters, and marks of other scripts, as ASCII; zero-width ones as nothing
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("、"): ". "}
HALF_WIDTH |= str.maketrans("【】《》〈〉「」『』–—−　‘’", """[]<><>\"\"\"\"--- ''""", "\u200b\ufeff")
EAST_ASIAN = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # kana, Chinese characters, Hangul


def fold(text: str) -> str:
    """Composed characters (NFC), full-width letters and marks as ASCII."""
    return unicodedata.normalize("NFC", text).translate(HALF_WIDTH)


@lru_cache(4096)  # options' words come again with every completion
def plain(text: str) -> str:
    r"""One line without markdown, quotes and \boxed{}: "**Left-to-Right**" -> "Left to Right"."""
    text = fold(text)
    for _ in range(2):  # one may stand in the other
        text = re.sub(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\*\*|[`\"“”„«»$]|\\[()\[\]]", "", text)
    text = re.sub(r"(?<!\w)['*_]+|['*_]+(?!\w)", "", text)  # a quote or star at a word's edge, and no "it's"
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)  # a hyphen between letters
    text = re.sub(rf"(?<={EAST_ASIAN})(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?={EAST_ASIAN})", " ", text)  # as in 答案是B
    return " ".join(text.split())


def normalise(text: str) -> str:
    """An open answer as it is compared: in any case, without the marks around it."""
    return plain(text).casefold().strip(" ,;:!()[]").rstrip(" .,;:!()[]")


# -- The options of a question

LABEL = r"\s*([A-Za-z]|[0-9]{1,2})\s*"
# The ways to write an option's label. One list keeps to one way; of equally long lists the later way counts.
STYLES = [re.compile(rf"(?<![\w.(\[]){LABEL}{mark}") for mark in ("-", ":", r"\)", r"\.")]  # A-  A:  A)  A.
BRACKETS = (("<", ">"), (r"\[", r"\]"), (r"\(", r"\)"))  # <A>  [A]  (A), and no f(A)
STYLES += [re.compile(rf"(?<!\b[A-Za-z0-9]){one}{LABEL}{two}[.:]?") for one, two in BRACKETS]
# What may stand before the first label of a line: a bullet, a word as in "Option A:"
LINE_START = re.compile(r"[\s*>•·-]*(?:(?:option|choice|caption|sentence|answer)\s)?", re.IGNORECASE)


class Mark(NamedTuple):
    """What looks like a label in a question. start, end: in characters."""

    label: str
    rank: int  # among labels of its kind
    start: int
    end: int
    at_line_start: bool  # at most a bullet or "Option" is before it
    bracketed: bool


@lru_cache(1024)
def parse_options(question: str) -> dict[str, str]:
    """Question text -> {label: words} in the order given, not to be changed; {} where there is no list.

    A list has labels of one way of writing in rising order, one or several a line. Of several lists that with most
    labels at line starts counts, then the longest, then the last.
    """
    text, lists = fold(question).replace("**", ""), []
    for style in STYLES:
        marks = [mark for match in style.finditer(text) if (mark := to_mark(text, match))]
        for i, first in enumerate(marks):
            if first.label not in ("A", "1") and not (first.bracketed and first.at_line_start):
                continue
            later = [mark for mark in marks[i + 1 :] if mark.label.isdigit() == first.label.isdigit()]
            by_lines = [mark for mark in later if mark.at_line_start and first.at_line_start]
            for chain in (chain_of(first, later, gaps=False), chain_of(first, by_lines, gaps=first.bracketed)):
                options = words_of(text, chain)
                if len(options) > 1 and (first.bracketed or behind_question(text, chain)):
                    lists.append((sum(mark.at_line_start for mark in chain), len(chain), options))
    return max(reversed(lists), key=lambda each: each[:2], default=(0, 0, {}))[2]


def to_mark(text: str, match: re.Match) -> Mark | None:
    label, matched = match[1].upper(), match[0].lstrip()
    before = text[text.rfind("\n", 0, match.start(1)) + 1 : match.start(1)].rstrip("([< ")
    at_line_start, bracketed = LINE_START.fullmatch(before + " ") is not None, matched[0] in "([<"
    if not bracketed and label.isdigit() and matched[-1] in ".:" and text[match.end() :][:1].isdigit():
        return None  # 2:30, 12.5
    if not bracketed and not at_line_start and (matched[-1] == "-" or match[1].islower()):
        return None  # in a line these are words
    rank = int(label) if label.isdigit() else ord(label)
    return Mark(label, rank, match.end() - len(matched), match.end(), at_line_start, bracketed)


def chain_of(first: Mark, later: list[Mark], gaps: bool) -> list[Mark]:
    """The labels that follow in order. gaps: some may be left out, as in (1), (3), (4)."""
    chain = [first]
    for mark in later:
        if mark.rank == chain[-1].rank + 1 or (gaps and mark.rank > chain[-1].rank):
            chain.append(mark)
    return chain


def behind_question(text: str, chain: list[Mark]) -> bool:
    """Whether labels without brackets are a list: a dialogue and subtitles stand before the question, and
    "A. Smith and B. Jones meet." is a sentence."""
    before, below = text[: chain[0].start].strip(), text[chain[-1].end :].split("\n")[1:]
    if not before or any(line.rstrip().endswith("?") for line in below):
        return False
    dotted = text[chain[0].end - 1] == "." and not all(mark.at_line_start for mark in chain)
    return not dotted or len(chain) > 2 or before.endswith(("?", ":"))


def words_of(text: str, chain: list[Mark]) -> dict[str, str]:
    """{label: words up to the next label or the line's end}, {} if a label has no words of its own."""
    options = {}
    for mark, following in zip(chain, [*chain[1:], None]):
        words = text[mark.end : following.start if following else len(text)]
        words = " ".join(words.lstrip().split("\n")[0].split())  # a label may have a line of its own
        if following and not following.at_line_start:
            words = words.rstrip(" ,;/|").removesuffix(" or").removesuffix(" and")
        if not following and not mark.at_line_start:  # the next sentence of a line is none of the option's words
            words = re.split(r"(?<=\w\w[.?!]) (?=[A-Z])", words)[0].removesuffix("?")
        options[mark.label] = words.rstrip(" ,;.") or words
    empty = any(not words.strip(" ,;.:/?!") or words.casefold() in ("or", "and") for words in options.values())
    return {} if empty else options


# -- Where a completion's answer stands


def last_block(text: str, tag: str) -> str | None:
    """What the last <tag> holds, up to its end where it was never closed; None where there is none."""
    pieces = re.split(f"<{tag}>", text, flags=re.IGNORECASE)
    return re.split(f"</{tag}>", pieces[-1], flags=re.IGNORECASE)[0] if len(pieces) > 1 else None


def after_thinking(text: str) -> str:
    """What stands outside the reasoning. The opening tag may be missing (it stood in the prompt), or the closing."""
    before, *thoughts = re.split("<think>", SPECIAL.sub("", text), flags=re.IGNORECASE)
    outside = re.split("</think>", before, flags=re.IGNORECASE)[-1]
    for thought in thoughts:
        _, *after = re.split("</think>", thought, flags=re.IGNORECASE)
        outside += after[-1] if after else ""
    return outside


def answer_spans(text: str) -> list[str]:
    """Where the answer may stand, the most binding place first."""
    outside = after_thinking(text)
    block = last_block(outside, "answer")
    if block is not None:
        return [block]
    # "Answer: …" or "the answer is …": to the end of the line, or the next line when nothing stands beside it
    named = re.findall(r"\banswer(?:\s+is\b|\W{0,3}:)[*:\s]*([^\n]*)", outside, re.IGNORECASE)
    return named[::-1] + outside.strip().split("\n")[::-1]


def answer_span(text: str) -> str | None:
    """The answer's own words, "(A) Left to Right", without reasoning and tags; None where nothing was said."""
    return next((span.strip() for span in answer_spans(text) if span.strip()), None)


def extract_answer(text: str, options: dict[str, str]) -> str | None:
    """Completion -> label of the option it settles on; without options, its answer's words, normalised.

    None where there is no answer, or one that contradicts itself (module docstring, 4 and 5).
    """
    return cached_answer(text, tuple(options.items()))


@lru_cache(4096)  # a group's reference and each completion are read several times a step
def cached_answer(text: str, options: tuple[tuple[str, str], ...]) -> str | None:
    if not options:
        return normalise(answer_span(text) or "") or None
    for span in map(plain, answer_spans(text)):
        mentions = [mention for mention in mentions_in(span, dict(options)) if not is_denied(span, mention)]
        if any(together(span, one, two) for one, two in zip(mentions, mentions[1:])):
            return None
        if any(mention.sure for mention in mentions):
            return settled_option(span, mentions, dict(options))
    return None


# -- The option that an answer names

# Words right before a label that say it is meant: "the answer is A", "option A", "ich wähle A"
CUES = set("option choice answer letter caption sentence is be it's choose chose pick select think so then".split())
CUES |= set("therefore thus with say but sondern ist est es antwort réponse respuesta ответ".split())
BEHIND = ("is", "because", "since", "as", "and", "or", "instead", "rather")  # words that may follow a bare label
TOGETHER = set("and or maybe perhaps possibly probably also either both even it could be might option choice".split())
TOGETHER |= set("und oder et ou y o и или 和 与 及 或 或者".split())
DENIALS = {"not", "nor", "neither", "never", "cannot", "than", "nicht", "不是"}
BETWEEN = {"the", "a", "option", "choice", "answer", "letter", "be"}  # words between a denial and its option
DENIED_BEHIND = re.compile(r"\W*(?:is|was)\s+(?:wrong|incorrect|impossible|not)\b|\W*(?:isn't|can't|cannot)\b")


class Mention(NamedTuple):
    """An option named in an answer. labels: the options it may mean. sure: whether it can be the answer by itself."""

    start: int
    end: int
    labels: set[str]
    is_label: bool = False
    sure: bool = True


def settled_option(span: str, mentions: list[Mention], options: dict[str, str]) -> str | None:
    """The label of the option named last, None for a contradiction."""
    last = next((mention for mention in reversed(mentions) if mention.is_label and mention.sure), None)
    if last is None:
        words = [mention.labels for mention in mentions if not mention.is_label][-1]
        return min(words) if len(words) == 1 else None
    (label,) = last.labels
    behind = [mention for mention in mentions if mention.start >= last.end and not mention.is_label]
    agrees = label in options and all(label in mention.labels for mention in behind)
    if len(options) == 1 and not behind:  # of a question without a list: other words are another answer
        agrees &= not span[last.end :].strip(" .,;:!)]") or not options[label]
    return label if agrees else None


def mentions_in(span: str, options: dict[str, str]) -> list[Mention]:
    """Each mention of an option, in order: by its words, the longest that fit, by a label in brackets, or by a bare
    one. So "both (A) and (B)" is one mention where these are an option's words."""
    by_words, mentions = {}, []
    for label, words in options.items():
        by_words.setdefault(plain(words).casefold(), set()).add(label)
    longest_first = sorted(filter(None, by_words), key=len, reverse=True)  # "Left to Right" before "Left"
    label = "[0-9]{1,2}" if all(map(str.isdigit, options)) else "[A-Za-z]"
    # Words are no piece of a word, nor of a number such as 12.5
    patterns = [rf"(?<!\w)(?<!\d[.,:])(?P<words>{'|'.join(map(re.escape, longest_first))})(?!\w)(?![.,:]\d)"]
    patterns += [rf"(?<!\w)[(\[{{<]\s*(?P<wrapped>{label})\s*[)\]}}>]", rf"(?<!\w)(?P<bare>{label})(?!\w)"]
    for match in re.finditer("|".join(patterns if longest_first else patterns[1:]), span, re.IGNORECASE):
        kind, text = match.lastgroup, match[match.lastgroup]
        owners = by_words.get(text.casefold(), set())
        if mentions and mentions[-1].is_label and mentions[-1].labels & owners:  # "(A) left" is one mention
            mentions[-1] = mentions[-1]._replace(end=match.end())
        elif kind == "words" and text.upper() not in options:
            mentions.append(Mention(match.start(), match.end(), owners))
        else:
            sure = kind == "wrapped" or bare_label(before(span, match.start()), text, span[match.end() :], options)
            if sure is not None:
                mentions.append(Mention(match.start(), match.end(), {text.upper()}, True, sure))
    return mentions


def before(span: str, end: int) -> str:
    """The last few words before a place: all of them, for each mention of "A, A, A, …", took seconds."""
    return span[max(0, end - 60) : end].casefold()


def bare_label(before: str, word: str, behind: str, options: dict[str, str]) -> bool | None:
    """Whether a letter or number without brackets is meant as a label: True, False for one that only stands beside
    others, as the second of "A and B", None for an article or a number of another kind."""
    if word.isdigit() and (re.search(r"\d[.,:]$|(?:^|\s)[-+]$", before) or re.match(r"\s*%|[.,:]\d", behind)):
        return None  # 12.5, -2, 2 %
    if not re.search(r"\w", before + behind):
        return True  # nothing else was said
    first = not re.search(r"\w", re.split("[;:!?]", before)[-1])  # of its clause
    previous = (re.findall(r"[\w']+", before) or [""])[-1]
    cued = previous in CUES or bool(re.match(EAST_ASIAN, previous))
    if word.islower():
        ended = re.match(r"\W*$|[).:,]" if cued else r"[).:]", behind)
        return True if ended and (first or cued) else None
    # The end, a mark, "because …" or an option's words follow; A and I are words too, so only words of their own
    own = [options.get(word, "")] if word in ("A", "I") else options.values()
    follows = "|".join(map(re.escape, [*BEHIND, *filter(None, map(plain, own))]))
    ended = re.match(rf"\s*(?:$|[^\w\s'(]|{EAST_ASIAN})|\s+(?:\(|(?:{follows})(?!\w))", behind, re.IGNORECASE)
    return first or cued if ended and (word != "I" or word in options) else None


def together(span: str, one: Mention, two: Mention) -> bool:
    """Whether different options are named together: "A, B", "(A) left or (B) right", "A/B", "A (B)"."""
    between = span[one.end : two.start]
    joined = not re.search("[?!]", between) and set(re.findall(r"[\w']+", between.casefold())) <= TOGETHER
    return joined and not one.labels & two.labels


def is_denied(span: str, mention: Mention) -> bool:
    """Whether the answer says that it is not this option: "not B", "rather than B", "B is wrong"."""
    words = [word for word in re.findall(r"[\w']+", before(span, mention.start)) if word not in BETWEEN]
    denied = bool(words) and (words[-1] in DENIALS or words[-1].endswith("n't"))
    return denied or bool(DENIED_BEHIND.match(span[mention.end :].casefold()))

r"""Text -> the options of a question, and the one that a completion settles on. No torch, no state.

The rewards, the evaluation and infer.py share these rules; docs/data.md has them as a table.
The answer stands outside <think>, in the last <answer> block; without one, after the last "Answer:"; without that, in
the last line that names an option. The option named last counts, by its label or its words. No answer is one that
contradicts itself, "(A) Right to Left", several together, "A and B", and a denied one, "not B".
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

# A label at a line's start has at most a bullet or a word as "Option" before it. One list keeps to one way of writing;
# of equally good lists the later way counts. Without brackets it is no part of 2:30 or 12.5, and in a line a capital.
LEAD = r"(?P<lead>^[ \t*>•·-]*(?:(?:option|choice|caption|sentence|answer)\s+)?)"
LABEL = r"(?P<label>[a-z]|[0-9]{1,2})\s*"
BARE = [rf"{LEAD}{LABEL}-"]  # A-  A:  A)  A.
BARE += [rf"(?:{LEAD}|(?<![\w.(\[])(?=(?-i:[A-Z0-9]))){LABEL}{mark}(?![0-9])" for mark in (":", r"\)", r"\.")]
BRACKETED = [rf"{LEAD}?(?<!\b[a-z0-9]){one}\s*{LABEL}{two}[.:]?" for one, two in ("<>", (r"\[", "]"), (r"\(", r"\)"))]


@lru_cache(1024)
def parse_options(question: str) -> dict[str, str]:
    """Question text -> {label: words} in the order given, not to be changed; {} where there is no list. Of several one
    without a question below it counts, then that with most labels at line starts, then the longest, then the last."""
    text, lists = fold(question).replace("**", ""), []
    for style in BARE + BRACKETED:
        marks, bracketed = list(re.finditer(style, text, re.IGNORECASE | re.MULTILINE)), style in BRACKETED
        for i, first in enumerate(marks):
            if first["label"] not in ("A", "a", "1") and not (bracketed and first["lead"] is not None):
                continue
            later = marks[i + 1 : i + 100]  # of a text full of labels not all
            by_lines = [mark for mark in later if None not in (mark["lead"], first["lead"])]
            for chain in (chain_of(first, later), chain_of(first, by_lines, most=9 if bracketed else 1)):
                options = words_of(text, chain)
                is_last = not any(line.rstrip().endswith("?") for line in text[chain[-1].end() :].split("\n")[1:])
                if len(options) > 1 and (bracketed or (is_last and behind_question(text, chain))):
                    leads = sum(mark["lead"] is not None for mark in chain)
                    lists.append((is_last, leads, len(chain), first.start(), options))
    return max(lists, key=lambda each: each[:4], default=({},))[-1]


def chain_of(first: re.Match, later: list[re.Match], most: int = 1) -> list[re.Match]:
    """The labels that follow in order, at most so many steps apart: (1), (3), (4)."""
    rank = lambda mark: int(mark["label"]) if mark["label"].isdigit() else 100 + ord(mark["label"].upper())
    chain = [first]
    for mark in later:
        if 0 < rank(mark) - rank(chain[-1]) <= most:
            chain.append(mark)
    return chain


def behind_question(text: str, chain: list[re.Match]) -> bool:
    """Whether labels without brackets are a list: not at the text's start; "A. Smith and B. Jones" are names."""
    before = text[: chain[0].start()].strip()
    dotted = chain[0][0].endswith(".") and not all(mark["lead"] is not None for mark in chain)
    return bool(before) and (not dotted or len(chain) > 2 or before.endswith(("?", ":")))


def words_of(text: str, chain: list[re.Match]) -> dict[str, str]:
    """{label: words up to the next label or the line's end}, {} if a label has no words of its own."""
    options = {}
    for mark, following in zip(chain, [*chain[1:], None]):
        words = text[mark.end() : following.start() if following else len(text)]
        words = " ".join(words.lstrip().split("\n")[0].split())  # a label may have a line of its own
        if not following and mark["lead"] is None:  # the next sentence of a line is none of the option's words
            words = re.split(r"(?<=\w\w[.?!]) (?=[A-Z])", words)[0].removesuffix("?")
        options[mark["label"].upper()] = re.sub(r"([ ,;/|.]|\b(and|or)\b)+$", "", words)
    return options if all(words.strip(":?!") for words in options.values()) else {}


# -- Where a completion's answer stands


def last_block(text: str, tag: str) -> str | None:
    """What the last <tag> holds, up to its end where it was never closed; None where there is none."""
    pieces = re.split(f"<{tag}>", text, flags=re.IGNORECASE)
    return re.split(f"</{tag}>", pieces[-1], flags=re.IGNORECASE)[0] if len(pieces) > 1 else None


def after_thinking(text: str) -> str:
    """What stands outside the reasoning. The opening tag may be missing (it stood in the prompt), or the closing."""
    text = re.sub("<think>.*?(?:</think>|$)", "", SPECIAL.sub("", text), flags=re.IGNORECASE | re.DOTALL)
    return re.split("</think>", text, flags=re.IGNORECASE)[-1]


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


# -- The option that an answer names

# Words right before a label that say it is meant: "the answer is A", "option A", "ich wähle A"
CUES = set("option choice answer letter caption sentence is be it's choose chose pick select think so then".split())
CUES |= set("therefore thus hence with say but guess believe only just clearly definitely certainly that's".split())
CUES |= set("sondern ist est c'est es è é antwort réponse respuesta risposta resposta ответ".split())
BEHIND = "is", "because", "since", "as", "and", "or", "instead", "rather than"  # words that may follow a bare label
CLAUSE = BEHIND + tuple("was would must seems fits matches but then only".split())  # one that begins its clause
TOGETHER = set("and or but then maybe perhaps possibly probably also either both even it could be might".split())
TOGETHER |= {"option", "choice", "vs", "versus"}
TOGETHER |= set("und oder et ou y o и или 和 与 及 或 或者".split())
DENIALS = {"not", "nor", "neither", "never", "cannot", "than", "except", "nicht", "不是"}
BETWEEN = {"the", "a", "option", "choice", "answer", "letter", "be"}  # words between a denial and its option
NEAR = 60  # characters before a mention that are looked at: all of them, for each of "A, A, A, …", took seconds
WRONG = "wrong|incorrect|false|impossible"
DENIED_BEHIND = re.compile(rf"\W*(?:(?:is|was)\s+(?:{WRONG}|not)|isn't|can't|cannot|does(?:n't| not) (?:fit|match))\b")


class Mention(NamedTuple):
    """An option named in an answer."""

    start: int
    end: int
    labels: set[str]  # of the options that it may mean
    kind: str  # "words", "label", or "beside": a label that counts only together with another


def extract_answer(text: str, options: dict[str, str]) -> str | None:
    """Completion -> label of the option it settles on; without options, its answer's words, normalised; None where
    there is no answer."""
    if not options:
        return normalise(answer_span(text) or "") or None
    for span in filter(None, answer_spans(text)):
        span = plain(re.sub(r"(?m)^([^\w\n]*\w[^\w\n]*)\n", r"\1;\n", span))  # a label's own line is a clause
        mentions = [mention for mention in mentions_in(span, options) if not is_denied(span, mention)]
        if any(together(span, one, two) for one, two in zip(mentions, mentions[1:])):
            return None
        words = [mention for mention in mentions if mention.kind == "words"]
        if last := ([mention for mention in mentions if mention.kind == "label"] or words)[-1:]:
            behind = [mention.labels for mention in words if mention.start >= last[0].end]
            (label, *others) = last[0].labels.intersection(options, *behind) or [None]
            return None if others else label
    return None


def mentions_in(span: str, options: dict[str, str]) -> list[Mention]:
    """Each mention of an option, in order: by its words, the longest that fit, by a label in brackets, or by a bare
    one. So "both (A) and (B)" is one mention where these are an option's words."""
    by_words, mentions = {}, []
    for label, words in options.items():
        by_words.setdefault(plain(words).casefold(), set()).add(label)
    by_words.pop("", None)  # only letters are known
    longest_first = "|".join(map(re.escape, sorted(by_words, key=len, reverse=True)))  # "Left to Right" before "Left"
    label = "[0-9]{1,2}" if all(map(str.isdigit, options)) else "[A-Za-z]"
    # Words are no piece of a word, nor of a number such as 12.5
    patterns = [rf"(?<!\w)(?<!\d[.,:])(?P<words>{longest_first})(?!\w)(?![.,:]\d)"] if by_words else []
    patterns += [rf"(?<!\w)[(\[{{<]\s*(?P<label>{label})\s*[)\]}}>]", rf"(?<!\w)(?P<bare>{label})(?!\w)"]
    for match in re.finditer("|".join(patterns), span, re.IGNORECASE):
        kind, label = match.lastgroup, match[match.lastgroup].upper()
        owners = by_words.get(label.casefold(), set())
        if mentions and mentions[-1].kind != "words" and mentions[-1].labels & owners:  # "(A) left" is one mention
            mentions[-1] = mentions[-1]._replace(end=match.end(), kind="label")
            continue
        if kind == "bare" or (kind == "words" and label in options):
            kind = kind_of(span, *match.span(), options)
        if kind:
            mentions.append(Mention(*match.span(), owners if kind == "words" else {label}, kind))
    return mentions


def kind_of(span: str, start: int, end: int, options: dict[str, str]) -> str:
    """The kind of a mention by a letter or number without brackets: "label" where it begins its clause or a cue stands
    before it, else "beside"; "" for an article, a letter inside of a sentence and a number of another kind."""
    before, label, behind = span[max(0, start - NEAR) : start].casefold(), span[start:end], span[end:]
    if label.isdigit() and (re.search(r"\d[.,:]$|(?:^|\s)[-+]$", before) or re.match(r"\s*%|[.,:]\d", behind)):
        return ""  # 12.5, -2, 2 %
    if not re.search(r"\w", before + behind):
        return "label"  # nothing else was said
    previous = re.findall(r"[\w']+", re.split(rf"[;:!?→]|\b(?:{WRONG}|no\b[,.])", before)[-1])[-1:]
    meant = not previous or previous[0] in CUES or re.match(EAST_ASIAN, previous[0])
    if label.islower():
        if meant and re.match(rf"\W*$|[).:,]|\s+(?:{'|'.join(CLAUSE)})\b", behind):
            return "label"
        return "beside" if label.upper() in options and re.match(r"\W*$|\s*[,;/&|]", behind) else ""
    # The end, a mark, "because …" or an option's words follow; A and I are words too, so only words of their own
    own = [options.get(label, "")] if label in "AI" else options.values()
    words = CLAUSE if meant and label != "I" else BEHIND
    follows = "|".join(map(re.escape, filter(None, (*words, *map(plain, own)))))
    ended = re.match(rf"\s*(?:$|[^\w\s'(]|{EAST_ASIAN})|\s+(?:\(|(?:{follows})(?!\w))", behind, re.IGNORECASE)
    if not ended or (label == "I" and label not in options):
        return ""
    return "label" if meant else "beside"


def together(span: str, one: Mention, two: Mention) -> bool:
    """Whether different options are named together: "A, B", "(A) left or (B) right", "A/B", "A (B)"."""
    between = span[one.end : two.start]
    joined = not re.search("[?!]", between) and set(re.findall(r"[\w']+", between.casefold())) <= TOGETHER
    return joined and not one.labels & two.labels


def is_denied(span: str, mention: Mention) -> bool:
    """Whether the answer says that it is not this option: "not B", "not A or B", "rather than B", "B is wrong"."""
    before = re.sub(r"\W[a-z0-9]\W+or\W*$", " ", span[max(0, mention.start - NEAR) : mention.start].casefold())
    words = [word for word in re.findall(r"[\w']+", before) if word not in BETWEEN]
    denied = bool(words) and (words[-1] in DENIALS or words[-1].endswith("n't"))
    return denied or bool(DENIED_BEHIND.match(span[mention.end :].casefold()))

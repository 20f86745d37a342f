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
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

from dataset.forms import read_form
from model import UserError, nearest_path


@dataclass
class Sample:
    """What a reward may know besides the completion's text.

    options: letter -> words, read from the question where not given; {} for an open question.
    n_tokens, max_tokens: length of this completion and the limit it was sampled under, in tokens (0: not known).
    truncated: the completion reached the limit without its end token.
    context: facts about the whole group that this completion belongs to, see `group_context`.
    """

    question: str
    answer: str
    options: dict[str, str] | None = None
    n_tokens: int = 0
    max_tokens: int = 0
    truncated: bool = False
    context: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        if self.options is None:
            # A question without a list may still have an answer with letter and words, "(A) Left to Right".
            self.options = parse_options(self.question) or parse_options(answer_span(self.answer) or "", least=1)


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
    return Sample(question, answer, parse_options("\n".join(talk.options)) or None)


def plain_text(content: str | list) -> str:
    """Of typed parts, those of text."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "\n".join(text for text in texts if isinstance(text, str))


# --- reading options and answers -----------------------------------------------------------------------------------

# Options one a line, "(A) words" or "A. words", and several a line, "(A) words (B) words".
LISTED = re.compile(r"^[ \t]*(?:\(([A-Z]|\d{1,2})\)|([A-Z]|\d{1,2})[.):])[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
INLINE = re.compile(r"(?<!\S)\(([A-Z]|\d{1,2})\)\s*([^\s,.;].*?)\s*(?=\s\((?:[A-Z]|\d{1,2})\)|$)", re.MULTILINE)
SPECIAL = re.compile(r"<\|[^|<>]*\|>")  # <|im_end|> and its like are no words of the answer


def parse_options(question: str, least: int = 2) -> dict[str, str]:
    """Question text -> {letter: words}, in the order given: "(A) Left to Right\n(B) …", "A. …", or all in one line.

    Fewer than `least` options are no list but something else that looks like it ("A. Smith asks: …"): then {}.
    """
    found = [(paren or dotted, words) for paren, dotted, words in LISTED.findall(question)]
    inline = INLINE.findall(question)
    if len(found) < 2 <= len(inline) or any(INLINE.search(" " + words) for _, words in found):
        found = inline
    if len(found) < least:
        return {}
    options = {}
    for letter, words in found:
        options.setdefault(letter, words.rstrip(" ,;."))
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
    """Completion -> letter of the option it settles on; without options, its answer's words, normalised.

    None where there is no answer, or one that contradicts itself (module docstring, 4).
    """
    if not options:
        return _plain(answer_span(text) or "").casefold().strip(" .,;:!") or None
    for span in answer_spans(text):
        named, letter = _named_option(span, options)
        if named:
            return letter
    return None


def reference_answer(sample: Sample) -> str | None:
    """The dataset's answer, in the form of `extract_answer`; None where it cannot be read (count and name those)."""
    return extract_answer(sample.answer, sample.options)


def is_correct(text: str, sample: Sample) -> bool:
    """Completion against the dataset's answer. Raises UserError when that answer itself cannot be read."""
    reference = reference_answer(sample)
    if reference is None:
        options = ", ".join(f"({letter}) {words}" for letter, words in sample.options.items()) or "none"
        raise UserError(f"dataset's answer cannot be read: {_short(sample.answer)}; options of its question: {options}")
    return extract_answer(text, sample.options) == reference


def _named_option(span: str, options: dict[str, str]) -> tuple[bool, str | None]:
    """-> (an option is named at all, letter of the last one named or None for a contradiction)."""
    span = _plain(span)
    letters = list(_letter_pattern(options).finditer(span))
    if not letters:
        owners = _owners_of_words(span, options)
        return bool(owners), owners[-1][0] if owners and len(owners[-1]) == 1 else None
    last = letters[-1]
    letter = next(group for group in last.groups() if group).upper()
    owners = _owners_of_words(span[last.end() :], options)
    if not owners and len(letters) == 1:  # "Left to Right (A)": words right before the letter are its own
        owners = _owners_of_words(span[: last.start()], options, at_end=True)
    agrees = letter in options and all(letter in owner for owner in owners)
    return True, letter if agrees else None


def _letter_pattern(options: dict[str, str]) -> re.Pattern:
    """Matches a letter (or number) meant as an option: "(A)" anywhere, "A", "A)" or "A." at the start, "option A"."""
    key = r"\d{1,2}" if all(letter.isdigit() for letter in options) else "[A-Z]"
    words = "|".join(re.escape(_plain(words)) for words in options.values())
    end = rf"(?=\s*$|\s*[).:,-]|\s+(?i:{words})(?!\w))"  # so the article of "A ball rises" is no letter
    return re.compile(rf"(?<!\w)\(\s*((?i:{key}))\s*\)|^({key}){end}|\b(?i:option|choice)\s+({key})\b|^([a-z])\W*$")


def _owners_of_words(span: str, options: dict[str, str], at_end: bool = False) -> list[list[str]]:
    """Each mention of an option's words, in order -> the letters with these words (several if words are not unique)."""
    by_words = {}
    for letter, words in options.items():
        by_words.setdefault(_plain(words).casefold(), []).append(letter)
    longest_first = sorted(filter(None, by_words), key=len, reverse=True)  # "Left to Right" before "Left"
    if not longest_first:
        return []
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)" + (r"\W*$" if at_end else "")
    return [by_words[words] for words in re.findall(pattern, span.casefold())]


def _plain(text: str) -> str:
    """One line without markdown and quotes, hyphens inside words as spaces: "**Left-to-Right**" -> "Left to Right"."""
    text = re.sub(r"(?<=\w)-(?=\w)", " ", re.sub(r"[*`\"“”]+", "", text))
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

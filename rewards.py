"""Rewards: the text of a completion -> numbers. No torch, no state; each part is scored and logged apart.

A reward is a plain function `name(text, sample) -> float` of the completion's text and its `Sample`. Shipped are
accuracy, format, length, repetition and temporal. Add your own with `--rewards accuracy,format,my_rewards.py:name`.
How an answer is read is answers.py's.
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

from answers import SPECIAL, answer_span, extract_answer, parse_options, read_number, same_number
from model import UserError, nearest_path
from records import read_form


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
    """A dataset record, in any of the forms of records.py -> Sample of its last question and its answer: the
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


# --- right or wrong -------------------------------------------------------------------------------------------------


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

"""What answers to a dataset's questions tell: accuracy with its interval, confusion, how they stand to those on changed
frames. A run is {number of the sample: (true answer's words, the model's, count of options)}. No torch."""

import math
from collections import Counter

from rewards import Sample, extract_answer, reference_answer

Z = 1.959964  # standard normal quantile of a 95 % interval
# What a clip shows when it is played backwards, besides "X to Y" and "Y to X"
OPPOSITES = {"falling down": "ascending", "ascending": "falling down", "down": "up", "up": "down"}
NO_ANSWER = "(no answer)"


def in_words(sample: Sample, text: str) -> tuple[str, str, int]:
    """A completion's text -> (true answer's words, the model's, count of options)."""
    letters = reference_answer(sample), extract_answer(text, sample.options)
    true, said = (sample.options.get(letter, letter) or NO_ANSWER for letter in letters)
    return true, said, len(sample.options)


def wilson(right: int, count: int) -> list[float]:
    """The 95 % interval of a share (Wilson, 1927) of count > 0, as [low, high]."""
    p, z2 = right / count, Z * Z / count
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / count + z2 / count / 4)
    return [max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))]


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


def opposite(words: str) -> str | None:
    """What the same clip shows backwards: "Left to Right" -> "right to left"; None where that is not known."""
    start, to, end = words.casefold().partition(" to ")
    return f"{end} to {start}" if to else OPPOSITES.get(start)


def chance(run: dict) -> float | None:
    """Accuracy of blind guessing among the options; None where no question has any."""
    return mean([1 / n for _, _, n in run.values() if n])


def confusion_of(run: dict) -> dict[str, Counter]:
    """{true answer: {answer: count}}, in alphabetical order."""
    found = {}
    for true, said, _ in sorted(run.values()):
        found.setdefault(true, Counter())[said] += 1
    return found


def measure(run: dict, plain: dict) -> dict:
    """Accuracy of one run, and how its answers stand to those of the plain run: the share that `changed`, and the share
    that `flipped` to the opposite, of those that have one."""
    right = [true == said for true, said, _ in run.values()]
    pairs = [(plain[i][1], said) for i, (_, said, _) in run.items() if i in plain]
    flipped = [opposite(before) == after.casefold() for before, after in pairs if opposite(before)]
    changed = [before != after for before, after in pairs]
    found = {"accuracy": mean(right), "interval": wilson(sum(right), len(right)) if right else None}
    return found | {"right": sum(right), "count": len(right), "changed": mean(changed), "flipped": mean(flipped)}

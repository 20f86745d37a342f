"""Questions with a list of options, and answers to them, whose right label is known because they are made of it here.

Nothing is imported from the product: a mistake of its reader cannot hide in this maker.
"""

import json
from pathlib import Path

from hypothesis import strategies as st


def cases(name):
    """The lines of a file in tests/cases."""
    path = Path(__file__).parent / f"cases/{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


WORDS = (
    "the red cube", "a ball", "left", "Jones", "12.5", "2:30", "both (A) and (B)", "J. Smith", "no one", "3 of 4", "-2",
    "vitamin C", "50 %", "Left to Right", "Right to Left", "Mr. X", "the U.S. flag", "at 3 p.m.", "x = 3", "两只猫",
    "vorwärts über", "up/down", "moves (quickly)", "it's over", "C major", "A ball falls",
)  # fmt: skip
BY_LINE = (
    "({}) {}", "[{}] {}", "{}. {}", "{}) {}", "{}: {}", "- {}. {}", "（{}）{}", "{}、{}", "* {}) {}", "**{}.** {}",
    "Option {}: {}", "<{}> {}", "{} - {}", "({}): {}", "【{}】{}", "• {}) {}", "  {}.  {}",
)  # fmt: skip
IN_LINE = ("({}) {}", "[{}] {}", "{}. {}", "{}) {}", "{}: {}")
LEADS = ("", "Subtitles:\n0:05 the man enters\n1:12 he leaves\n", "It takes 12.5 s.\nMr. J. Smith asks:\n")
LEADS += ("J. Doe.\n", "A. Smith and B. Jones meet.\n", "1. He enters\n2. He sits\n")
TAILS = ("", "\nYour answer:", "\nAnswer with the option's letter from the given choices directly.")
TAILS += ("\nPlease provide only the single option letter (e.g., A, B, C, etc.) within the <answer> </answer> tags.",)
ONE = (
    "{}", "({})", "{}.", "The answer is {}", "option {}", r"\boxed{{{}}}", '"{}"', "'{}'", "[{}]", "**{}**", "（{}）",
    "“{}”", "{})", "({}", "It is {}", "I choose {}", r"$\boxed{{\text{{{}}}}}$", "The correct option is ({}).",
    "「{}」", "{} is correct", "Answer: {}", "Die Antwort ist {}", "答案是{}", "选{}。",
)  # fmt: skip
WITH_WORDS = ("({}) {}", "{}. {}", "{}: {}", "[{}] {}", "The answer is ({}) {}.", "Option {}: {}", "**{}. {}**")
SEVERAL = (
    "{} and {}", "{} or {}", "{}, {}", "{}/{}", "{} {}", "({}) ({})", "either {} or {}", "both {} and {}", "{};{}",
    "{} & {}", "{}, maybe {}", "{}\n{}", "Option {} or option {}", "neither {} nor {}", "not {} and not {}",
    "{} oder {}", "{}或{}", "{} ({})",
)  # fmt: skip


@st.composite
def lists(draw):
    """-> (question, {label: words})"""
    count = draw(st.integers(2, 5))
    labels = draw(st.sampled_from(["ABCDE", "12345"]))[:count]
    in_line = draw(st.booleans())
    plain = [words for words in WORDS if not set(words) & set("(),.:/")]
    words = draw(st.lists(st.sampled_from(plain if in_line else WORDS), min_size=count, max_size=count, unique=True))
    style, between = draw(st.sampled_from(IN_LINE)), draw(st.sampled_from([" ", "; ", ", "]))
    if not in_line:
        style, between = draw(st.sampled_from(BY_LINE)), "\n"
    listed = between.join(style.format(*option) for option in zip(labels, words, strict=True))
    asked = draw(st.sampled_from(["Which is it?", "Select the best option:"])) + (" " if in_line else "\n")
    question = draw(st.sampled_from(LEADS)) + asked + listed + draw(st.sampled_from(TAILS))
    return question, dict(zip(labels, words, strict=True))


@st.composite
def answers(draw, options):
    """Of a list -> (answer, the one label that it names, or None)."""
    label, other = draw(st.permutations(sorted(options)))[:2]
    one, with_words = draw(st.sampled_from(ONE)).format(label), draw(st.sampled_from(WITH_WORDS))
    several = draw(st.sampled_from(SEVERAL)).format(label, other)
    named = st.sampled_from([one, options[label], with_words.format(label, options[label])])
    return draw(st.one_of(named.map(lambda text: (text, label)), st.just((several, None))))

"""How options and answers are read: cases that went wrong once, and lists whose right label is known beforehand."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from answers import parse_options
from rewards import accuracy, sample_from_record

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['why'][:40]}: {case['completion'][:40]}")
def test_case(case):
    assert accuracy(case["completion"], sample_from_record(case["record"])) == case["accuracy"]


# A list of options is made here label by label; the label that is asked for is right, whatever rewards.py thinks.
NOUNS = ("the red cube", "a ball", "left", "Jones", "12.5", "2:30", "both (A) and (B)", "J. Smith", "no one", "3 of 4")
STYLES = ("({}) {}", "[{}] {}", "{}. {}", "{}) {}", "{}: {}", "- {}. {}", "（{}）{}")
LEADS = ("", "Subtitles:\n0:05 the man enters\n1:12 he leaves\n", "It takes 12.5 s.\nMr. J. Smith asks:\n", "J. Doe.\n")
ANSWERS = ("{}", "({})", "{}.", "The answer is {}", "option {}", r"\boxed{{{}}}", '"{}"', "[{}]", "**{}**")
words = st.lists(st.sampled_from(NOUNS), min_size=2, max_size=5, unique=True)


@given(words, st.sampled_from(STYLES), st.sampled_from(LEADS), st.data())
def test_list_made_by_hand(nouns, style, lead, data):
    labels = "ABCDE"[: len(nouns)]
    listed = "\n".join(style.format(label, noun) for label, noun in zip(labels, nouns, strict=True))
    record = {"question": f"{lead}Which is it?\n{listed}"}
    right, said = data.draw(st.sampled_from(labels)), data.draw(st.sampled_from(labels))
    noun = nouns[labels.index(said)]
    forms = [form.format(said) for form in ANSWERS] + [f"({said}) {noun}", f"{said}. {noun}"]
    answer = data.draw(st.sampled_from(forms))
    sample = sample_from_record(record | {"answer": right})
    assert accuracy(f"<think>Not ({right}).</think><answer>{answer}</answer>", sample) == (right == said)
    two = f"<answer>{right} and {said}</answer>" if right != said else "<answer></answer>"
    assert accuracy(two, sample) == 0, "two labels, or none, are no answer"


numbers = st.decimals(0, 1000, places=2, allow_nan=False)
openings = st.sampled_from(["{}", "{} s", "J. {}", "{}:30", "({}"])


@given(numbers, numbers, openings, st.sampled_from(["How long?", "1:05 he says\n2:10 she says\nHow long is it?"]))
def test_open_answer_is_no_list(true, said, form, question):
    sample = sample_from_record({"question": question, "answer": form.format(true)})
    assert sample.options == {}
    assert accuracy(f"<answer>{form.format(said)}</answer>", sample) == (true == said)


@given(st.text(alphabet="äöüéñ ab", min_size=1).filter(str.strip))
def test_normal_forms_are_equal(text):
    sample = sample_from_record({"question": "Wohin?", "answer": unicodedata.normalize("NFC", text)})
    assert accuracy(f"<answer>{unicodedata.normalize('NFD', text)}</answer>", sample) == 1


@pytest.mark.parametrize(
    "question",
    [
        "At 0:05 he runs 12.5 m\n3.14 is pi\n2.71 is e",
        "J. Smith meets K. Doe. Who speaks?",
        "A. Smith and B. Jones meet. Who speaks?",
        "Mr. X\nDr. Y",
        "A. Smith asks: what happens?",
    ],
)
def test_no_list(question):
    assert parse_options(question) == {}


@pytest.mark.parametrize(
    "question, options",
    [
        ("Where to? A. left B. right C. up", {"A": "left", "B": "right", "C": "up"}),
        ("Where to? (A) left, (B) up or (C) down", {"A": "left", "B": "up", "C": "down"}),
        ("Steps:\n1. He enters\n2. He sits\nWhat next?\nA. stands\nB. leaves", {"A": "stands", "B": "leaves"}),
        ("Compare (A) the cat with (B) the dog.\n(A) left\n(B) right", {"A": "left", "B": "right"}),
        ("(A) both (B) and (C)\n(B) the cone\n(C) it", {"A": "both (B) and (C)", "B": "the cone", "C": "it"}),
        ("Where to?\nA、左\nB、右", {"A": "左", "B": "右"}),
        ("How many?\n1. one\n2. two", {"1": "one", "2": "two"}),
    ],
)
def test_list(question, options):
    assert parse_options(question) == options

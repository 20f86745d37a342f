"""How options and answers are read: cases that went wrong once, and lists whose right label is known beforehand."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lists import answers, lists

from answers import parse_options
from rewards import accuracy, sample_from_record

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['why'][:40]}: {case['completion'][:40]}")
def test_case(case):
    assert accuracy(case["completion"], sample_from_record(case["record"])) == case["accuracy"]


@settings(max_examples=150)
@given(lists(), st.data())
def test_list_made_by_hand(listed, data):
    question, options = listed
    right = data.draw(st.sampled_from(sorted(options)))
    answer, named = data.draw(answers(options))
    text = f"<think>Not ({right}).</think><answer>{answer}</answer>"
    for record in (
        {"question": question, "answer": right},
        {"problem": question, "solution": f"<answer>{right}</answer>"},
    ):
        assert accuracy(text, sample_from_record(record)) == (named == right), parse_options(question)
    record = {"problem": "Which is it?", "options": list(options.values()), "problem_type": "multiple choice"}
    if named and named.isalpha():
        sample = sample_from_record(record | {"solution": right})
        assert accuracy(text, sample) == (named == right), "options in a column of their own"


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
        ("(1) yes (it does)\n(2) no", {"1": "yes (it does)", "2": "no"}),
        ("Say (A), (B) or (C).\n (A) Left;\n (B) Right;\n (C) Up.", {"A": "Left", "B": "Right", "C": "Up"}),
        ("Which way?\n(A) Left (B) Right\n(C) Down (D) Up", {"A": "Left", "B": "Right", "C": "Down", "D": "Up"}),
        ("Where to?\nA:\nleft\nB:\nright", {"A": "left", "B": "right"}),
    ],
)
def test_list(question, options):
    assert parse_options(question) == options


@pytest.mark.parametrize(
    "question, answer, said, right",
    [
        ("A. left\nB. right\nWhich one is it?", "B", "right", 1),  # the answer shows that the list is one
        ("Choose. A. left B. right", "B", "right", 1),
        ("A: Hello\nB: Bye\nWhat does B say?", "Bye", "bye", 1),  # and here that it is a dialogue
        ("A: Hello\nB: Bye\nWhat does B say?", "Bye", "B", 0),
        ("Where to?", "B", "(B) right", 1),
        ("Where to?", "B", "A or B", 0),
        ("Where to?", "3.0", "3", 1),
        ("Where to?\n(A) left\n(B) right", "B", "not (B)", 0),
        ("Where to?\n(A) left\n(B) right", "B", "not left, right", 1),
        ("Where to?\n(A) a cone\n(B) a cube", "B", "A cube", 1),
        ("Where to?\n(A) cone\n(B) cube", "B", "A cube", 1),
    ],
)
def test_answer(question, answer, said, right):
    sample = sample_from_record({"question": question, "answer": answer})
    assert accuracy(f"<answer>{said}</answer>", sample) == right

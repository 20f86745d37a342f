"""How options and answers are read: cases that went wrong once, and lists whose right label is known beforehand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lists import answers, cases, lists

from answers import parse_options
from rewards import accuracy, sample_from_record

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.mark.parametrize("case", cases("answers"), ids=lambda case: f"{case['why'][:40]}: {case['completion'][:40]}")
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


@pytest.mark.parametrize("question, options", cases("lists"))
def test_list(question, options):
    assert parse_options(question) == options


@pytest.mark.parametrize("question, answer, text, right", cases("options"))
def test_answer(question, answer, text, right):
    """What is named and denied, in several languages, and where it stands in a completion."""
    assert accuracy(text, sample_from_record({"question": question, "answer": answer})) == right
    thought = f"<think>It moves, not (B).</think><answer>{answer}</answer>"
    assert accuracy(text, sample_from_record({"question": question, "answer": thought})) == right


@pytest.mark.parametrize("text", ["A, " * 2000, "word B then " * 500, "((A) " * 1000, "<think>" * 2000])
def test_a_policy_that_repeats_itself_is_read_fast(text):
    """A group of such completions is scored at every step; each took seconds once."""
    began = time.process_time()
    assert (
        accuracy(
            text, sample_from_record({"question": "Which way?\n(A) left\n(B) right\n(C) up\n(D) down", "answer": "(D)"})
        )
        == 0
    )
    assert time.process_time() - began < 1

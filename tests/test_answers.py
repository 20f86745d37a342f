"""How options and answers are read: cases that went wrong once, and lists whose right label is known beforehand."""

import json
import time
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


@pytest.mark.parametrize(
    "question, options",
    [
        ("Where to? A. left B. right C. up", {"A": "left", "B": "right", "C": "up"}),
        ("Where to? (A) left, (B) up or (C) down", {"A": "left", "B": "up", "C": "down"}),
        ("Steps:\n1. He enters\n2. He sits\nWhat next?\nA. stands\nB. leaves", {"A": "stands", "B": "leaves"}),
        ("Compare (A) the cat with (B) the dog.\n(A) left\n(B) right", {"A": "left", "B": "right"}),
        ("(A) both (B) and (C)\n(B) the cone\n(C) it", {"A": "both (B) and (C)", "B": "the cone", "C": "it"}),
        ("Where to?\nA、左\nB、右", {"A": "左", "B": "右"}),
        ("(1) yes (it does)\n(2) no", {"1": "yes (it does)", "2": "no"}),
        ("Say (A), (B) or (C).\n (A) Left;\n (B) Right;\n (C) Up.", {"A": "Left", "B": "Right", "C": "Up"}),
        ("Which way?\n(A) Left (B) Right\n(C) Down (D) Up", {"A": "Left", "B": "Right", "C": "Down", "D": "Up"}),
        ("Where to?\nA:\nleft\nB:\nright", {"A": "left", "B": "right"}),
        ("At 0:05 he runs 12.5 m\n3.14 is pi\n2.71 is e", {}), ("Mr. X\nDr. Y", {}),
        ("A. Smith and B. Jones meet. Who speaks?", {}), ("A. Smith asks: what happens?", {}),
    ],
)  # fmt: skip
def test_list(question, options):
    assert parse_options(question) == options


WHERE, ANIMAL = "Where to?\n(A) left\n(B) right", "Which one?\n(A) a dog\n(B) a cat\n(C) a horse"
COLOUR, VITAMIN = "这是什么颜色？\nA. 红色\nB. 绿色\nC. 蓝色", "Which vitamin?\n(A) B\n(B) C\n(C) D"
TIME = "Which?\n1. 10 s\n2. 20 s\n3. 2 s"


@pytest.mark.parametrize(
    "question, answer, said, right",
    [
        ("A. left\nB. right\nWhich one is it?", "B", "(B) right", 1),  # behind no question: the letter alone counts
        ("A: Hello\nB: Bye\nWhat does B say?", "Bye", "B", 0),  # for it may be a dialogue
        ("Where to?", "B", "(B) right", 1), ("Where to?", "B", "A or B", 0), ("Where to?", "(A) left", "A", 1),
        (WHERE, "B", "not (B)", 0), (WHERE, "B", "not left, right", 1), (WHERE, "B", "not A but B", 1),
        (WHERE, "A", "(A) left. (B) right is wrong.", 1), (WHERE, "B", "A\nB", 0), (WHERE, "B", "A (B)", 0),
        (WHERE, "B", "\u200bB", 1), (WHERE, "B", "```\nB\n```", 1), (WHERE, "B", '{"answer": "B"}', 1),
        (WHERE, "B", r"\(\boxed{\text{B}}\)", 1), (WHERE, "B", "B because A is too far", 1),
        (ANIMAL, "B", "A cat", 1), (ANIMAL, "A", "A cat", 0), (ANIMAL, "B", "Based on the video", 0),
        (ANIMAL, "A", "Neither A nor B nor C", 0), (ANIMAL, "A", "ABC", 0), (ANIMAL, "A", "a dog, a cat", 0),
        (VITAMIN, "B", "B", 1), (VITAMIN, "A", "(A) B", 1), (VITAMIN, "A", "(C) B", 0),  # letters are options' words
        (TIME, "3", "2 s", 1), (TIME, "2", "2 s", 0), (TIME, "2", "2", 1), (TIME, "2", "2.5", 0),
        ("Welche?\nA) rot\nB) grün", "B", "Die Antwort ist B", 1), ("Welche?\nA) rot\nB) grün", "B", "A oder B", 0),
        ("Laquelle ?\nA) rouge\nB) vert", "B", "La réponse est B", 1), (COLOUR, "B", "答案是B", 1),
        (COLOUR, "B", "选B。", 1), (COLOUR, "A", "B和A", 0), (COLOUR, "B", "不是A，是B", 1),
        ("What is written?", "it's", "it’s", 1), ("What is written?", "its", "it's", 0), ("How many?", "7", "(7)", 1),
        ("How many?", "7", "-7", 0), ("How many?", "7", "7 or 8", 0), ("How many?", "1,000", "1000", 1),
        ("Who?", "A. Smith", "A. Jones", 0), ("How long?", "2:30", "2:59", 0), ("Which word?", "STRASSE", "straße", 1),
    ],
)  # fmt: skip
def test_answer(question, answer, said, right):
    sample = sample_from_record({"question": question, "answer": answer})
    assert accuracy(f"<answer>{said}</answer>", sample) == right


OPTIONS = "Which way?\n(A) Left to Right\n(B) Right to Left\n(C) Falling Down\n(D) Ascending"
RIGHT = [
    "<think>It is not (B).</think>\n<answer> (A) </answer>", "<answer>(A) Left to Right", "<ANSWER>A</ANSWER>",
    "<think>(B) (C) <answer>(D) Ascending</answer></think><answer>A</answer>", "<answer>left to right</answer>",
    "the ball goes right, so not (B)</think><answer>(A) Left to Right</answer>", "<answer>A</answer><think>B</think>",
    "<answer>(B) Right to Left</answer> Wait. <answer>(A) Left to Right</answer>", "( A )", "(A) left-to-right",
    "<answer>(B)? No, (A) Left to Right</answer>", "<answer>(A) Left to Right</answer> It is not (B).", "answer: a",
    "**Answer:** (A) Left to Right", "**Answer**: **A**", "Answer:\n(A) Left to Right", "A Left to Right", "a", "A.",
    "The answer is A, Left to Right.", "Answer: (B)\nNo.\nAnswer: (A)", "A - Left to Right", "Left to Right (A)",
    "(A) The ball moves from left to right.", "A ball is seen. It moves left to right.", "A<|im_end|>\n",
    "It could be (B) Right to Left, but it is (A)", "(B) Right to Left? No.\n(A) Left to Right",
]  # fmt: skip
WRONG = [
    "", "A ball moves.", "Right to Left", "B", "E", "(E) Left to Right", "(A) Right to Left", "Right to Left (A)",
    "<answer>(A) the ball moves right to left</answer>", "Answer: (A) Left to Right or Right to Left", "left right",
    "<think>(A) Left to Right", "<think>(A)</think> I do not know.", "<answer>A</answer><answer></answer>",
    "<answer>(A) Left to Right</answer> <answer>(B)</answer>", "<think>a</think><answer>(B)</answer><think>(A)",
]  # fmt: skip


@pytest.mark.parametrize("text, right", [(text, 1) for text in RIGHT] + [(text, 0) for text in WRONG])
def test_where_the_answer_stands(text, right):
    """Whether the dataset's answer is in plain form or a chain of thought."""
    for answer in ("Answer: (A) Left to Right", "<think>Not (B).</think><answer>(A) Left to Right</answer>"):
        assert accuracy(text, sample_from_record({"question": OPTIONS, "answer": answer})) == right


@pytest.mark.parametrize("text", ["A, " * 2000, "word B then " * 500, "((A) " * 1000, "<think>" * 2000])
def test_a_policy_that_repeats_itself_is_read_fast(text):
    """A group of such completions is scored at every step; each took seconds once."""
    began = time.process_time()
    assert accuracy(text, sample_from_record({"question": OPTIONS, "answer": "(D)"})) == 0
    assert time.process_time() - began < 1

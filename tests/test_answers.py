"""How options and answers are read: cases that went wrong once, and lists whose right label is known because they are
made of it here, without anything of the product."""

import json
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import cases
from hypothesis import given, settings
from hypothesis import strategies as st

from answers import parse_options
from judges import JUDGES
from model import UserError
from rewards import accuracy, check_solution, sample_from_record

# Words of options; how options are listed, a line each or in one line, and what stands around them; how an answer names
# one option by its label, by label and words, or names two
SPELLINGS = json.loads(Path(__file__).with_name("cases").joinpath("spellings.json").read_text(encoding="utf-8"))
WORDS, BY_LINE, IN_LINE, LEADS, TAILS, ONE, WITH_WORDS, SEVERAL = SPELLINGS.values()


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


settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.mark.parametrize("case", cases("answers") + cases("typed"))
def test_case(case):
    sample = sample_from_record(case["record"])
    assert accuracy(case["completion"], sample) == pytest.approx(case["accuracy"], abs=1e-6), case


@settings(max_examples=150)
@given(lists(), st.data())
def test_list_made_by_hand(listed, data):
    question, options = listed
    right = data.draw(st.sampled_from(sorted(options)))
    answer, named = data.draw(answers(options))
    text = f"<think>Not ({right}).</think><answer>{answer}</answer>"
    video_r1 = {"problem": question, "solution": f"<answer>{right}</answer>"}
    for record in ({"question": question, "answer": right}, video_r1):
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
    sample = sample_from_record({"question": "Which way?\n(A) left\n(B) right\n(C) up\n(D) down", "answer": "(D)"})
    began = time.process_time()
    assert accuracy(text, sample) == 0 and time.process_time() - began < 1


# -- Typed answers: the published values, an independent computation of each kind


def reward(kind, solution, said, **columns):
    record = {"problem": "?", "problem_type": kind, "solution": f"<answer>{solution}</answer>", **columns}
    check_solution(record)
    return accuracy(f"<think>First {solution}.</think><answer>{said}</answer>", sample_from_record(record))


numbers = st.decimals(-1000, 1000, places=1, allow_nan=False)


@given(numbers, numbers)
def test_numbers(true, said):
    p, t = float(said), float(true)
    error = abs(p - t) / abs(t) if t else math.inf if p else 0.0
    assert reward("numerical", true, said) == (round(p, 2) == round(t, 2))
    assert reward("regression", true, said) == pytest.approx(1 - min(1, error))
    assert reward("VSI", true, said) == np.mean([error <= 1 - theta for theta in np.linspace(0.5, 0.95, 10)])


@pytest.mark.parametrize("kind, true, said, expected", cases("judges"))
def test_by_hand(kind, true, said, expected):
    """None: the record is refused when it is loaded, whatever is said."""
    if expected is None:
        with pytest.raises(UserError):
            reward(kind, true, said, duration=10)
    else:
        assert reward(kind, true, said, duration=10) == pytest.approx(expected)


words = st.lists(st.sampled_from("the red ball rolls left and a dog runs The".split()), min_size=1, max_size=7)


@given(words, words)
def test_text(true, said):
    rouge, jiwer = pytest.importorskip("rouge_score.rouge_scorer"), pytest.importorskip("jiwer")
    texts = " ".join(true), " ".join(said)
    scores = rouge.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).score(*texts)
    mean = np.mean([score.fmeasure for score in scores.values()])
    assert reward("free-form", *texts) == pytest.approx(1 if texts[0].lower() == texts[1].lower() else mean)
    assert reward("ROUGE-L", *texts) == pytest.approx(scores["rougeL"].fmeasure)
    assert reward("OCR", *texts) == pytest.approx(max(0, 1 - jiwer.wer(*texts)))


spans = st.sets(st.integers(0, 20), min_size=2, max_size=2).map(lambda ends: tuple(sorted(ends)))


@given(st.lists(spans, min_size=1, max_size=4), st.lists(spans, min_size=1, max_size=4))
def test_spans(true, said):
    covered = [{second for start, end in side for second in range(start, end)} for side in (true, said)]
    iou = len(covered[0] & covered[1]) / len(covered[0] | covered[1])
    assert reward("span set", true, said) == pytest.approx(iou)
    (s, e), (a, b) = true[0], said[0]
    hull = Fraction(max(0, min(e, b) - max(s, a)), max(e, b) - min(s, a))
    assert reward("temporal grounding", [s, e], json.dumps({"time": [a, b]})) == pytest.approx(float(hull))
    penalty = max(0, 1 - Fraction(abs(s - a), 15)) * max(0, 1 - Fraction(abs(e - b), 15))
    assert reward("timestamp tIoU", [s, e], f"{a} to {b}", duration=15) == pytest.approx(float(hull * penalty))


boxes = st.tuples(spans, spans).map(lambda s: [s[0][0], s[1][0], s[0][1], s[1][1]])
tracks = st.dictionaries(st.sampled_from("1234"), boxes, min_size=1)


def pixel_iou(said, true):
    masks = np.zeros((2, 20, 20), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, (said, true), strict=True):
        mask[y1:y2, x1:x2] = True
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


@given(tracks, tracks, spans, spans)
def test_boxes(true, said, seconds, others):
    one, two = next(iter(true.values())), next(iter(said.values()))
    assert reward("spatial grounding", one, json.dumps({"boxes": two})) == pytest.approx(pixel_iou(two, one))
    mean = np.mean([pixel_iou(said[key], box) if key in said else 0 for key, box in true.items()])
    assert reward("tracking", json.dumps({"boxes": true}), json.dumps({"boxes": said})) == pytest.approx(mean)
    tube = [json.dumps({"time": time, "boxes": track}) for time, track in ((seconds, true), (others, said))]
    time = reward("timestamp", list(seconds), list(others))
    assert reward("spatial-temporal grounding", *tube) == pytest.approx((time + mean) / 2)


SOLUTIONS = {kind: true for kind, true, said, expected in cases("judges") if said == true and expected == 1}


@pytest.mark.parametrize("kind, true", SOLUTIONS.items())
@settings(max_examples=25)
@given(said=st.text(max_size=30) | st.text('0123456789.,:-e[]{}()" to', max_size=30))
def test_from_0_to_1_whatever_is_said(kind, true, said):
    """In any spelling of the type; the solution said inside <think> earns nothing."""
    assert JUDGES.keys() <= SOLUTIONS.keys()
    assert 0 <= reward(kind.upper(), true, said, duration=10) <= 1
    sample = sample_from_record({"problem": "?", "solution": true, "problem_type": kind, "duration": 10})
    assert 0 == accuracy(f"<think><answer>{true}</answer></think><answer>?</answer>", sample)

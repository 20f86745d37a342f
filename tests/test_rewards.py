"""Rewards: every way an answer can be written, every way a reward can go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_client import Server, completion

import rewards
from answers import extract_answer, parse_options
from model import UserError
from rewards import Sample, is_correct, load_rewards, reference_answer, score, total

QUESTION = (
    "In which direction is the ball moving?\nOptions:\n"
    "(A) Left to Right\n(B) Right to Left\n(C) Falling Down\n(D) Ascending"
)
OPTIONS = {"A": "Left to Right", "B": "Right to Left", "C": "Falling Down", "D": "Ascending"}
PLAIN = Sample(QUESTION, "Answer: (A) Left to Right")
COT = Sample(QUESTION, "<think>It starts at the left, not (B).</think><answer>(A) Left to Right</answer>")


def test_no_torch():
    code = "import sys, rewards; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    where = Path(rewards.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"importing rewards brings {done.stdout.strip()}"


@pytest.mark.parametrize(
    "question",
    [
        QUESTION,
        "Which way? (A) Left to Right (B) Right to Left (C) Falling Down (D) Ascending",
        "Which way?\nA. Left to Right\nB. Right to Left\nC. Falling Down\nD. Ascending\nAnswer with a letter.",
        "Which way?\nA) Left to Right\nB) Right to Left\nC) Falling Down\nD) Ascending",
        "Say (A), (B), (C) or (D).\n (A) Left to Right;\n (B) Right to Left;\n (C) Falling Down;\n (D) Ascending.",
        "Which way?\n(A) Left to Right (B) Right to Left\n(C) Falling Down (D) Ascending",
    ],
)
def test_options_of_the_question(question):
    assert parse_options(question) == OPTIONS


def test_options_any_number_and_words():
    many = {chr(65 + i): f"{i + 1} balls" for i in range(9)}
    assert parse_options("How many?\n" + "\n".join(f"({k}) {v}" for k, v in many.items())) == many
    assert parse_options("(1) yes (it does)\n(2) no") == {"1": "yes (it does)", "2": "no"}
    assert parse_options("What happens here?") == {}
    assert parse_options("A. Smith asks: what happens?") == {}


RIGHT = [
    "<answer>(A) Left to Right</answer>",
    "<think>Hm.</think><answer>(A) Left to Right</answer>",
    "<think>It is not (B).</think>\n<answer> (A) </answer>",
    "<think>(B) (C) <answer>(D) Ascending</answer></think><answer>A</answer>",
    "the ball goes right, so not (B)</think><answer>(A) Left to Right</answer>",  # opening tag stood in the prompt
    "<answer>left to right</answer>",
    "<answer>(A) Left to Right",  # cut, or stopped at the tag
    "<answer>(B) Right to Left</answer> Wait. <answer>(A) Left to Right</answer>",
    "<answer>(B)? No, (A) Left to Right</answer>",
    "<answer>(A) Left to Right</answer> It is not (B).",
    "Answer: (A) Left to Right",
    "Answer: (A)",
    "Answer: A",
    "answer: a",
    "**Answer:** (A) Left to Right",
    "**Answer**: **A**",
    "Answer:\n(A) Left to Right",
    "The answer is (A).",
    "The answer is A, Left to Right.",
    "Answer: (B)\nNo.\nAnswer: (A)",
    "(A)",
    "(a)",
    "( A )",
    "(A) Left to Right",
    "(A) left-to-right",
    "(A) The ball moves from left to right.",
    "A",
    "a",
    "A.",
    "A)",
    "A: Left to Right",
    "A Left to Right",
    "A - Left to Right",
    "**A**",
    "Option A",
    "Left to Right",
    "LEFT TO RIGHT.",
    "left-to-right",
    "Left to Right (A)",
    "The ball moves left to right.",
    "A ball is seen. It moves left to right.",
    "It could be (B) Right to Left, but it is (A)",
    "(B) Right to Left? No.\n(A) Left to Right",
    "(A) Left to Right<|im_end|>",
    "A<|im_end|>\n",
]
WRONG = [
    "",
    "A ball moves.",
    "(B) Right to Left",
    "Right to Left",
    "B",
    "(E)",
    "E",
    "(E) Left to Right",
    "(A) Right to Left",  # letter against words: contradiction, wrong for every reference
    "<answer>(A) Right to Left</answer>",
    "<answer>(A) the ball moves right to left</answer>",
    "<answer>A. Right to Left</answer>",
    "Right to Left (A)",
    "Answer: (A) Left to Right or Right to Left",
    "<think>(A) Left to Right</think>",
    "<think>(A) Left to Right",
    "<think>(A)</think> I do not know.",
    "<answer></answer>",
    "<answer>(A) Left to Right</answer> <answer>(B) Right to Left</answer>",
    "<think>a</think><answer>(B)</answer><think>(A)",
    "left right",
    "All to Right",
]


@pytest.mark.parametrize("sample", [PLAIN, COT], ids=["plain form", "chain of thought form"])
@pytest.mark.parametrize("text", RIGHT)
def test_right(text, sample):
    assert reference_answer(sample) == "A"
    assert is_correct(text, sample)


@pytest.mark.parametrize("sample", [PLAIN, COT], ids=["plain form", "chain of thought form"])
@pytest.mark.parametrize("text", WRONG)
def test_wrong(text, sample):
    assert not is_correct(text, sample)


def test_contradiction_is_wrong_for_the_words_too():
    for text in ("(A) Right to Left", "<answer>(A) right to left</answer>", "Right to Left (A)"):
        assert extract_answer(text, OPTIONS) is None


def test_words_inside_words():
    options = {"A": "Left", "B": "Left to Right", "C": "Down", "D": "Falling Down"}
    for letter, words in options.items():
        assert extract_answer(f"<answer>{words}</answer>", options) == letter
    assert extract_answer("upside-downwards", options) is None


def test_same_words_twice_need_a_letter():
    options = {"A": "yes", "B": "yes", "C": "no"}
    assert extract_answer("yes", options) is None and extract_answer("(B) yes", options) == "B"


def test_numbers():
    assert extract_answer("<answer>3</answer>", {"A": "2", "B": "3"}) == "B"
    assert extract_answer("<answer>2</answer>", {"1": "red", "2": "blue"}) == "2"
    assert extract_answer("(2) red", {"1": "red", "2": "blue"}) is None


def test_open_question():
    sample = Sample("What colour is it?", "<think>I see it.</think><answer>Dark red</answer>")
    assert sample.options == {}
    assert is_correct("<think>blue?</think><answer> dark  Red. </answer>", sample)
    assert is_correct("Answer: dark red", sample) and is_correct("dark red", sample)
    assert not is_correct("red", sample) and not is_correct("", sample)


def test_options_of_the_answer_when_the_question_has_none():
    sample = Sample("Which way?", "Answer: (A) Left to Right")
    assert is_correct("(A)", sample) and is_correct("left to right", sample)
    assert not is_correct("(B)", sample) and not is_correct("(B) Left to Right", sample)


def test_unreadable_reference():
    sample = Sample(QUESTION, "I cannot tell")
    assert reference_answer(sample) is None
    with pytest.raises(UserError, match="I cannot tell.*Left to Right"):
        is_correct("(A)", sample)


def test_record_forms():
    llava = {"conversations": [{"from": "human", "value": "<video>\n" + QUESTION}, {"from": "gpt", "value": "(C)"}]}
    parts = [{"type": "video", "video": "x.mp4"}, {"type": "text", "text": QUESTION}]
    messages = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "(C)"}]}
    for record in (llava, messages):
        sample = rewards.sample_from_record(record)
        assert sample.options == OPTIONS and reference_answer(sample) == "C"
    with pytest.raises(UserError, match="no answer"):
        rewards.sample_from_record({"conversations": llava["conversations"][:1]})


letters = st.sampled_from(sorted(OPTIONS))
prose = st.text(alphabet="abcdefghij ,.\n", max_size=40)


@given(letters, letters, prose, st.sampled_from(["({}) {}", "({})", "{}", "{}. {}", "{1}"]))
def test_any_option_any_form(reference, said, thought, form):
    sample = Sample(QUESTION, f"Answer: ({reference}) {OPTIONS[reference]}")
    answer = form.format(said, OPTIONS[said])
    other = f"({reference}) {OPTIONS[reference]}"
    for text in (f"<think>{thought} {other}</think><answer>{answer}</answer>", f"<think>{other}</think>\n{answer}"):
        assert is_correct(text, sample) == (said == reference)


@given(letters, letters)
def test_letter_against_words(letter, words):
    expected = letter if letter == words else None
    for text in (f"<answer>({letter}) {OPTIONS[words]}</answer>", f"{letter}. {OPTIONS[words].lower()}"):
        assert extract_answer(text, OPTIONS) == expected


@given(st.text(max_size=200))
def test_never_raises(text):
    for reward in load_rewards("accuracy,format,repetition,length"):
        assert -1 <= reward(text, Sample(QUESTION, "(A)", n_tokens=len(text), max_tokens=100)) <= 1


@given(st.text(alphabet="<>/thinkanswer (AB)\n", max_size=120))
def test_format_agrees_with_counting_tags(noise):
    for text in (noise, f"<think>x</think>{noise}<answer>(A)</answer>", f"<think>{noise}</think><answer>(A)</answer>"):
        if rewards.format(text, PLAIN):
            assert [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")] == [1, 1, 1, 1]
            assert text.strip().startswith("<think>") and text.strip().endswith("</answer>")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>It moves.</think><answer>(A) Left to Right</answer>", 1),
        ("<think>It\nmoves.</think>\n\n<answer>(B)</answer>\n", 1),  # right or wrong is another reward's matter
        ("<think>It moves.</think><answer>(A)</answer><|im_end|>", 1),
        ("<think>It moves.</think><answer>(A)</answer> Bye.", 0),
        ("Well. <think>It moves.</think><answer>(A)</answer>", 0),
        ("<think>It moves.</think> so <answer>(A)</answer>", 0),
        ("<answer>(A)</answer><think>It moves.</think>", 0),
        ("<think>a</think><think>b</think><answer>(A)</answer>", 0),
        ("<think>a</think><answer>(A)</answer><answer>(A)</answer>", 0),
        ("<think>a<think>b</think><answer>(A)</answer>", 0),
        ("<think> </think><answer>(A)</answer>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<think>a</think><answer>(A)", 0),
        ("<answer>(A)</answer>", 0),
        ("Answer: (A) Left to Right", 0),
    ],
)
def test_format(text, expected):
    assert rewards.format(text, PLAIN) == expected


def test_format_of_a_cut_completion():
    assert rewards.format("<think>a</think><answer>(A)</answer>", Sample(QUESTION, "(A)", truncated=True)) == 0


@pytest.mark.parametrize(
    "n_tokens, expected", [(0, 0), (10, 0.4), (25, 1), (50, 1), (65, 0.5), (80, 0), (90, -0.5), (99, -0.95), (100, -1)]
)
def test_length(n_tokens, expected):
    sample = Sample(QUESTION, "(A)", n_tokens=n_tokens, max_tokens=100)
    assert rewards.length("", sample) == pytest.approx(expected)
    sample.truncated = True
    assert rewards.length("", sample) == -1


def test_length_needs_the_limit():
    with pytest.raises(UserError, match="max_tokens"):
        rewards.length("", Sample(QUESTION, "(A)", n_tokens=3))


def test_repetition():
    assert rewards.repetition("the ball moves from the left to the right", PLAIN) == 0
    assert rewards.repetition("ball", PLAIN) == 0
    assert rewards.repetition("so so so so so so", PLAIN) == pytest.approx(-0.75)  # 4 trigrams, 1 distinct


@pytest.mark.parametrize("true, shuffled, bonus", [(0.75, 0.5, 0.3), (0.5, 0.5, 0), (1.0, 1.0, 0), (0.25, 0.5, 0)])
def test_temporal(true, shuffled, bonus):
    sample = Sample(QUESTION, "(A)", context={"accuracy": true, "shuffled_accuracy": shuffled})
    assert rewards.temporal("(A)", sample) == bonus
    assert rewards.temporal("(B)", sample) == 0


def test_group_context_feeds_temporal():
    sample = Sample(QUESTION, "(A)")
    (reward,) = load_rewards("temporal")
    assert reward.needs == ("accuracy", "shuffled_accuracy")
    sample.context = rewards.group_context(sample, ["(A)", "(A)", "(B)", "A"], ["(A)", "(C)"])
    assert sample.context == {"accuracy": 0.75, "shuffled_accuracy": 0.5}
    assert [reward(text, sample) for text in ("(A)", "(B)")] == [0.3, 0]
    with pytest.raises(AssertionError, match="shuffled_accuracy"):
        reward("(A)", Sample(QUESTION, "(A)"))


def test_temporal_without_frames_to_shuffle(caplog):
    """Text, a picture, a clip of two frames: 0, named once, and the run goes on."""
    assert [rewards.can_shuffle(grids) for grids in ([], [(1, 4, 4)], [(1, 2, 2), (2, 4, 4)])] == [False, False, True]
    rewards.warned.clear()
    sample = Sample(QUESTION, "(A)")
    sample.context = rewards.group_context(sample, ["(A)", "(B)"], None)
    assert [score(load_rewards("temporal"), text, sample) for text in ("(A)", "(B)")] == [{"temporal": 0}] * 2
    assert caplog.text.count("no frames can be shuffled") == 1


def test_temporal_of_a_typed_reward():
    sample = Sample("How long?", "10", problem_type="regression")
    sample.context = rewards.group_context(sample, ["9", "5"], ["0"])
    assert sample.context == {"accuracy": pytest.approx(0.7), "shuffled_accuracy": 0}
    assert rewards.temporal("9", sample) == pytest.approx(0.27)


def test_totals_that_differ_by_rounding_are_equal():
    chosen = load_rewards("accuracy,format,length", [0.1, 0.2, 1])
    assert 0.1 + 0.2 != 0.3 and 0.1 * 3 != 0.3
    components = [dict(accuracy=1, format=1, length=0), dict(accuracy=0, format=0, length=0.3)]
    components += [dict(accuracy=3, format=0, length=0), dict(accuracy=0, format=0, length=0.1 + 0.2)]
    assert {total(chosen, each) for each in components} == {0.3}


def test_unread_list_is_logged_once(caplog):
    rewards.warned.clear()
    for _ in range(2):
        sample = Sample("Options:\nA left\nB right", "right")
        assert sample.options == {} and is_correct("right", sample)
    assert caplog.text.count("so it counts as an open question") == 1
    letters = Sample("Where?", "B")
    assert is_correct("(B) right", letters) and not is_correct("A or B", letters) and not is_correct("A", letters)
    assert "only letters are compared" in caplog.text


def test_parts_apart_and_total():
    chosen = load_rewards("accuracy, format", [1, 0.2])
    parts = score(chosen, "<think>x</think><answer>(B)</answer>", PLAIN)
    assert parts == {"accuracy": 0.0, "format": 1.0} and total(chosen, parts) == pytest.approx(0.2)
    assert [reward.weight for reward in load_rewards("accuracy,format")] == [1, 1]
    assert [reward.weight for reward in load_rewards(["accuracy", "format"], [1, -0.5])] == [1, -0.5]


@pytest.fixture
def user_file(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "import math\n"
        "def short(text, sample):\n    return len(text) < 10\n"
        "def fails(text, sample):\n    return 1 / 0\n"
        "def nan(text, sample):\n    return math.nan\n"
        "def infinite(text, sample):\n    return math.inf\n"
        "def words(text, sample):\n    return '1'\n"
        "def nothing(text, sample):\n    pass\n"
        "def source(text, sample):\n    return sample.record['source'] == text\n"
        "def narrow(text):\n    return 1.0\n"
        "def trl(completions, source, **kwargs):\n"
        "    return [float(text == s) for text, s in zip(completions, source, strict=True)]\n"
        "def trl_chat(prompts, completions, solution):\n    return [len(c[0]['content']) for c in completions]\n"
        "def trl_none(completions, **kwargs):\n    return [None]\n"
        "def trl_two(completions, **kwargs):\n    return [1.0, 2.0]\n"
    )
    return file


def test_user_reward(user_file):
    chosen = load_rewards(f"accuracy,{user_file}:short", [1, 0.5])
    assert [reward.name for reward in chosen] == ["accuracy", "short"]
    assert score(chosen, "(A)", PLAIN) == {"accuracy": 1.0, "short": 1.0}


RECORD = {"question": QUESTION, "answer": "(A)", "source": "a"}


@pytest.mark.parametrize("name, value", [("source", 1), ("trl", 1), ("trl_chat", 1), ("trl_none", 0)])
def test_rewards_of_both_kinds_see_the_record(user_file, name, value):
    """The own kind through sample.record, TRL's as columns; its completions are text or messages."""
    chosen = load_rewards(f"{user_file}:{name}")
    rewards.try_rewards(chosen, RECORD)
    assert score(chosen, "a", rewards.sample_from_record(RECORD)) == {name: value}
    talk = {"prompt": [{"role": "user", "content": QUESTION}], "solution": "(A)", "source": "a"}
    assert score(load_rewards(f"{user_file}:trl_chat"), "abc", rewards.sample_from_record(talk)) == {"trl_chat": 3}


@pytest.mark.parametrize("name", ["fails", "trl_two", "source"])
def test_first_record_shows_a_mistake(user_file, name):
    with pytest.raises(UserError, match=f"reward {name} raised"):
        rewards.try_rewards(load_rewards(f"{user_file}:{name}"), {"question": QUESTION, "answer": "(A)"})


def test_command(tmp_path):
    """Records of any form, a completion each -> every component; what cannot be judged is refused in its line."""
    rows = [{"record": RECORD, "completion": "<think>x</think><answer>(A)</answer>"}, {**RECORD, "completion": "(B)"}]
    rows += [{"record": {"problem": "?", "solution": "x", "problem_type": "dance"}, "completion": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "import sys, rewards; sys.argv = ['rewards.py', 'a.jsonl']; rewards.main(); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(rewards.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    *lines, torch = done.stdout.splitlines()
    assert [json.loads(line) for line in lines[:2]] == [
        {"accuracy": 1, "format": 1, "repetition": 0}, {"accuracy": 0, "format": 0, "repetition": 0}
    ]  # fmt: skip
    assert "problem_type is 'dance'" in json.loads(lines[2])["refused"] and torch == "False"
    wrong = subprocess.run([sys.executable, rewards.__file__, "no.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and "no file no.jsonl" in wrong.stderr


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """(script of the server) -> (it, a judge that asks it quickly)."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path / "cache.jsonl"))

    def start(*script):
        server = Server(*script)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        (reward,) = load_rewards("judge")
        reward.fn.client.first_wait, reward.fn.client.tries = 0.01, 3
        return server, reward

    return start


def test_server_judge(judged):
    """Retries, unusable replies, and a cache on disk: nothing is asked for twice."""
    sample = Sample("Why?", "It is cold.")
    server, judge = judged(503, completion("0.5"), completion("good"), b"{", completion("Score: 1"), completion("2"))
    with server:
        assert judge("<answer>Frost</answer>", sample) == 0.5
        assert judge("<think>x</think><answer>Cold</answer>", sample) == 1 and judge("Heat", sample) == 0
        assert judge("<think>x</think>", sample) == 0, "nothing was said"
        assert len(server.requests) == 8 and judge("<answer>Frost</answer>", sample) == 0.5
        assert judge.fn.client.counts["scored"] == 2 and judge.fn.client.counts["not scored"] == 1
        message = server.requests[0][2]["messages"][0]["content"]
        assert [part["type"] for part in message] == ["text"] and "Frost" in message[0]["text"]
    server, judge = judged(500)
    with server:
        judge.prepare(["<answer>Frost</answer>", "Cold"], sample)
        assert judge("Cold", sample) == 1 and not server.requests, "from the disk"
        with pytest.raises(UserError, match="no response.*HTTP 500"):
            judge("Snow", sample)


def test_server_judge_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        load_rewards("judge")


@pytest.mark.parametrize("name", ["fails", "nan", "infinite", "words", "nothing"])
def test_bad_reward_stops_with_its_name_and_the_completion(user_file, name):
    (reward,) = load_rewards(f"{user_file}:{name}")
    with pytest.raises(UserError) as caught:
        reward("the completion that did it", PLAIN)
    assert name in str(caught.value) and "the completion that did it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, weights, message",
    [
        ("acuracy", None, "did you mean accuracy"),
        ("accuracy,", None, "no reward ''"),
        ("accuracy,accuracy", None, "twice"),
        ("accuracy", [float("nan")], "finite"),
        ("nowhere.py:fn", None, "no file nowhere.py"),
        ("FILE:shrt", None, "did you mean short"),
        ("FILE:math", None, "no reward 'math'"),
        ("FILE:narrow", None, r"signature is narrow\(text\), expected narrow\(text, sample\) -> float, or as in TRL"),
    ],
)
def test_bad_spec(user_file, spec, weights, message):
    with pytest.raises(UserError, match=message):
        load_rewards(spec.replace("FILE", str(user_file)), weights)


def test_user_file_that_does_not_import(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def name(:\n")
    with pytest.raises(UserError, match="broken.py does not import: SyntaxError"):
        load_rewards(f"{file}:name")

"""Rewards: each one's value, how they are chosen and added, the command, and every way they can go wrong."""

import json
import re

import pytest
from conftest import ROOT, python, refused
from test_client import Server, completion

import report
import rewards
from model import UserError
from rewards import Sample, accuracy, load_rewards, reference_answer, sample_from_record, score, total

QUESTION = "In which direction is the ball moving?\nOptions:\n(A) Left to Right\n(B) Right to Left\n(C) Falling Down"
PLAIN = Sample(QUESTION, "Answer: (A) Left to Right")
T, A = "<think>a</think>", "<answer>(A)</answer>"
GOOD = [T + A, f"<think>It\nmoves.</think>\n\n{A}\n", f"{T}{A}<|im_end|>", f"{T}<answer>(B)</answer>"]
BAD = [f"{T}{A} Bye.", f"Well. {T}{A}", f"{T} so {A}", A + T, T + T + A, T + A + A, f"<think>a{T}{A}", A,
       f"{T}<answer>(A)", f"<think> </think>{A}", f"{T}<answer></answer>", "Answer: (A) Left to Right"]  # fmt: skip


def test_format():
    assert [rewards.format(text, PLAIN) for text in GOOD + BAD] == [1] * len(GOOD) + [0] * len(BAD)
    assert rewards.format(GOOD[0], Sample(QUESTION, "(A)", truncated=True)) == 0


def test_temporal(caplog):
    """Of a typed reward too; without frames to shuffle it is 0, named once."""
    sample = Sample("How long?", "10", problem_type="regression")
    for true, shuffled, bonus in ((0.75, 0.5, 0.27), (0.5, 0.5, 0), (1.0, 1.0, 0), (0.25, 0.5, 0)):
        sample.context = {"accuracy": true, "shuffled_accuracy": shuffled}
        assert rewards.temporal("9", sample) == pytest.approx(bonus) and rewards.temporal("late", sample) == 0
    rewards.warned.clear()
    sample.context = {}
    assert [score(load_rewards("temporal"), text, sample) for text in ("9", "5")] == [{"temporal": 0}] * 2
    assert caplog.text.count("no frames can be shuffled") == 1


def test_totals_that_differ_by_rounding_are_equal():
    chosen = load_rewards("accuracy,format", [0.1, 1])
    assert total(chosen, {"accuracy": 1, "format": 0.2}) == total(chosen, {"accuracy": 0, "format": 0.3}) == 0.3
    assert [reward.weight for reward in load_rewards("accuracy, format")] == [1, 1]


def test_what_cannot_be_read_is_said(caplog):
    unreadable = Sample(QUESTION, "I cannot tell")
    assert reference_answer(unreadable) is None
    with pytest.raises(UserError, match="I cannot tell.*one of A, B, C"):
        accuracy("(A)", unreadable)
    with pytest.raises(UserError, match="duration is None, expected seconds"):
        rewards.check_solution({"problem": "When?", "problem_type": "timestamp tIoU", "solution": "[3, 8]"})
    with pytest.raises(UserError, match="record has no answer"):  # the last question has none, the one before has
        roles = ("user", "assistant", "user")
        sample_from_record({"messages": [{"role": role, "content": "B"} for role in roles]})
    rewards.warned.clear()
    for _ in range(2):
        sample = Sample("Options:\nA left\nB right", "right")
        assert sample.options == {} and accuracy("right", sample) == 1
    assert caplog.text.count("so it counts as an open question") == 1
    both = [RECORD | {"solution": solution} for solution in ("<answer>left to right</answer>", "B", "(B)")]
    assert "differ in 2 of 3 samples" in next(report.two_answers(both))
    letters = Sample("Where?", "B")
    assert accuracy("(B) right", letters) == 1 and accuracy("A", letters) == 0
    assert "only letters are compared" in caplog.text


MY_REWARDS = """
import beside_it
def fails(text, sample): return 1 / 0
def nan(text, sample): return beside_it.nan
def words(text, sample): return "1"
def source(text, sample): return sample.record["source"] == text
def narrow(text): return 1.0
def trl(completions, source, **kwargs): return [float(text == s) for text, s in zip(completions, source, strict=True)]
def trl_chat(prompts, completions, solution): return [len(c[0]["content"]) for c in completions]
def trl_none(completions, **kwargs): return [None]
def trl_two(completions, **kwargs): return [1.0, 2.0]
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "beside_it.py").write_text("from math import nan\n")
    (tmp_path / "broken.py").write_text("def name(:\n")
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    return tmp_path / "my_rewards.py"


RECORD = {"question": QUESTION, "answer": "(A)", "source": "a"}
TALK = {"prompt": [{"role": "user", "content": QUESTION}], "solution": "(A)", "source": "a"}


@pytest.mark.parametrize("name, value", [("source", 1), ("trl", 1), ("trl_chat", 1), ("trl_none", 0)])
@pytest.mark.parametrize("record", [RECORD, TALK])
def test_rewards_of_both_kinds_see_the_record(user_file, record, name, value):
    """The own kind through sample.record, TRL's as columns; its completions are text or messages."""
    if name == "trl" and record is TALK:
        value = 0  # given messages, as TRL does, it compares a list with a text
    chosen = load_rewards(f"{user_file}:{name}")
    rewards.try_rewards(chosen, record)
    assert score(chosen, "a", sample_from_record(record)) == {name: value}


def test_mistakes_in_a_users_rewards(user_file):
    for name in ("fails", "trl_two", "source", "nan", "words"):  # met before the model is loaded
        chosen = load_rewards(f"{user_file}:{name}")
        message = refused(rewards.try_rewards, chosen, {"question": QUESTION, "answer": "(A)"})
        assert re.search(f"reward {name}: .*; completion: .*So", message)
    for spec, weights, message in (
        ("accuracy,accuracy", None, "twice"),
        (f"{user_file}:sourc", None, "did you mean source"),
        (f"{user_file}:narrow", None, r"is narrow\(text\), expected narrow\(text, sample\) -> float, or as in TRL"),
        (f"{user_file.with_name('broken.py')}:name", None, "broken.py does not import: SyntaxError"),
    ):
        with pytest.raises(UserError, match=message):
            load_rewards(spec, weights)


def test_command(tmp_path):
    """Records of any form, a completion each -> every component; what cannot be judged is refused in its line."""
    rows = [{"record": RECORD, "completion": "<think>x</think><answer>(A)</answer>"}, {**RECORD, "completion": "(B)"}]
    rows += [{"record": {"problem": "?", "solution": "x", "problem_type": "dance"}, "completion": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, RECORD]))
    code = "import sys, rewards; sys.argv = ['rewards.py', 'a.jsonl']; from script import cli\ntry: cli(rewards.main)\n"
    code += "finally: print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=f"{ROOT}")
    *lines, torch = done.stdout.splitlines()
    assert json.loads(lines[0]) == {"accuracy": 1, "format": 1}
    assert json.loads(lines[1]) == {"accuracy": 0, "format": 0}
    assert "problem_type is 'dance'" in json.loads(lines[2])["refused"] and torch == "[]"
    assert done.returncode == 2 and "a.jsonl: object 4 has no record and completion" in done.stderr


def test_server_judge(monkeypatch, tmp_path, caplog):
    """Retries, unusable replies, and a cache on disk: nothing is asked for twice."""
    sample, (reward,) = Sample("Why?", "It is cold."), load_rewards("judge")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY: not set"):
        score([reward], "Frost", sample)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("JUDGE_CACHE", str(tmp_path / "cache.jsonl"))

    def start(*script):
        server = Server(*script)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        rewards.judge_server.cache_clear()
        client = rewards.judge_server()[0]
        client.first_wait, client.tries = 0.01, 3
        return server

    with start(503, completion("0.5"), completion("good"), b"{", completion("Score: 1"), completion("2")) as server:
        said = [f"<answer>{text}</answer>" for text in ("Frost", "Cold", "Heat", "Frost")] + ["<think>x</think>"]
        assert [reward.fn(text, sample) for text in said] == [0.5, 1, 0, 0.5, 0] and len(server.requests) == 8
        message = server.requests[0][2]["messages"][0]["content"]
        assert [part["type"] for part in message] == ["text"] and "Frost" in message[0]["text"]
        assert "0 where the server gives no number from 0 to 1, as for 'Heat'" in caplog.text
    with start(500) as server:
        assert [reward.fn(text, sample) for text in said] == [0.5, 1, 0, 0.5, 0] and not server.requests
        with pytest.raises(UserError, match="HTTP 500.*run again: it goes on"):
            rewards.judge_all(["Snow", "Cold"], sample)
    with start(completion("0.25")) as server:
        rewards.judge_all(["Snow", "<answer>Snow</answer>"], sample)
        assert len(server.requests) == 1 and reward.fn("Snow", sample) == 0.25
    rewards.judge_server.cache_clear()

"""The examples of CONTRIBUTING.md are applied to a copy of the repository and used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rewards import Sample, load_rewards

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|diff)\n# (\S+)\n(.*?)```", TEXT, re.S)


def edits(text):
    """A block of diff lines -> [(lines before, lines after)], one a hunk."""
    hunks = [[line for line in hunk.splitlines() if line] for hunk in text.split("@@\n")]
    cut = lambda lines, signs: "".join(line[1:] + "\n" for line in lines if line[0] in signs)
    return [(cut(lines, " -"), cut(lines, " +")) for lines in hunks]


def pieces(file, text):
    """A diff block may go on in another file, named by a line of its own."""
    for part in re.split(r"^# (?=\S+\.py$)", f"# {file}\n{text}", flags=re.M)[1:]:
        name, _, rest = part.partition("\n")
        yield name, rest


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo") / "copy"
    big = ("output", "data", "runs", "dev", "shared", "__pycache__", "*.svg", "*.png", "*.gif")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", *big))
    return folder


def applied(folder, file):
    """The copy, with the diff that begins with this file."""
    (text,) = [text for kind, name, text in BLOCKS if kind == "diff" and name == file]
    for name, part in pieces(file, text):
        source = (folder / name).read_text(encoding="utf-8")
        for before, after in edits(part):
            assert source.count(before) == 1, f"{name}: {source.count(before)} times, expected once:\n{before}"
            source = source.replace(before, after)
        (folder / name).write_text(source, encoding="utf-8")
    return folder


def use(folder, code):
    """Run Python in the copy; what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_four_and_none_is_long():
    assert [file for _, file, _ in BLOCKS] == ["my_rewards.py", "records.py", "bench/workloads.py", "config.py"]
    for _, file, text in BLOCKS:
        assert len(text.splitlines()) < 12 and len(re.findall(r"^[+-]", text, re.M)) < 10, file
    assert len(TEXT.splitlines()) <= 66  # one page


def test_the_reward(tmp_path):
    (tmp_path / "my_rewards.py").write_text(BLOCKS[0][2])
    _, reward = load_rewards(f"accuracy,{tmp_path / 'my_rewards.py'}:shortness")
    sample = lambda n: Sample(question="", answer="", options={}, n_tokens=n, max_tokens=128, truncated=False)
    assert (reward("a", sample(10)), reward("a", sample(100))) == (1.0, 0.0)


def test_the_data_form(copied):
    code = """
from records import read_turns
question, answer = read_turns({"video": "a.mp4", "caption": "A ball falls."}, "sample 0")
print(question.role, question.text, question.parts[0].paths, answer.role, answer.text)
"""
    expected = "user What happens? ('a.mp4',) assistant A ball falls."
    assert use(applied(copied, "records.py"), code).strip() == expected


def test_the_model_size(copied):
    code = """
import sys
sys.path.insert(0, "bench")
import torch
from workloads import model_config
from model.qwen import Qwen2_5_VL
with torch.device("meta"):
    model = Qwen2_5_VL(model_config("14B"))
print(sum(p.numel() for name, p in model.named_parameters() if not name.startswith("visual")))
"""
    assert int(use(applied(copied, "bench/workloads.py"), code)) == 14_770_033_664  # Qwen2.5-14B


def test_the_knob(copied):
    """It is a flag, in --help, checked, and handed to the evaluation."""
    folder = applied(copied, "config.py")
    done = subprocess.run([sys.executable, "train_sft.py", "--help"], cwd=folder, capture_output=True, text=True)
    assert "--eval_temperature float" in done.stdout and "of the answers in an SFT evaluation" in done.stdout
    wrong = [sys.executable, "train_sft.py", "--eval_temperature", "-1"]
    done = subprocess.run(wrong, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "--eval_temperature: found -1.0, expected at least 0" in done.stderr
    code = """
import types, train_sft
class Stop(Exception): pass
def stop(*args): raise Stop(args[4])
train_sft.evaluate = stop
run = types.SimpleNamespace(cfg=train_sft.parse(train_sft.SFT, ["--eval_temperature", "0.7"]))
try: train_sft.evaluate_and_log(run, None, None, [], None)
except Stop as found: print(found)
"""
    assert use(folder, code).strip().splitlines()[-1] == "0.7"

"""The examples of CONTRIBUTING.md are applied to a copy of the repository and used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from rewards import Sample, load_rewards

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {file: text for _, file, text in re.findall(r"```(python|diff)\n# (\S+)\n(.*?)```", TEXT, re.S)}


def test_they_are_short():
    assert set(BLOCKS) == {"my_rewards.py", "config.py"}
    assert all(len(text.splitlines()) < 12 for text in BLOCKS.values()) and len(TEXT.splitlines()) <= 66


def test_the_reward(tmp_path):
    (tmp_path / "my_rewards.py").write_text(BLOCKS["my_rewards.py"])
    _, reward = load_rewards(f"accuracy,{tmp_path / 'my_rewards.py'}:shortness")
    sample = lambda n: Sample(question="", answer="", options={}, n_tokens=n, max_tokens=128, truncated=False)
    assert (reward("a", sample(10)), reward("a", sample(100))) == (1.0, 0.0)


def test_the_option(tmp_path):
    """It is a flag with a --help line, checked, and arrives in cfg."""
    for file in ("config.py", "checks.py", "cli.py", "names.py", "script.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / "model", tmp_path / "model")
    for part in re.split(r"^# (?=\S+\.py$)", f"# config.py\n{BLOCKS['config.py']}", flags=re.M)[1:]:
        name, _, diff = part.partition("\n")
        cut = lambda signs, diff=diff: "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] in signs)
        source = (tmp_path / name).read_text(encoding="utf-8")
        assert source.count(cut(" -")) == 1, f"{name} does not hold the lines of the example once"
        (tmp_path / name).write_text(source.replace(cut(" -"), cut(" +")), encoding="utf-8")

    def parse(*flags):
        code = "from config import SFT, cli, parse; print(cli(lambda: parse(SFT)).eval_temperature)"
        return subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, capture_output=True, text=True)

    assert "of the answers in an SFT evaluation" in parse("--help", "all").stdout
    assert parse("--eval_temperature", "0.7").stdout == "0.7\n"
    wrong = parse("--eval_temperature", "-1")
    assert wrong.returncode == 2 and "--eval_temperature: found -1.0, expected at least 0" in wrong.stderr

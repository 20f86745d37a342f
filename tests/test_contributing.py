"""README's reward on the quickstart's data; CONTRIBUTING's example of an option; figures and files that pages name."""

import re
import shutil
import sys

from conftest import ROOT, python
from runs import base, grpo, lines  # noqa: F401 (fixtures are imported by name)

import generate
import quickstart

# ruff: noqa: F811


def block(page, name):
    """The fenced block of a page that begins with the comment "# name"."""
    return re.search(rf"```\w+\n# {re.escape(name)}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)[1]


def test_the_rewards_of_readme_on_the_quickstarts_data(grpo, tmp_path, monkeypatch):
    code = block("README.md", "my_rewards.py")
    assert len(code.splitlines()) <= 10
    (tmp_path / "my_rewards.py").write_text(code)
    flags = re.sub(r"--num_samples \d+", "--num_samples 8", quickstart.CLIPS).replace("0.7143", "0.5")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--output_dir", str(tmp_path / "data"), *flags.split()])
    generate.main()
    names = f"accuracy,{tmp_path}/my_rewards.py:shortness,{tmp_path}/my_rewards.py:names_motion"
    options = {"model_id": ROOT / "assets/tiny", "data_path": tmp_path / "data/train.json", "max_steps": 1}
    folder = grpo("run", **options, rewards=names, max_completion_length=48)
    rows = [row for row in lines(folder, "rollouts.jsonl") if "advantage" in row]
    assert len(rows) == 16
    for row in rows:
        assert row["rewards"]["shortness"] == 1 - row["n_tokens"] / 48
        thought = row["completion"].partition("<think>")[2].partition("</think>")
        assert row["rewards"]["names_motion"] == float(bool(thought[1]) and "mov" in thought[0])


def test_the_option(tmp_path):
    """It is a flag with a --help line, checked, and arrives in cfg."""
    for file in ("config.py", "cli.py", "names.py", "names.toml", "script.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / "model", tmp_path / "model")
    for part in re.split(r"^# (?=\S+\.py$)", f"# config.py\n{block('CONTRIBUTING.md', 'config.py')}", flags=re.M)[1:]:
        name, *diff = part.splitlines()
        before, after = ("".join(f"{line[1:]}\n" for line in diff if line[0] in signs) for signs in (" -", " +"))
        source = (tmp_path / name).read_text(encoding="utf-8")
        assert source.count(before) == 1, f"{name} does not hold the lines of the example once"
        (tmp_path / name).write_text(source.replace(before, after), encoding="utf-8")

    def parse(*flags):
        code = "from config import SFT, cli, parse; print(cli(lambda: parse(SFT)).eval_temperature)"
        return python("-c", code, *flags, cwd=tmp_path)

    assert "of the answers in an SFT evaluation" in parse("--help", "all").stdout
    assert parse("--eval_temperature", "0.7").stdout == "0.7\n"
    wrong = parse("--eval_temperature", "-1")
    assert wrong.returncode == 2 and "--eval_temperature: got -1.0, expected at least 0" in wrong.stderr


# Of the reader, of other projects, and of the table of what was removed
NOT_HERE = """my_rewards.py sft_video.py video_generator.py src/training/train.py src/training/train_grpo.py
    scripts/demo.py configs/qwen_SIZE_METHOD_MEMORY.py configs/SIZE_METHOD.py bench/sft.py rollout.py""".split()


def test_the_pages_have_the_measured_tables_and_name_files_that_exist():
    assert python("dev/figures.py", "--check").returncode == 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in set(re.findall(r"[\w/.-]*\w\.py\b", page.read_text(encoding="utf-8"))) - {*NOT_HERE}:
            places = [ROOT / folder / name for folder in (".", "configs", "docs", "model")]
            assert any(place.exists() for place in places), f"{page.name}: {name}"

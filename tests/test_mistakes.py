"""A user's slip is answered with the nearest valid thing, other models are refused, --help is quick."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint import find_adapter
from config import GRPO, SFT, Generate, Infer, parse
from data import read_records
from model import UserError, nearest, nearest_path
from model.loading import ModelConfig, resolve_folder
from report import read_run
from rewards import load_rewards

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with things that one can misspell."""
    monkeypatch.chdir(tmp_path)
    for name in ("output/video_lora/checkpoint-10", "data/videos", "models/qwen_3b", "configs", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/train.json", "configs/mine.py", "my_rewards.py"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("attempt", "hint"),
    [
        (lambda: parse(GRPO, ["--aggregation", "sequences"]), "did you mean sequence?"),
        (lambda: parse(Generate, ["--augment", "blurr,crop"]), "did you mean blur?"),
        (lambda: parse(Infer, ["--data_path", "x", "--controls", "reverse"]), "did you mean reversed?"),
        (lambda: parse(SFT, ["--config", "configs/mien.py"]), "did you mean configs/mine.py?"),
        (lambda: load_rewards("acuracy,format"), "did you mean accuracy?"),
        (lambda: load_rewards("my_reward.py:short"), "did you mean my_rewards.py?"),
        (lambda: find_adapter("output/vidoe_lora"), "did you mean output/video_lora?"),
        (lambda: find_adapter("output/video_lora/checkpoint-11"), "did you mean output/video_lora/checkpoint-10?"),
        (lambda: find_adapter("outptu/video_lora"), "did you mean output?"),
        (lambda: resolve_folder("models/qwen_3"), "did you mean models/qwen_3b?"),
        (lambda: read_records("data/trian.json"), "did you mean data/train.json?"),
        (lambda: read_run(Path("output/video_lor")), "did you mean output/video_lora?"),
    ],
)
def test_the_nearest_valid_thing_is_named(here, monkeypatch, attempt, hint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        attempt()
    assert hint in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_guessed_where_nothing_is_near(here):
    assert nearest("zzz", ["merge", "check"]) == nearest_path("zzz/zzz") == nearest_path(".hiddem") == ""
    assert nearest_path("x" * 5000) == nearest_path("a\0b") == ""
    assert nearest_path("dta/x.json") == "; did you mean data?"


def test_help_of_every_script_needs_no_torch():
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    for name in "generate train_sft train_grpo infer data lora report quickstart".split():
        command = [sys.executable, "-c", code, f"{name}.py", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)
        assert name == "quickstart" or f"{name}.py [" in done.stdout.splitlines()[0], done.stdout


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [4, 6, 6]}}, "rope_scaling type is yarn"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config's hidden_act is quick_gelu"),
    ],
)
def test_other_models_are_refused(change, message):
    raw = json.loads((TINY / "config.json").read_text())
    change = {key: raw[key] | value if key == "vision_config" else value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(raw | change, "config.json")


def test_make_clean_removes_no_results():
    done = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True)
    removed = [word for line in done.stdout.splitlines() if line.startswith("rm ") for word in line.split()[1:]]
    assert removed and not any(Path(word).parts[:1] in (("output",), ("data",)) for word in removed), done.stdout

"""A slip is told with the nearest valid thing, and --help answers before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

import lora
from adapter_files import meta_model
from checkpoint import find_adapter
from cli import build_parser
from config import GRPO, SFT, Adapter, Generate, Infer, Look, LoraArgs, Report, parse
from data import Processor, load_tokenizer
from infer import clip_record
from model import UserError, nearest, nearest_path
from model.loading import resolve_folder
from records import read_records
from report import read_run
from rewards import load_rewards

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
SCRIPTS = "generate train_sft train_grpo infer data lora report quickstart"


def processor(cfg):
    return Processor(load_tokenizer(TINY), meta_model(TINY).config, cfg)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with things that one can misspell."""
    monkeypatch.chdir(tmp_path)
    for name in ("output/video_lora/checkpoint-10", "data/videos", "models/qwen_3b", "configs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/train.json", "data/videos/ball.mp4", "configs/mine.py", "my_rewards.py"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("attempt", "hint"),
    [
        (lambda: parse(SFT, ["--lora_rnk", "4"]), "did you mean lora_rank?"),
        (lambda: parse(SFT, ["--lr", "1e-4"]), "did you mean learning_rate, lora_rank or lr_scheduler_type?"),
        (lambda: parse(SFT, ["--wd=0.1"]), "did you mean weight_decay?"),
        (lambda: parse(GRPO, ["--max_completion", "64"]), "did you mean max_completion_length?"),
        (lambda: parse(Infer, ["a.mp4", "--model", "x"]), "did you mean model_ckpt or model_id?"),
        (lambda: parse(SFT, ["--max", "8"]), "did you mean max_steps?"),  # of many that go on so, the nearest
        (lambda: parse(Report, ["output/run", "--outptu", "x.html"]), "did you mean output?"),
        (lambda: parse(Infer, ["a.mp4", "--base_modl", "x"]), "did you mean base_model?"),
        (lambda: parse(SFT, ["--lr_scheduler_type", "cosin"]), "did you mean cosine?"),
        (lambda: parse(GRPO, ["--aggregation", "sequences"]), "did you mean sequence?"),
        (lambda: parse(GRPO, ["--rewards", "accuracy", "--scale_rewards", "groups"]), "did you mean group?"),
        (lambda: parse(Generate, ["--augment", "blurr,crop"]), "did you mean blur?"),
        (lambda: parse(Infer, ["--data_path", "x", "--controls", "reverse"]), "did you mean reversed?"),
        (lambda: parse(Adapter, ["marge", "x"]), "did you mean merge?"),
        (lambda: parse(SFT, ["--config", "configs/mien.py"]), "did you mean configs/mine.py?"),
        (lambda: load_rewards("acuracy,format"), "nearest is 'accuracy'"),
        (lambda: load_rewards("my_reward.py:short"), "did you mean my_rewards.py?"),
        (lambda: find_adapter("output/vidoe_lora"), "did you mean output/video_lora?"),
        (lambda: find_adapter("output/video_lora/checkpoint-11"), "did you mean output/video_lora/checkpoint-10?"),
        (lambda: find_adapter("outptu/video_lora"), "did you mean output?"),
        (lambda: resolve_folder("models/qwen_3"), "did you mean models/qwen_3b?"),
        (lambda: read_records("data/trian.json"), "did you mean data/train.json?"),
        (lambda: clip_record(parse(Infer, ["data/videos/bal.mp4"])), "did you mean data/videos/ball.mp4?"),
        (lambda: read_run(Path("output/video_lor")), "did you mean output/video_lora?"),
        (lambda: processor(parse(SFT, ["--image_folder", "data/video"])), "did you mean data/videos?"),
    ],
)
def test_the_nearest_valid_thing_is_told(here, monkeypatch, attempt, hint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        attempt()
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_part_of_the_model_that_is_misspelt():
    model = meta_model(TINY)
    with pytest.raises(UserError, match=r"'visaul'.*did you mean visual\?"):
        lora.targets(model, LoraArgs(lora_namespan_exclude=["visaul"]))


def test_nothing_is_guessed_where_nothing_is_near(here):
    assert nearest("zzz", ["merge", "check"]) == "" and nearest_path("zzz/zzz") == ""
    (here / ".hidden").mkdir()
    (here / "dataset").mkdir()
    assert nearest_path("x" * 5000) == "" == nearest_path("a\0b")
    assert nearest_path("dat/x.json") == "; did you mean data?"
    assert nearest_path(".hiddem") == ""


def test_files_stand_without_a_flag():
    """As many as there are, before and behind the flags; none is a mistake, told in one line."""
    look = parse(Look, ["a.mp4", "--fps", "4", "b.mp4", "c,d.json"])
    assert (look.files, look.nframes, look.fps) == (["a.mp4", "b.mp4", "c,d.json"], None, 4.0)
    report = parse(Report, ["one", "two", "--output", "x.html"])
    assert (report.runs, report.output) == (["one", "two"], "x.html")
    for cls, flag in ((Look, "--files"), (Report, "--runs")):
        with pytest.raises(UserError, match=rf"{flag}: found \[\], expected .*python"):
            parse(cls, [])
    assert "controls" not in (text := build_parser(Look).format_help()) and "[files ...]" in text


def test_help_of_every_script_is_grouped_and_needs_no_torch():
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    for script in [f"{name}.py" for name in SCRIPTS.split()]:
        command = [sys.executable, "-c", code, script, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (script, done.stderr)
        assert script == "quickstart.py" or f"{script} [" in done.stdout.splitlines()[0], (script, done.stdout)

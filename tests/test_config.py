"""Options: commands that people have keep their meaning, other trainers' names are understood, a slip is named."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import config
import names
from cli import help_text
from config import GRPO, SFT, Adapter, Generate, Infer, Look, Report, changed, cli, ignored_options, parse
from model import UserError

ROOT = Path(__file__).resolve().parents[1]

CASES = ROOT / "tests" / "cases"
COMMANDS = json.loads((CASES / "commands.json").read_text())  # the original project's, as people have them
MISTAKES = [json.loads(line) for line in (CASES / "mistakes.jsonl").read_text().splitlines()]


def without_effect(cfg):
    return {line.split()[0] for line in ignored_options(cfg) if "no effect" in line}


def message(cls, argv):
    """The one line that a user's mistake is answered with."""
    with pytest.raises(UserError) as error:
        parse(cls, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


NO_EFFECT = {"--use_liger", "--disable_flash_attn2", "--lazy_preprocess", "--remove_unused_columns"}


def same(value, text):
    """Whether an option's value is what the text says."""
    if isinstance(value, str | bool | list):
        return str(value).replace(" ", "") == text
    return value == float(text)


@pytest.mark.parametrize(
    ("cls", "no_effect"),
    [(Generate, set()), (SFT, NO_EFFECT), (GRPO, {"--disable_flash_attn2", "--lora_dropout"})],
)
def test_commands_that_people_have(cls, no_effect):
    words = shlex.split(COMMANDS[cls.__name__])
    cfg, known = parse(cls, words), {f.name for f in fields(cls)}
    texts = {word[2:]: text for word, text in zip(words, [*words[1:], ""]) if word.startswith("--")}
    texts = {name: "True" if text.startswith("--") else text for name, text in texts.items() if name in known}
    assert cfg.given == texts.keys() and all(same(getattr(cfg, name), text) for name, text in texts.items())
    assert len(texts) > 7 and without_effect(cfg) == no_effect
    assert cls is not SFT or cfg.nframes is None  # a given fps beats the default number of frames


def test_commands_with_words_that_have_no_flag():
    cfg = parse(Infer, shlex.split(COMMANDS["Infer"]))
    assert (cfg.model_id, cfg.video) == ("Qwen/Qwen2.5-VL-3B-Instruct", "./data/synthetic_videos/videos/000.mp4")
    assert (cfg.model_ckpt, cfg.fps, cfg.nframes) == ("./output/video_lora/checkcheckpoint-25", 1.0, None)
    assert cfg.text == config.QUESTION  # the shell hands over \n as two characters
    look = parse(Look, ["a.mp4", "--fps", "4", "b.mp4", "c,d.json"])
    assert (look.files, look.nframes, look.fps) == (["a.mp4", "b.mp4", "c,d.json"], None, 4.0)
    cfg = parse(Infer, ["--json", "clip.mp4", "--question=What moves?", "--model_ckpt", "none"])
    assert (cfg.video, cfg.json, cfg.text, cfg.model_ckpt) == ("clip.mp4", True, "What moves?", None)
    cfg = parse(Adapter, ["merge", "a", "b"])
    assert (cfg.command, cfg.model_ckpt, cfg.output_dir) == ("merge", "a", "b")


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case["flags"] + case.get("file", ""))
def test_mistakes(case, tmp_path, monkeypatch):
    """file: the text of the config file that the flags name."""
    monkeypatch.chdir(tmp_path)
    Path(case["flags"].split()[-1] if "file" in case else "none").write_text(case.get("file", ""))
    assert case["message"] in message(getattr(config, case["options"]), case["flags"].split())


def test_a_later_setting_beats_an_earlier_one(tmp_path):
    (tmp_path / "big.py").write_text("nframes = 16\nvideo_min_pixels = 50_000\nvideo_max_pixels = 100_000\n")
    cfg = parse(SFT, ["--config", str(tmp_path / "big.py"), "--fps", "1", "--video_max_pixels", "4096"])
    assert (cfg.nframes, cfg.video_min_pixels, cfg.video_max_pixels) == (None, 4096, 4096)
    both = parse(Infer, ["a.mp4", "--fps", "1", "--nframes", "4"])
    assert both.nframes == 4 and without_effect(both) == {"--fps"}


@pytest.mark.parametrize("file", sorted((CASES / "settings").glob("a.*")), ids=lambda file: file.name)
def test_config_file_of_each_kind(file):
    cfg = parse(SFT, ["--local_rank=0", f"--config={file}", "--learning_rate", "2e-4"])
    expected = dict(save_steps=8, learning_rate=2e-4, bf16=True, lora_namespan_exclude=["a"])
    expected |= dict(pack_tokens=None, save_strategy="no", lora_rank=8)
    assert changed(cfg) == expected and cfg.given == set(expected)
    assert without_effect(cfg) == {"--use_liger_kernel"} and "--lora_r is --lora_rank here" in ignored_options(cfg)


def test_config_py_itself_and_a_copy(tmp_path):
    for cls in (Generate, SFT, GRPO):  # defaults pass their own checks, and each has an effect
        assert parse(cls, []) == cls() and ignored_options(parse(cls, [])) == []
    assert parse(SFT, ["--config", str(ROOT / "config.py")]) == SFT()
    source = (ROOT / "config.py").read_text(encoding="utf-8")
    (tmp_path / "copy.py").write_text(source.replace("learning_rate: float = 3e-3", "learning_rate: float = 4e-3"))
    cfg = parse(SFT, ["--config", str(tmp_path / "copy.py")])
    assert changed(cfg) == {"learning_rate": 4e-3} and cfg.given == {"learning_rate"}


@pytest.mark.parametrize("cls", [Generate, SFT, GRPO, Infer, Look, Adapter, Report])
def test_help(monkeypatch, cls):
    """Short: an example and some 20 options; all: every one, with its comment. Both as wide as the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    texts = [help_text(cls, every) for every in (False, True)]
    assert all(f"example: {cls.__doc__}\n" in text for text in texts)
    assert max(len(line) for text in texts for line in text.splitlines()[2:]) <= 80
    short, every = (re.findall(r"(?m)^  --(\w+)", text) for text in texts)
    assert len(short) <= 26 and sorted(every) == sorted(f.name for f in fields(cls))
    assert cls is not SFT or "for rank 16 on the tiny model (default 0.003)" in " ".join(texts[1].split())


@pytest.mark.parametrize(("rank", "each_rank"), [("0", False), ("1", False), ("1", True)])
def test_cli_prints_one_line(monkeypatch, capsys, rank, each_rank):
    """Once a machine where all processes would print the same (each_rank False)."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as end:
        cli(lambda: parse(SFT, ["--seed", "x"]), each_rank)
    line = "error: --seed: found 'x', expected int\n"
    assert end.value.code == 2 and capsys.readouterr().err == ("" if (rank, each_rank) == ("1", False) else line)


def test_migrating_is_written_from_the_tables():
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    assert text == names.migrating(text), "run: python names.py"


@pytest.mark.parametrize("name", names.NAMES)
def test_names_of_other_trainers(name):
    """A synonym is accepted and reported, a name without effect too; other values and meanings are answered."""
    kind, meaning = names.NAMES[name]
    assert name not in {f.name for f in fields(GRPO)}
    if kind == "same":
        cls = Infer if meaning == "video" else GRPO
        default = {f.name: f.default for f in fields(cls)}[meaning]
        value = {"lr_scheduler_type": "linear", "per_device_train_batch_size": "16", "rewards": "a,b"}.get(meaning, "6")
        cfg = parse(cls, [f"--{name.replace('_', '-')}", "True" if isinstance(default, bool) else value])
        assert cfg.given == {meaning} and f"--{name} is --{meaning} here" in ignored_options(cfg)
    elif kind == "no_effect":
        cfg = parse(GRPO, [f"--{name}", "x", "--seed", "7"])
        assert changed(cfg) == {"seed": 7} and without_effect(cfg) == {f"--{name}"}
    elif kind == "by_value":
        for value, ours in list(meaning.items())[:-1]:
            cfg = parse(GRPO, [f"--{name}={value}"])
            field = ours.partition("=")[0]
            assert cfg.given == ({field} if field else set()) and f"--{name} {value}" in ignored_options(cfg)[0]
        assert meaning["otherwise"] in message(GRPO, [f"--{name}", "something"])
    elif kind == "removed":
        assert f"--{name}: was removed; {meaning}" in message(GRPO, [f"--{name}", "1"])
        assert f"--{name}: was removed; {meaning}" in message(Generate, [f"--{name}", "1"])
    else:
        assert f"--{name}: 'true' is not an option here; {meaning}" in message(GRPO, [f"--{name}"])
        assert parse(GRPO, [f"--{name}", "False"]).given == set()


def test_a_file_of_another_trainer():
    flags = ["--config", str(CASES / "settings" / "llamafactory.yaml"), "--load_in_4bit", "--eval_strategy", "no"]
    cfg = parse(SFT, flags)
    assert (cfg.max_seq_length, cfg.overwrite, cfg.resume, cfg.learning_rate) == (2048, True, False, 1e-4)
    assert (cfg.base_dtype, cfg.eval_data_path) == ("nf4", None)


NEAR = {"lora_rnk": "lora_rank", "leraning_rate": "learning_rate", "max_completion": "max_completion_length"}
NEAR |= {"rank": "lora_rank", "beta1": "adam_beta1", "save_step": "save_steps"}
NEAR |= {"resized_height": "image_resized_height or video_resized_height"}
FAR = "lora_init steps size use_cache reward_model eval_batch_size max kl wd topic learning_curve warm tp data_format"


@pytest.mark.parametrize("word", [*NEAR, *FAR.split()])
def test_no_suggestion_leads_astray(word):
    """The near spelling, or the options that hold the words; else no guess. The script is named, not a class."""
    hint = f"did you mean {NEAR[word]}?" if word in NEAR else "--help all lists them"
    assert message(GRPO, [f"--{word}", "1"]) == f"--{word}: no such option of train_grpo.py; {hint}"
